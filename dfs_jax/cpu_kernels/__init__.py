"""Convolutions and pooling that are fast on a CPU; on other platforms nothing of them is left.

XLA's own kernels for a CPU lose most in the weight gradient (three to six times slower than need
be), in strided and in 1x1 convolutions, and in max-pooling. These here are written in plain JAX and
put beside XLA's by `jax.lax.platform_dependent`, which decides when the program is lowered.
"""

from dfs_jax.cpu_kernels.compiler import compiler_options
from dfs_jax.cpu_kernels.passes import Geometry, Passes, fast_passes
from dfs_jax.cpu_kernels.pooling import max_pool_2x2

__all__ = ["Geometry", "Passes", "compiler_options", "fast_passes", "max_pool_2x2"]
