"""Writing keys, values and finished key means into the paged cache."""
