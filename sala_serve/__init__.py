"""The OpenAI-compatible gateway in front of SALA engines; imports no torch, vllm or transformers."""
