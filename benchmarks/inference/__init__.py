"""Times early exits against the full network."""
