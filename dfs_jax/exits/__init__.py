"""What an exit says of its examples: predictions, confidences, and how exits share them."""
