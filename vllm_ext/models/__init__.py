"""Model classes, loaded by vLLM by name."""
