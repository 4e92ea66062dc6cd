"""InfLLM-V2 block selection: compressed keys, block scores, forced blocks and top-k."""
