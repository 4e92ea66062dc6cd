"""Prompts in the model's own tokens."""
