"""Times early exit against the full network."""
