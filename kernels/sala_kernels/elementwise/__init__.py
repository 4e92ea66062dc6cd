"""Norms, gates and rotations between the matrix products, each one pass over its operands."""
