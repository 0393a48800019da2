"""What a program costs: counted from its trace, or read from its compiled module."""
