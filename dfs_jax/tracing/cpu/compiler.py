"""What XLA is told when it compiles a step for a CPU."""

from __future__ import annotations

import functools

import jax

# Newer versions of XLA give matrix products, convolutions and reductions of a CPU to a library.
# Its reductions are fast; the rest is slower than XLA's own, or runs on one core alone. Medians of
# a step on 2 cores, all to the library / reductions alone: VGG7 869 / 723 ms (batch 128), ResNet18
# 2,613 / 2,288 ms, MSDNet 1,694 / 1,567 ms (batch 64).
_LIBRARY_FOR_REDUCTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}


def compiler_options(platform: str) -> dict[str, str]:
    """Returns `jax.jit`'s `compiler_options` for programs that run on that platform.

    None for other platforms than "cpu", and none where XLA does not know the options.

    Example:
      >>> compiler_options("tpu")
      {}
    """
    known = platform == "cpu" and _is_known(tuple(_LIBRARY_FOR_REDUCTIONS.items()))
    return dict(_LIBRARY_FOR_REDUCTIONS) if known else {}


@functools.cache
def _is_known(options: tuple[tuple[str, str], ...]) -> bool:
    """Compiles the smallest program with the options, which XLA refuses where they are unknown."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        smallest = jax.jit(lambda: 0, compiler_options=dict(options)).lower()
    try:
        smallest.compile()
    except RuntimeError:
        return False
    return True
