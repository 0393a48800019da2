"""Everything that is measured on a GPU, in stages that keep their time: docs/gpu.md."""
