"""Training and evaluation data: real English text, a tokenizer and retrieval tasks."""
