"""Measurements of a trained checkpoint on text it has never seen."""
