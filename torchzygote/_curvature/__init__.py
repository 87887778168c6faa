"""Diagonals of Hessians, summed up from the curvature of each recorded operation."""
