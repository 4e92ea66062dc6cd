"""The engine on a GPU, measured in stages: `make bench-gpu` (kernels/bench/README.md)."""
