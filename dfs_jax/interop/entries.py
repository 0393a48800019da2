"""How the tensors of a published PyTorch program lie in ours, as data: one `Entry` a tensor.

A family of models lists its entries in a file of its own; `torch_names` converts by them both ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order of axes: axis a of our tensor is axis `permutation[a]` of PyTorch's.

    Example:
      >>> CONV.to_ours(np.zeros((5, 3, 7, 11))).shape  # OIHW -> HWIO
      (7, 11, 3, 5)
      >>> CONV.to_torch(np.zeros((7, 11, 3, 5))).shape
      (5, 3, 7, 11)
    """

    permutation: tuple[int, ...]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Transposes PyTorch's tensor (or its gradient) to ours."""
        return np.transpose(array, self.permutation)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Transposes our tensor (or its gradient) to PyTorch's."""
        return np.transpose(array, np.argsort(self.permutation))


CONV = Layout((2, 3, 1, 0))  # out, in, height, width -> height, width, in, out
LINEAR = Layout((1, 0))  # out, in -> in, out
VECTOR = Layout((0,))

# PyTorch's input axis, along which a weight is cut in two: channels of f+, channels of f-.
INPUT_AXIS = 1


class Entry(NamedTuple):
    """One of our tensors, and the published tensor, or the two halves, that hold it.

    Attributes:
      names: one PyTorch name; or two, of the weights that read the shared channels and the
        exit-specific ones, joined in this order along PyTorch's input axis.
      path: ours, the collection first: `("params", "block1", "conv", "kernel")`.
      layout: how the axes are permuted.
    """

    names: tuple[str, ...]
    path: tuple[str, ...]
    layout: Layout


class Family(NamedTuple):
    """The published names of one family of models.

    Attributes:
      entries: lists a model's tensors, in the published order.
      head_prefixes: how the names of classifiers begin, in multi-exit and single-exit programs.
      image_shape: `(height, width, channels)` of the images that the published models take.
    """

    entries: Callable[[Any], list[Entry]]
    head_prefixes: tuple[str, ...]
    image_shape: tuple[int, int, int] = (32, 32, 3)


def conv(names: str | tuple[str, str], path: str, *, bias: bool = False) -> list[Entry]:
    """Returns a convolution's entries; `names` are modules' names, two for a weight in halves.

    >>> [entry.path for entry in conv("stem.0", "block1/conv")]
    [('params', 'block1', 'conv', 'kernel')]
    """
    return _weight_and_bias(names, path, CONV, bias)


def linear(names: str | tuple[str, str], path: str, *, bias: bool = False) -> list[Entry]:
    """Returns a linear layer's entries; `names` as in `conv`."""
    return _weight_and_bias(names, path, LINEAR, bias)


def batch_norm(name: str, path: str) -> list[Entry]:
    """Returns the entries of a BatchNorm's parameters and running statistics."""
    tensors = (
        ("weight", "params", "scale"),
        ("bias", "params", "bias"),
        ("running_mean", "batch_stats", "mean"),
        ("running_var", "batch_stats", "var"),
    )
    return [
        Entry((f"{name}.{theirs}",), (collection, *path.split("/"), ours), VECTOR)
        for theirs, collection, ours in tensors
    ]


def _weight_and_bias(
    names: str | tuple[str, str], path: str, layout: Layout, bias: bool
) -> list[Entry]:
    modules = (names,) if isinstance(names, str) else names
    where = ("params", *path.split("/"))
    entries = [Entry(tuple(f"{name}.weight" for name in modules), (*where, "kernel"), layout)]
    if bias:
        entries.append(Entry((f"{modules[0]}.bias",), (*where, "bias"), VECTOR))
    return entries
