"""Options of XLA for programs on a CPU."""

from __future__ import annotations

import functools

import jax

# Newer versions of XLA compute a CPU's matrix products, convolutions and reductions by a library.
# Its reductions are fast; the rest is slower than XLA's own, or runs on one core only. Medians of
# a step on 2 cores, all to the library / reductions alone: VGG7 869 / 723 ms (batch 128), ResNet18
# 2,613 / 2,288 ms, MSDNet 1,694 / 1,567 ms (batch 64).
_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
_FOR_REDUCTIONS = {_LIBRARY: "LIBRARY_FUSION_TYPE_REDUCE"}
# A reduction pulls the convolutions before it into the library: ResNet18's last ten for a single
# image, 63 ms instead of 21. Inference has few reductions, and goes without.
_FOR_NOTHING = {_LIBRARY: ""}


def compiler_options(platform: str) -> dict[str, str]:
    """Returns `jax.jit`'s `compiler_options` for training on a platform.

    Empty for platforms other than "cpu", and if XLA does not know the options.

    Example:
      >>> compiler_options("tpu")
      {}
    """
    return _if_known(platform, _FOR_REDUCTIONS)


def inference_options(platform: str) -> dict[str, str]:
    """Returns `jax.jit`'s `compiler_options` for inference on a platform, as `compiler_options`.

    >>> inference_options("tpu")
    {}
    """
    return _if_known(platform, _FOR_NOTHING)


def _if_known(platform: str, options: dict[str, str]) -> dict[str, str]:
    known = platform == "cpu" and _is_known(tuple(options.items()))
    return dict(options) if known else {}


@functools.cache
def _is_known(options: tuple[tuple[str, str], ...]) -> bool:
    """Returns whether XLA accepts the options, by compiling a minimal program."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        smallest = jax.jit(lambda: 0, compiler_options=dict(options)).lower()
    try:
        smallest.compile()
    except RuntimeError:
        return False
    return True
