"""An exported network: its stages, weights, policy, labels and preprocessing.

    model.json           labels, preprocessing, origin, and a checksum of every other file
    policy.json          see `dfs_jax.inference.policy`

As StableHLO, for programs with jax:

    stage1.stablehlo ... `jax.export`, any batch size, for CPU, CUDA and TPU
    weights.safetensors  weights by the model's own names, `params/block1/conv/kernel`

As ONNX, for ONNX Runtime and what else reads it:

    stage1.onnx ...      `(carry) -> (logits, carry)`, any batch size; the first takes images
    network.onnx         the whole network with its last head alone

Loading StableHLO needs jax, numpy and safetensors, loading ONNX numpy and onnxruntime.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.inference import policy as policies
from dfs_jax.inference.manifest import ONNX, STABLEHLO, Manifest
from dfs_jax.inference.onnx_stages import OnnxStage, OnnxStages
from dfs_jax.inference.policy import Policy, read_policy
from dfs_jax.inference.predictor import EarlyExitPredictor
from dfs_jax.paths import local_path
from dfs_jax.types import ArrayShape, Example, UserError


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

    stages: Sequence[Any]
    example: Example
    policy: Policy
    labels: tuple[str, ...]
    image_size: int | None
    manifest: Mapping[str, Any]

    def predictor(self, policy: Policy | None = None, **options: Any) -> EarlyExitPredictor:
        """Returns a predictor; `policy` replaces the exported one."""
        return EarlyExitPredictor(self.stages, self.example, policy or self.policy, **options)


def load_exported(
    directory: str | Path,
    *,
    format: str | None = None,
    providers: Sequence[str] | None = None,
    share_threads: bool = False,
) -> ExportedNetwork:
    """Reads a network written by `python -m dfs_jax.inference.export`.

    Args:
      directory: directory of the export.
      format: "stablehlo" or "onnx"; None for the one that there is, or of both, ONNX where
        onnxruntime is installed.
      providers: execution providers of ONNX Runtime, such as `["CUDAExecutionProvider"]`; None for
        the CPU.
      share_threads: for ONNX, whether all stages share one pool of threads, which is faster, but
        which every other session of ONNX Runtime in this process then has to share too.

    Raises:
      UserError: a file is missing or damaged, or has a version that this program does not know, or
        the export does not have this format.

    Example (not run):
      network = load_exported("exported")
      for prediction in network.predictor().stream(batches_of_uint8_images):
          print(network.labels[prediction.predicted], prediction.exit_index)
    """
    manifest = Manifest(local_path(directory, "directory"))
    if _format(manifest, format) == ONNX:
        stages, example = _read_onnx(manifest, providers, share_threads)
    elif providers is not None:
        raise UserError(
            f"providers={list(providers)!r} are ONNX Runtime's, this export is StableHLO: "
            f'JAX_PLATFORMS chooses its device, format="onnx" another format'
        )
    else:
        from dfs_jax.inference import stablehlo

        stages, example = stablehlo.read(manifest)
    height, width = example.shape[:2] if len(example.shape) == 3 else (None, 0)
    return ExportedNetwork(
        stages=stages,
        example=example,
        policy=read_policy(manifest.path.parent / policies.FILE),
        labels=tuple(manifest.content["labels"]),
        image_size=height if height == width else None,
        manifest=manifest.content,
    )


def _format(manifest: Manifest, wanted: str | None) -> str:
    if wanted not in (None, ONNX, STABLEHLO):
        raise UserError(f"format must be {STABLEHLO!r} or {ONNX!r}, got {wanted!r}")
    there = [name for name in (ONNX, STABLEHLO) if name in manifest.formats]
    if wanted is None and there:
        has_runtime = importlib.util.find_spec("onnxruntime") is not None
        return there[0] if has_runtime else there[-1]
    if wanted not in there:
        raise UserError(
            f"{manifest.path.parent} holds {', '.join(there) or 'no known format'}, not {wanted}: "
            f"export again with --format={wanted or STABLEHLO}"
        )
    return wanted


def _read_onnx(
    manifest: Manifest, providers: Sequence[str] | None, share_threads: bool
) -> tuple[OnnxStages, ArrayShape]:
    form, image = manifest.formats[ONNX], manifest.content["image"]

    def stage(name: str) -> OnnxStage:
        try:
            return OnnxStage(manifest.file(name), providers, share_threads=share_threads)
        except UserError as error:
            raise UserError(f"{manifest.path.parent / name}: {error}") from error

    stages = OnnxStages(
        [stage(entry["file"]) for entry in form["stages"]],
        whole=stage(form["whole"]) if "whole" in form else None,
        fingerprint=form.get("fingerprint"),
    )
    return stages, ArrayShape(tuple(image["shape"]), np.dtype(image["dtype"]))
