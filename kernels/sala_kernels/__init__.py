"""Operators of the SALA architecture; importing this package imports neither torch nor triton."""
