"""ONNX graphs of traced programs, as a person would write them for a device."""

from dfs_jax.onnx.convert import OPSET, Input, to_onnx

__all__ = ["OPSET", "Input", "to_onnx"]
