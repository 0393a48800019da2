"""An exported network: each stage as StableHLO, the weights, the policy, labels and preprocessing.

    model.json           labels, preprocessing, origin, and a checksum of every other file
    stage1.stablehlo ... `jax.export`, any batch size, for CPU, CUDA and TPU
    weights.safetensors  weights by the model's own names, `params/block1/conv/kernel`
    policy.json          see `dfs_jax.inference.policy`

Loading needs jax, numpy and safetensors: no flax, no data sets, none of the training code. A stage
maps `(weights, carry)` to `(carry, logits)`: weights by name, the carry as a tuple of its arrays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export
from jax.tree_util import Partial

from dfs_jax.files import write_whole
from dfs_jax.inference import policy as policies
from dfs_jax.inference.identity import check_network, named_weights, weight_name
from dfs_jax.inference.policy import Policy, last_exit_only, read_policy
from dfs_jax.inference.predictor import EarlyExitPredictor
from dfs_jax.inference.stages import Stage, check_stages
from dfs_jax.paths import local_path, output_directory, reason
from dfs_jax.types import UserError

VERSION = 1
MANIFEST, WEIGHTS = "model.json", "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")


class ExportedNetwork(NamedTuple):
    """An exported network, as returned by `load_exported`.

    Attributes:
      stages: functions `(carry) -> (carry, logits)`, shallow first; the first takes images.
      example: shape and type of one image.
      policy: early-exit policy.
      labels: names of the classes, in order.
      image_size: side in pixels to which images of other sizes are to be scaled (shorter side, then
        centre crop); None if images are used as they are.
      manifest: content of `model.json`.
    """

    stages: tuple[Stage, ...]
    example: jax.ShapeDtypeStruct
    policy: Policy
    labels: tuple[str, ...]
    image_size: int | None
    manifest: Mapping[str, Any]

    def predictor(self, policy: Policy | None = None, **options: Any) -> EarlyExitPredictor:
        """Returns a predictor; `policy` replaces the exported one."""
        return EarlyExitPredictor(self.stages, self.example, policy or self.policy, **options)


def export_network(
    directory: Path,
    stages: Sequence[Stage],
    example: jax.ShapeDtypeStruct,
    *,
    labels: Sequence[str],
    policy: Policy | None = None,
    about: Mapping[str, Any] | None = None,
) -> tuple[Path, ...]:
    """Writes stages whose weights are leaves (`jax.tree_util.Partial`), as `model_stages` makes.

    Args:
      directory: directory to write, created if missing. The manifest is written last, so that an
        interrupted export over an earlier one is detected.
      stages: stages, shallow first.
      example: shape and type of one image.
      labels: names of the classes.
      policy: early-exit policy; None for the last exit alone.
      about: further content of the manifest, as plain data: where the network comes from, how
        images are prepared.

    Returns:
      The files, the manifest last.

    Raises:
      UserError: stages that do not fit together, a number of labels other than that of the classes,
        a policy of another network, or a file that cannot be written.
    """
    directory = output_directory(directory, "directory")
    classes = check_stages(stages, example)
    if len(labels) != classes:
        raise UserError(f"{classes} classes take {classes} labels, got {len(labels)}")
    policy = last_exit_only(len(stages)) if policy is None else policy
    check_network(policy, stages)
    weights = [named_weights(stage) for stage in stages]
    contents = {WEIGHTS: safetensors.numpy.save({k: v for w in weights for k, v in w.items()})}
    contents[policies.FILE] = policy.to_json().encode()
    for i, program in enumerate(_export_stages(stages, weights, example)):
        contents[f"stage{i + 1}.stablehlo"] = program
    manifest = {
        "version": VERSION,
        "image": {"shape": list(example.shape), "dtype": np.dtype(example.dtype).name},
        "labels": list(labels),
        "stages": [
            {"file": f"stage{i + 1}.stablehlo", "weights": sorted(w)} for i, w in enumerate(weights)
        ],
        "platforms": list(PLATFORMS),
        "jax": jax.__version__,
        "about": dict(about or {}),
        "sha256": {name: _checksum(content) for name, content in contents.items()},
    }
    _remove(directory / MANIFEST)
    contents[MANIFEST] = (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode()
    return tuple(write_whole(directory / name, content) for name, content in contents.items())


def load_exported(directory: str | Path) -> ExportedNetwork:
    """Reads a network written by `export_network` (`python -m dfs_jax.inference.export`).

    Raises:
      UserError: a file is missing or damaged, or has a version that this program does not know.

    Example (not run):
      network = load_exported("exported")
      for prediction in network.predictor().stream(batches_of_uint8_images):
          print(network.labels[prediction.predicted], prediction.exit_index)
    """
    directory = local_path(directory, "directory")
    manifest = _read_manifest(directory)
    for name, checksum in manifest["sha256"].items():
        if _checksum(_read(directory / name)) != checksum:
            raise UserError(f"{directory / name} is damaged or of another export: export again")
    arrays = safetensors.numpy.load(_read(directory / WEIGHTS))
    weights = {name: jnp.asarray(array) for name, array in arrays.items()}
    stages = []
    for i, stage in enumerate(manifest["stages"]):
        program = export.deserialize(bytearray(_read(directory / stage["file"])))
        run = _from_images(program.call) if i == 0 else program.call
        stages.append(Partial(run, {name: weights[name] for name in stage["weights"]}))
    shape = tuple(manifest["image"]["shape"])
    return ExportedNetwork(
        stages=tuple(stages),
        example=jax.ShapeDtypeStruct(shape, np.dtype(manifest["image"]["dtype"])),
        policy=read_policy(directory / policies.FILE),
        labels=tuple(manifest["labels"]),
        image_size=shape[0] if shape[0] == shape[1] else None,
        manifest=manifest,
    )


def _export_stages(
    stages: Sequence[Stage], weights: Sequence[dict[str, np.ndarray]], example: jax.ShapeDtypeStruct
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


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from error


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(
            f"there is no exported network in {directory}: {MANIFEST} is missing; "
            f"python -m dfs_jax.inference.export writes one"
        )
    try:
        manifest = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise UserError(f'{path}: its "version" is {version!r}, this program reads {VERSION}')
    return manifest
