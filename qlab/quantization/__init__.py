"""Tensors only: what is asked of one, what was seen, the grid found, and the arithmetic on it."""
