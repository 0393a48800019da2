"""Times training steps of methods, batch sizes and frameworks."""
