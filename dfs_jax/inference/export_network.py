"""Writes a network in the formats that `load_exported` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfs_jax.inference import onnx_models, stablehlo
from dfs_jax.inference import policy as policies
from dfs_jax.inference.identity import check_network
from dfs_jax.inference.manifest import ONNX, STABLEHLO, write_export
from dfs_jax.inference.policy import Policy, last_exit_only
from dfs_jax.inference.stages import Stage, check_stages
from dfs_jax.paths import output_directory
from dfs_jax.types import Example, UserError

FORMATS = {STABLEHLO: stablehlo.written, ONNX: onnx_models.written}
BOTH = "both"


def export_network(
    directory: Path,
    stages: Sequence[Stage],
    example: Example,
    *,
    labels: Sequence[str],
    policy: Policy | None = None,
    about: Mapping[str, Any] | None = None,
    formats: Sequence[str] = (STABLEHLO,),
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
      formats: "stablehlo", "onnx", or both.

    Returns:
      The files, the manifest last.

    Raises:
      UserError: stages that do not fit together, a number of labels other than that of the classes,
        a policy of another network, an operation that the format lacks, or a file that cannot be
        written.
    """
    classes = check_stages(stages, example)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UserError(f"formats must be some of {', '.join(FORMATS)}, got {list(formats)}")
    policy = last_exit_only(len(stages)) if policy is None else policy
    check_network(policy, stages)
    contents, described = {}, {}
    for name in formats:
        files, described[name] = FORMATS[name](stages, example)
        contents |= files
    return write_network(
        directory,
        contents,
        described,
        example,
        classes=classes,
        labels=labels,
        policy=policy,
        about=about,
    )


def write_network(
    directory: Path,
    contents: Mapping[str, bytes],
    described: Mapping[str, Any],
    example: Example,
    *,
    classes: int,
    labels: Sequence[str],
    policy: Policy,
    about: Mapping[str, Any] | None = None,
) -> tuple[Path, ...]:
    """Writes stages that are files already, with policy, labels and manifest.

    Args:
      directory: directory to write.
      contents: content of each file of a stage, by name.
      described: description of each format for the manifest.
      example: shape and type of one image.
      classes: number of classes.
      labels: names of the classes.
      policy: early-exit policy.
      about: further content of the manifest.
    """
    directory = output_directory(directory, "directory")
    if len(labels) != classes:
        raise UserError(f"{classes} classes take {classes} labels, got {len(labels)}")
    contents = {policies.FILE: policy.to_json().encode(), **contents}
    manifest = {
        "image": {"shape": list(example.shape), "dtype": np.dtype(example.dtype).name},
        "labels": list(labels),
        "formats": dict(described),
        "about": dict(about or {}),
    }
    return write_export(directory, contents, manifest)
