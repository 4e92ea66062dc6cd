"""MiniCPM-SALA in plain PyTorch: what training trains and what the engine is checked against."""
