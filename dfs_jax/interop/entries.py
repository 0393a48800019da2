"""Correspondence of published PyTorch tensors with ours, as data: one `Entry` for each tensor.

Each family of models lists its entries in its own file; `torch_names` converts both ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """Order of axes: axis a of our tensor is axis `permutation[a]` of PyTorch's.

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

# PyTorch's input axis, along which a weight is split in two: channels of f+, channels of f-.
INPUT_AXIS = 1


class Entry(NamedTuple):
    """One of our tensors, and the published tensor, or its two halves, with the same values.

    Attributes:
      names: one PyTorch name, or two: of the weights for the shared and the exit-specific
        channels, concatenated in this order along PyTorch's input axis.
      path: path in our tree, the collection first: `("params", "block1", "conv", "kernel")`.
      layout: permutation of the axes.
    """

    names: tuple[str, ...]
    path: tuple[str, ...]
    layout: Layout


class Family(NamedTuple):
    """Published names of one family of models.

    Attributes:
      entries: function that lists a model's tensors, in the published order.
      head_prefixes: prefixes of classifiers' names, in multi-exit and single-exit programs.
      image_shape: `(height, width, channels)` of the images that the published models take.
    """

    entries: Callable[[Any], list[Entry]]
    head_prefixes: tuple[str, ...]
    image_shape: tuple[int, int, int] = (32, 32, 3)


def conv(names: str | tuple[str, str], path: str, *, bias: bool = False) -> list[Entry]:
    """Returns a convolution's entries; `names` are module names, two for a weight in halves.

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
