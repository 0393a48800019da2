"""Times training steps: methods, batch sizes and frameworks side by side."""
