"""A pass over a graph's nodes, in which rules look at each node and change it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dfs_jax.onnx.graph import Graph, Node


class Sweep:
    """One pass over the nodes.

    Attributes:
      graph: graph.
      uses: how often each value is read.
      made: node by its output.
      computed: value by what computes it.
    """

    def __init__(self, graph: Graph, outputs: Sequence[str]):
        self.graph = graph
        self.uses: Counter[str] = graph.uses(outputs)
        self.made = {node.output: node for node in graph.nodes}
        self.computed: dict[tuple[Any, ...], str] = {}
        self._outputs = set(outputs)
        self._gone: set[int] = set()
        self._renamed: dict[str, str] = {}
        self._new: list[Node] = []

    def run(self, rules: Sequence[Callable[[Sweep, Node], bool]]) -> bool:
        """Applies the first rule that fits to each node; returns whether any did."""
        changed, nodes = False, []
        for node in self.graph.nodes:
            node.inputs = [self._renamed.get(name, name) for name in node.inputs]
            if id(node) not in self._gone:
                changed |= any(rule(self, node) for rule in rules)
            nodes += [*self._new, node]
            self._new.clear()
        self.graph.nodes = [node for node in nodes if id(node) not in self._gone]
        return changed

    def known(self, name: str) -> np.ndarray | None:
        """Returns a constant, or None."""
        return self.graph.constants.get(name)

    def of(self, name: str, op: str) -> Node | None:
        """Returns the node that makes a value, if it is of this kind."""
        node = self.made.get(name)
        return node if node is not None and node.op == op else None

    def split(self, node: Node, *ops: str) -> tuple[Any, np.ndarray] | None:
        """Returns the operand and the constant of a node of one of these kinds; else None."""
        if node.op not in ops:
            return None
        for x, constant in (node.inputs, node.inputs[::-1]):
            found = self.known(constant)
            if found is not None and found.dtype.kind == "f" and x not in self.graph.constants:
                return x, found
        return None

    def sole(self, name: str, *ops: str) -> Node | None:
        """Returns the node that makes a value, if it is one of these and nothing else reads it."""
        node = self.made.get(name)
        if node is None or node.op not in ops or self.uses[name] != 1 or name in self._outputs:
            return None
        return None if id(node) in self._gone else node

    def along(self, name: str, axis: int) -> tuple[str, int, int, int] | None:
        """Returns what a slice along one dimension cuts, its start, end and whole size."""
        node = self.made.get(name)
        if node is None or node.op != "Slice" or node.extent is None:
            return None
        start, end, axes, step = (int(self.graph.constants[k].item()) for k in node.inputs[1:])
        return (node.inputs[0], start, end, node.extent) if (axes, step) == (axis, 1) else None

    def take_over(self, before: Node, node: Node) -> None:
        """Lets `before` make what `node` made, which is removed."""
        before.output = node.output
        self.made[node.output] = before
        self._gone.add(id(node))

    def insert(self, node: Node) -> str:
        """Puts a new node before the one that is looked at, and returns the name of its output."""
        node.output = self.graph.new_name(node.op)
        self._new.append(node)
        self.made[node.output] = node
        return node.output

    def drop(self, node: Node, stands_for: str) -> bool:
        """Removes a node whose result is another value."""
        if node.output in self._outputs:
            node.op, node.inputs, node.attributes = "Identity", [stands_for], {}
            return False
        self._renamed[node.output] = stands_for
        self.uses[stands_for] += self.uses[node.output] - 1
        self._gone.add(id(node))
        return True
