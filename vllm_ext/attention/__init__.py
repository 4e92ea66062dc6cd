"""The two token mixers as vLLM layers: their caches, per-step metadata and calls into the ops."""
