"""Quantities computed from exits' logits: predictions, confidence, exit distribution."""
