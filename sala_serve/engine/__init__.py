"""The side of the gateway that faces vLLM."""
