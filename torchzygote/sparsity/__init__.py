"""Sparsity: which entries of a derivative can be nonzero, found by running the function on index sets."""
