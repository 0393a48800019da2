"""Values of a traced program in a graph: constants, and tensors whose axes may be in another order.

A convolution of ONNX has its channels before height and width, one of Flax after them. So a tensor
remembers the logical axis of each dimension: a transpose of the program costs nothing, and only an
operation that needs one order adds a `Transpose` to the graph. Dimensions that the program
broadcasts stay of size 1 as long as operators of ONNX broadcast by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from dfs_jax.onnx.graph import Graph

CHANNELS_FIRST = (0, 3, 1, 2)


class Tensor(NamedTuple):
    """A tensor of the graph.

    Attributes:
      name: name in the graph.
      axes: logical axis of each dimension.
      sizes: size of each logical axis; 1 where the program broadcasts it.
    """

    name: str
    axes: tuple[int, ...]
    sizes: tuple[Any, ...]

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.axes)

    def place(self, axis: int) -> int:
        """Returns the dimension that holds a logical axis."""
        return self.axes.index(axis)


Value: TypeAlias = Tensor | np.ndarray


def as_array(x: Any) -> np.ndarray:
    """Returns a constant as numpy holds it, in a type that runtimes on a CPU compute in."""
    array = np.asarray(x)
    return array.astype(narrowed(array.dtype))


def narrowed(dtype: Any) -> np.dtype:
    """Returns the type of a value in the graph: float32 for bfloat16, which few runtimes take."""
    return np.dtype(np.float32) if jnp.dtype(dtype) == jnp.bfloat16 else np.dtype(dtype)


def avals(equation: JaxprEqn) -> list[Any]:
    """Returns shapes and types of an equation's inputs."""
    return [variable.aval for variable in equation.invars]


def in_order(rank: int) -> tuple[int, ...]:
    """Returns the axes of a tensor in the order of the program."""
    return tuple(range(rank))


def usual_axes(rank: int) -> tuple[int, ...]:
    """Returns the order of axes that most operators like: channels first for images."""
    return CHANNELS_FIRST if rank == 4 else in_order(rank)


def ordered(graph: Graph, value: Value, axes: Sequence[int]) -> str:
    """Returns the name of the value with its dimensions in the given order of logical axes."""
    axes = tuple(axes)
    if not isinstance(value, Tensor):
        return graph.constant(np.transpose(value, axes))
    if value.axes == axes:
        return value.name
    thick_before = [a for a in value.axes if value.sizes[a] != 1]
    thick_after = [a for a in axes if value.sizes[a] != 1]
    if thick_before == thick_after:  # only dimensions of size 1 move
        return graph.add("Reshape", value.name, shape_of(graph, [value.sizes[a] for a in axes]))
    return graph.add("Transpose", value.name, perm=[value.place(a) for a in axes])


def shape_of(graph: Graph, sizes: Sequence[Any]) -> str:
    """Returns the name of a shape for `Reshape`, whose one unknown size is inferred."""
    known = [size if isinstance(size, int) else -1 for size in sizes]
    if known.count(-1) > 1:
        raise NotImplementedError(f"a shape with several unknown sizes, {list(sizes)}")
    return graph.integers(known)


def full(graph: Graph, value: Value, shape: Sequence[Any], batch: str) -> Value:
    """Returns the value with exactly this logical shape; a constant as one, if no size is unknown.

    Args:
      graph: graph to add to.
      value: value whose sizes are those of `shape`, or 1.
      shape: logical shape; sizes that are not integers are that of the batch.
      batch: name of a vector of int64 with the size of the batch.
    """
    shape = tuple(shape)
    is_tensor = isinstance(value, Tensor)
    if is_tensor and all(map(_same, value.sizes, shape)):
        return value
    if not is_tensor and all(isinstance(size, int) for size in shape):
        return np.broadcast_to(value, shape)
    name = value.name if is_tensor else graph.constant(value)
    axes = value.axes if is_tensor else in_order(len(shape))
    parts = [graph.integers([s]) if isinstance(s, int) else batch for s in (shape[a] for a in axes)]
    target = parts[0] if len(parts) == 1 else graph.add("Concat", *parts, axis=0)
    return Tensor(graph.add("Expand", name, target), axes, shape)


def as_tensor(graph: Graph, value: Value) -> Tensor:
    """Returns a value as a tensor."""
    if isinstance(value, Tensor):
        return value
    return Tensor(graph.constant(value), in_order(value.ndim), value.shape)


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, int) == isinstance(b, int) and (not isinstance(a, int) or a == b)
