"""HALO: an ordinary Transformer becomes a SALA model, stage by stage."""
