"""Measurements on a GPU, in stages with time limits: docs/gpu.md."""
