"""Runs `benchmarks.inference.benchmark`."""

from benchmarks.inference.benchmark import main

if __name__ == "__main__":
    main()
