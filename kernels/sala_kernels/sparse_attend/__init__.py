"""Softmax attention over each token's selected key blocks."""
