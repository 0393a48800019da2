"""ONNX graphs of traced programs, with constants folded and images channels first."""

from dfs_jax.onnx.convert import OPSET, Input, to_onnx

__all__ = ["OPSET", "Input", "to_onnx"]
