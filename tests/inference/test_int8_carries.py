"""Carries of quantised stages: in 8 bits, also through a stage that only hands them on."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper  # noqa: E402

from dfs_jax.inference.int8_carries import with_int8_carries  # noqa: E402

CONSTANTS = {
    "scale": np.float32(0.5),
    "zero": np.uint8(7),
    "nearly": np.float32(0.500001),
    "axes": np.array([1]),
}


def stage(nodes, inputs, outputs):
    """A stage of vectors of 5 numbers; the first output is the logits."""
    nodes = [helper.make_node(op, list(x), list(y), f"{op}_{y[0]}") for op, x, y in nodes]
    values = [
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", 5]) for x in names]
        for names in (inputs, outputs)
    ]
    used = {name for node in nodes for name in node.input}
    constants = [
        onnx.numpy_helper.from_array(value, name)
        for name, value in CONSTANTS.items()
        if name in used
    ]
    graph = helper.make_graph(nodes, "stage", *values, constants)
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


def quantised(x, y, scale="scale"):
    return [
        ("QuantizeLinear", [x, scale, "zero"], [f"{y}_8"]),
        ("DequantizeLinear", [f"{y}_8", scale, "zero"], [y]),
    ]


def run(models, x):
    """Returns every stage's logits, and the types of the carries."""
    carry, logits, types = [x], [], []
    for model in models:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        found, *carry = session.run(None, dict(zip(names, carry, strict=True)))
        logits.append(found)
        types.append([str(array.dtype) for array in carry])
    return np.stack(logits), types


FIRST = {
    "dequantised": [("Relu", ["x"], ["a0"]), *quantised("a0", "a"), ("Neg", ["a"], ["l"])],
    "with a range of its own": [
        ("Relu", ["x"], ["a0"]),
        *quantised("a0", "a", "nearly"),
        ("Neg", ["a"], ["l"]),
    ],
    "in float": [("Relu", ["x"], ["a"]), ("Neg", ["a"], ["l"])],
}


@pytest.mark.parametrize("name", FIRST)
def test_the_maker_quantises(name):
    models = [
        stage(FIRST[name], ["x"], ["l", "a"]),
        stage([*quantised("a", "b"), ("Relu", ["b"], ["l"])], ["a"], ["l"]),
    ]
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32) * 9
    expected, types = run(models, x)
    assert types == [["float32"], []]
    got, types = run(with_int8_carries(models), x)
    assert types == [["uint8"], []]
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("read", ["b", "c"])
def test_a_stage_that_hands_a_carry_on(read):
    """Its own logits may be of what it hands on."""
    models = [
        stage([("Relu", ["x"], ["a"]), ("Neg", ["x"], ["b"]), ("Neg", ["a"], ["l"])], "x", "lab"),
        stage(
            [("Identity", ["a"], ["c"]), ("Neg", ["b"], ["d"]), ("Relu", [read], ["l"])],
            ["a", "b"],
            ["l", "c", "d"],
        ),
        stage([*quantised("c", "e"), ("Add", ["e", "d"], ["l"])], ["c", "d"], ["l"]),
    ]
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32) * 9
    expected, _ = run(models, x)
    got, types = run(with_int8_carries(models), x)
    # what two nodes or a sum read stays in float
    assert types == [["uint8" if read == "b" else "float32", "float32"], ["uint8", "float32"], []]
    np.testing.assert_array_equal(got, expected)
