"""What a trained network's exits say, and when to stop: policies on arrays of predictions."""
