"""Stages as StableHLO. A stage maps `(weights, carry)` to `(carry, logits)`.

Weights are by name, the carry is a tuple of its arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax import export
from jax.tree_util import Partial

from dfs_jax.inference.manifest import STABLEHLO, Manifest
from dfs_jax.inference.stages import Stage
from dfs_jax.inference.weights import named_weights, weight_name
from dfs_jax.types import Example, UserError

WEIGHTS = "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")


def written(stages: Sequence[Stage], example: Example) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Returns the files by name, and their description for the manifest.

    Args:
      stages: stages whose weights are leaves (`jax.tree_util.Partial`).
      example: shape and type of one image.
    """
    weights = [named_weights(stage) for stage in stages]
    contents = {WEIGHTS: safetensors.numpy.save({k: v for w in weights for k, v in w.items()})}
    described = []
    for i, program in enumerate(_programs(stages, weights, example)):
        contents[f"stage{i + 1}.stablehlo"] = program
        described.append({"file": f"stage{i + 1}.stablehlo", "weights": sorted(weights[i])})
    about = {"stages": described, "platforms": list(PLATFORMS), "jax": jax.__version__}
    return contents, about


def read(manifest: Manifest) -> tuple[tuple[Stage, ...], jax.ShapeDtypeStruct]:
    """Returns the stages of an export, and the shape and type of one image."""
    weights = _weights(manifest)
    stages = []
    for i, stage in enumerate(manifest.formats[STABLEHLO]["stages"]):
        absent = [name for name in stage.get("weights", [None]) if name not in weights]
        if absent:
            raise UserError(f"{manifest.path}: {stage['file']} reads weights that are not there")
        program = _program(manifest, stage["file"])
        run = _from_images(program.call) if i == 0 else program.call
        stages.append(Partial(run, {name: weights[name] for name in stage["weights"]}))
    image = manifest.content["image"]
    return tuple(stages), jax.ShapeDtypeStruct(tuple(image["shape"]), np.dtype(image["dtype"]))


def _weights(manifest: Manifest) -> dict[str, jax.Array]:
    try:
        arrays = safetensors.numpy.load(manifest.file(WEIGHTS))
    except safetensors.SafetensorError as error:
        raise UserError(f"{manifest.path.parent / WEIGHTS} holds no weights: {error}") from error
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def _program(manifest: Manifest, name: str) -> export.Exported:
    try:
        return export.deserialize(bytearray(manifest.file(name)))
    except Exception as error:  # the reader's exceptions share no other base
        path = manifest.path.parent / name
        raise UserError(
            f"{path} is no program that this version of jax reads ({type(error).__name__}): "
            f"export again"
        ) from error


def _programs(
    stages: Sequence[Stage], weights: Sequence[dict[str, np.ndarray]], example: Example
) -> list[bytes]:
    (batch,) = export.symbolic_shape("batch")
    carry: tuple[Any, ...] = (jax.ShapeDtypeStruct((batch, *example.shape), example.dtype),)
    structure = jax.tree.structure(0)
    programs = []
    for stage, named in zip(stages, weights, strict=True):
        shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in named.items()}
        run = jax.jit(_flat(stage, structure))
        programs.append(bytes(export.export(run, platforms=PLATFORMS)(shapes, carry).serialize()))
        following, _ = jax.eval_shape(stage, structure.unflatten(carry))
        structure = jax.tree.structure(following)
        carry = tuple(jax.tree.leaves(following))
    return programs


def _flat(stage: Stage, structure: Any) -> Callable[..., Any]:
    """Returns the stage as a function of named weights and a flat carry, with a flat carry out."""
    leaves = jax.tree_util.tree_flatten_with_path(stage)[0]
    names, whole = [weight_name(path) for path, _ in leaves], jax.tree.structure(stage)

    def run(weights: dict[str, jax.Array], carry: tuple[jax.Array, ...]):
        bound = whole.unflatten([weights[name] for name in names])
        carry, logits = bound(structure.unflatten(carry))
        return tuple(jax.tree.leaves(carry)), logits

    return run


def _from_images(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda weights, images: call(weights, (images,))
