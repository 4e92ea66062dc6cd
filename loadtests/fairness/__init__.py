"""Is the gateway fair? Its scheduler before simulated engines, in virtual time; docs/scheduling.md shows the results."""
