"""Convolutions and pooling that are fast on a CPU.

XLA's own kernels for a CPU lose most in the weight gradient (three to six times slower than need
be), in strided and in 1x1 convolutions, and in max-pooling. The kernels here are plain JAX;
`dfs_jax.tracing.for_cpu` puts them into a traced program.
"""

from dfs_jax.tracing.cpu.compiler import compiler_options, inference_options

__all__ = ["compiler_options", "inference_options"]
