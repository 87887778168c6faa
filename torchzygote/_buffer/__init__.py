"""The ways of keeping what is written to a Buffer, and its indices."""
