"""Layers of the SALA model that vLLM has none of its own for."""
