"""Whose request goes to which engine, and when; docs/scheduling.md tells how it is decided."""
