"""An ONNX graph under construction: nodes in order, and the constants that they read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

OPSET = 18
_IR_VERSION = 9  # of ONNX 1.14, the first with opset 19: runtimes of 2023 and later read it
BATCH = "batch"  # name of the symbolic dimension


@dataclasses.dataclass
class Node:
    """One operation of the graph, with one output.

    Attributes:
      op: operator of ONNX.
      inputs: names of values; "" for an input that is left out.
      output: name of the result.
      attributes: attributes of the operator.
      extent: number of elements that a sum runs over, or of the dimension that is cut, if known.
    """

    op: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any]
    extent: int | None = None


class Graph:
    """Nodes in the order of computation.

    Attributes:
      nodes: the nodes.
      constants: arrays by name.
    """

    def __init__(self):
        self.nodes: list[Node] = []
        self.constants: dict[str, np.ndarray] = {}
        self._names: Counter[str] = Counter()
        self._of_content: dict[tuple[Any, ...], str] = {}

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Appends a node and returns the name of its output."""
        name = self.new_name(op)
        self.nodes.append(Node(op, list(inputs), name, attributes))
        return name

    def constant(self, array: Any) -> str:
        """Returns the name of a constant; equal ones are stored once."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._of_content:
            name = self.new_name("constant")
            self._of_content[key] = name
            self.constants[name] = array
        return self._of_content[key]

    def integers(self, values: Iterable[int]) -> str:
        """Returns the name of a vector of int64, such as the axes of a node."""
        return self.constant(np.array(list(values), np.int64))

    def new_name(self, op: str) -> str:
        """Returns a name that the graph does not have."""
        self._names[op] += 1
        return f"{op.lower()}_{self._names[op]}"

    def uses(self, outputs: Iterable[str]) -> Counter[str]:
        """Returns how often each value is read, by nodes and as one of the graph's outputs."""
        return Counter([*(name for node in self.nodes for name in node.inputs), *outputs])

    def drop_unused(self, outputs: Sequence[str]) -> None:
        """Removes nodes and constants that no output needs."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if node.output in needed:
                kept.append(node)
                needed.update(node.inputs)
        self.nodes = kept[::-1]
        self.constants = {k: v for k, v in self.constants.items() if k in needed}


def serialized(
    graph: Graph,
    inputs: Mapping[str, tuple[np.dtype, Sequence[int | str]]],
    outputs: Mapping[str, tuple[np.dtype, Sequence[int | str]]],
    *,
    name: str,
) -> bytes:
    """Returns the graph as the bytes of an ONNX model, checked.

    Args:
      graph: graph, whose values have the names of `inputs` and `outputs`.
      inputs, outputs: type and shape by name; a string is a symbolic dimension.
      name: name of the graph.
    """
    from onnx import checker, helper, numpy_helper

    def described(values: Mapping[str, tuple[np.dtype, Sequence[int | str]]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(dtype), list(shape))
            for k, (dtype, shape) in values.items()
        ]

    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node(
                    node.op, node.inputs, [node.output], node.output, **node.attributes
                )
                for node in graph.nodes
            ],
            name,
            described(inputs),
            described(outputs),
            [numpy_helper.from_array(v, k) for k, v in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="dfs_jax",
    )
    checker.check_model(model, full_check=True)
    return model.SerializeToString()
