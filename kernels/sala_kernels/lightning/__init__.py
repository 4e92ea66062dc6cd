"""Linear attention with one constant decay per head ("lightning attention")."""
