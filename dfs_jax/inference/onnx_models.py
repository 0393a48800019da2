"""Stages as ONNX models, with their weights inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

from dfs_jax.extras import require
from dfs_jax.inference.stages import Stage, last_logits, plain_stages
from dfs_jax.inference.weights import weights_fingerprint
from dfs_jax.onnx import OPSET, Input, to_onnx
from dfs_jax.types import Example

WHOLE = "network.onnx"


def written(stages: Sequence[Stage], example: Example) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Returns the files by name, and their description for the manifest.

    Args:
      stages: the stages.
      example: shape and type of one image.

    Raises:
      UserError: an operation that ONNX does not have.
    """
    require("onnx")
    stages = plain_stages(stages)
    contents = {f"stage{i + 1}.onnx": model for i, model in enumerate(_models(stages, example))}
    about = {
        "stages": [{"file": name} for name in contents],
        "whole": WHOLE,
        "opset": OPSET,
        "precision": "float32",
        "fingerprint": weights_fingerprint(stages),
    }
    contents[WHOLE] = to_onnx(
        lambda images: (last_logits(stages, images),), [_images(example)], ["logits"]
    ).model
    return contents, about


def _images(example: Example) -> Input:
    shape = tuple(example.shape)
    return Input("images", shape, np.dtype(example.dtype), tuple(range(len(shape) + 1)))


def _models(stages: Sequence[Partial], example: Example) -> list[bytes]:
    inputs, structure = (_images(example),), jax.tree.structure(0)
    models = []
    for i, stage in enumerate(stages):
        shapes = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in inputs]
        carry, _ = jax.eval_shape(stage, structure.unflatten(shapes))
        is_last = i == len(stages) - 1
        count = 0 if is_last else len(jax.tree.leaves(carry))
        names = ["logits", *(f"stage{i + 1}_{k + 1}" for k in range(count))]
        found = to_onnx(_flat(stage, structure, is_last), inputs, names, name=f"stage{i + 1}")
        models.append(found.model)
        inputs, structure = found.outputs[1:], jax.tree.structure(carry)
    return models


def _flat(stage: Partial, structure: Any, is_last: bool) -> Callable[..., Any]:
    def run(*leaves: jax.Array) -> tuple[Any, ...]:
        carry, logits = stage(structure.unflatten(leaves))
        return (logits,) if is_last else (logits, *jax.tree.leaves(carry))

    return run
