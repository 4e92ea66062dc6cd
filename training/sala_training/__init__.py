"""SALA in plain PyTorch: the model, the jobs that train it and the checkpoints they write."""
