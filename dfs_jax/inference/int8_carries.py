"""Carries of quantised stages in 8 bits: a quarter of the bytes that are handed on and repacked.

ONNX Runtime quantises each stage by itself, with carries in float32: a stage dequantises what it
hands on, and the next one quantises it again. Here the stage hands on the 8 bits. Its last layer,
whose result somebody read in float, then runs in int8 too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np


def with_int8_carries(models: Sequence[bytes]) -> list[bytes]:
    """Returns the stages of a quantised network, with carries in 8 bits where these are quantised.

    Args:
      models: stages in the QDQ format, in which a carry has the same name in the stage that makes
        it and in the one that reads it.
    """
    import onnx

    loaded = [onnx.load_from_string(model) for model in models]
    # From the last: a carry that a stage only hands on is quantised in the stage before.
    for before, after in reversed(list(itertools.pairwise(model.graph for model in loaded))):
        for value in after.input:
            _in_8_bits(before, after, value)
    for model in loaded:
        del model.graph.value_info[:]  # of types that have changed
        onnx.checker.check_model(model, full_check=True)
    return [model.SerializeToString() for model in loaded]


def _in_8_bits(before: Any, after: Any, value: Any) -> None:
    """Moves the quantisation of a carry from the stage that reads it to the one that makes it."""
    from onnx import helper

    readers = [node for node in after.node if value.name in node.input]
    maker = next((node for node in before.node if value.name in node.output), None)
    if maker is None or len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return
    (quantize,) = readers
    if quantize.output[0] in [x.name for x in after.output]:
        identity = helper.make_node("Identity", [value.name], quantize.output, quantize.name)
        after.node.insert(list(after.node).index(quantize), identity)
    else:
        _rename(after, quantize.output[0], value.name)
    after.node.remove(quantize)
    source = _quantised(before, maker, [_constant(after, name) for name in quantize.input[1:]])
    _rename(before, value.name, f"{value.name}_float")
    _rename(before, source, value.name)
    described = next(x for x in before.output if x.name == value.name)
    kind = next(x for x in after.initializer if x.name == quantize.input[2]).data_type
    for one in (value, described):
        one.type.tensor_type.elem_type = kind


def _quantised(graph: Any, maker: Any, wanted: list[np.ndarray]) -> str:
    """Returns the name of the result of a node in 8 bits, with this scale and zero point."""
    from onnx import helper, numpy_helper

    if maker.op_type == "DequantizeLinear":
        own = [_constant(graph, name) for name in maker.input[1:]]
        # Ranges were found twice, on values that differ by rounding.
        if np.array_equal(own[1], wanted[1]) and np.allclose(own[0], wanted[0], rtol=1e-4, atol=0):
            return maker.input[0]
    source = maker.output[0]
    if maker.op_type == "Identity" and not any(source in node.input for node in graph.node):
        source = maker.input[0]
        graph.node.remove(maker)
    names = [f"{maker.output[0]}_carry_{part}" for part in ("scale", "zero_point")]
    graph.initializer.extend(map(numpy_helper.from_array, wanted, names))
    result = f"{maker.output[0]}_carry"
    graph.node.append(helper.make_node("QuantizeLinear", [source, *names], [result], result))
    return result


def _constant(graph: Any, name: str) -> np.ndarray:
    from onnx import numpy_helper

    return numpy_helper.to_array(next(x for x in graph.initializer if x.name == name))


def _rename(graph: Any, old: str, new: str) -> None:
    """Renames a value wherever nodes make or read it."""
    for node in graph.node:
        for names in (node.input, node.output):
            for k, name in enumerate(names):
                if name == old:
                    names[k] = new
