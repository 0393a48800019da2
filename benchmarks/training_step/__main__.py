"""Runs `benchmarks.training_step.training_cost`."""

from benchmarks.training_step.training_cost import main

if __name__ == "__main__":
    main()
