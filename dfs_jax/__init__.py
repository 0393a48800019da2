"""Multi-exit networks in JAX, trained with Deep Feature Surgery and its rivals."""

__version__ = "0.1.0"
