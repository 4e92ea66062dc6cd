"""Who asks, what they may do and how much of it: tenants, their keys and their limits."""
