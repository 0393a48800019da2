"""Costs of a program, counted in its trace or read from its compiled module."""
