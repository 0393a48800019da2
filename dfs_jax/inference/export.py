"""Exports a run's network to files that need none of this package's training code.

    python -m dfs_jax.inference.export --workdir=DIR --output=DIR2
    python -m dfs_jax.inference.export --workdir=DIR --output=DIR2 --format=onnx [--quantize=int8]

DIR2 receives each stage as StableHLO (any batch size; CPU, CUDA, TPU) or, with `--format=onnx`, as
ONNX for runtimes without jax, the policy, labels and preprocessing: see
`dfs_jax.inference.exported`. The default checkpoint is the one that the policy was fitted on, or
the best if there is no policy.

`--quantize=int8` finds the ranges of activations on validation images, fits the policy again to its
target, on the confidences of the quantised network, and prints accuracies before and after. Without
it no data is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dfs_jax import program
from dfs_jax.costs.flops import exit_costs
from dfs_jax.inference import onnx_models, quantize
from dfs_jax.inference.choose import describe, fit_again
from dfs_jax.inference.export_network import BOTH, FORMATS, export_network, write_network
from dfs_jax.inference.manifest import ONNX, STABLEHLO
from dfs_jax.inference.policy import last_exit_only
from dfs_jax.inference.run_policy import load_with_policy
from dfs_jax.inference.trained import StagedRun
from dfs_jax.paths import input_directory, output_directory
from dfs_jax.tables import aligned
from dfs_jax.types import UserError, check_whole

INT8 = "int8"


def main() -> None:
    """Runs the program."""
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    output = flags.DEFINE_string("output", None, "Directory to write.", required=True)
    checkpoint = flags.DEFINE_string(
        "checkpoint", None, "best, latest or a step number; default: the policy's checkpoint."
    )
    policy = flags.DEFINE_string(
        "policy", None, "Policy file, or none; default: policy.json in workdir."
    )
    data_dir = flags.DEFINE_string("data_dir", None, "Directory of the data, if it has moved.")
    format = flags.DEFINE_enum("format", STABLEHLO, [*FORMATS, BOTH], "Format of the stages.")
    precision = flags.DEFINE_enum("quantize", None, [INT8], "Precision of an ONNX export.")
    examples = flags.DEFINE_integer(
        "calibration_examples", 256, "Number of validation images for the ranges of activations."
    )
    bits = flags.DEFINE_integer("weight_bits", 7, "Bits of a weight: 7, or 8 for CPUs with VNNI.")

    def run() -> None:
        program.use_compilation_cache()
        source, target = (
            input_directory(workdir.value, "--workdir"),
            output_directory(output.value, "--output"),
        )
        options = {
            "checkpoint": checkpoint.value,
            "policy": policy.value,
            "data_dir": data_dir.value,
        }
        if precision.value is None:
            for flag in (examples, bits):
                if flag.present:
                    raise UserError(f"--{flag.name} takes --quantize=int8")
            formats = [*FORMATS] if format.value == BOTH else [format.value]
            files = export_run(source, target, formats=formats, **options)
        elif format.value != ONNX:
            raise UserError(f"--quantize={precision.value} takes --format={ONNX}")
        else:
            files = export_int8(
                source, target, examples=examples.value, weight_bits=bits.value, **options
            )
        program.say("".join(f"wrote {path}\n" for path in files).rstrip())

    program.run(run)


def export_run(
    workdir: Path,
    output: Path,
    *,
    checkpoint: str | None = None,
    policy: str | Path | None = None,
    data_dir: str | None = None,
    formats: Sequence[str] = (STABLEHLO,),
) -> tuple[Path, ...]:
    """Exports a checkpoint of a run and returns the files.

    Args:
      workdir: directory of the run.
      output: directory to write.
      checkpoint: "best", "latest" or a step number; None for the one that the policy was fitted
        on, or the best without a policy.
      policy: policy file; None for `policy.json` in `workdir`. Without one, or with "none", only
        the last exit answers.
      data_dir: directory of the data, if it has moved.
      formats: "stablehlo", "onnx", or both.

    Raises:
      UserError: no run, no such checkpoint, or a policy that cannot be read or was fitted on
        another network, step or data.
    """
    staged, chosen = load_with_policy(
        workdir, policy=policy, checkpoint=checkpoint, data_dir=data_dir
    )
    return export_network(
        output,
        staged.stages,
        staged.example,
        labels=staged.experiment.dataset.class_names,
        policy=chosen,
        about=_about(staged),
        formats=formats,
    )


def export_int8(
    workdir: Path,
    output: Path,
    *,
    examples: int = 256,
    weight_bits: int = 7,
    checkpoint: str | None = None,
    policy: str | Path | None = None,
    data_dir: str | None = None,
) -> tuple[Path, ...]:
    """Exports a checkpoint of a run as ONNX in int8, with its policy fitted again.

    Args:
      workdir: directory of the run.
      output: directory to write.
      examples: number of validation images that activations are calibrated on.
      weight_bits: bits of a weight, 7, or 8 for processors with VNNI.
      checkpoint, policy, data_dir: as in `export_run`.

    Returns:
      The files. The accuracy of each exit before and after is printed.

    Raises:
      UserError: as in `export_run`, or a policy without a record of its target.
    """
    check_whole("calibration_examples", examples)
    quantize.check_weight_bits(weight_bits)
    staged, chosen = load_with_policy(
        workdir, policy=policy, checkpoint=checkpoint, data_dir=data_dir
    )
    contents, about = onnx_models.written(staged.stages, staged.example)
    images = staged.images(staged.experiment.score_split, examples)
    contents, about = quantize.quantized(contents, about, images, weight_bits=weight_bits)
    about["calibration_examples"] = len(images)
    int8 = staged._replace(stages=quantize.opened(contents, about))
    program.say(compared(staged, int8))
    fitted = None if chosen is None else fit_again(int8, chosen)
    if fitted is not None:
        program.say(f"policy fitted again; {describe(int8, fitted)}")
    classes = staged.experiment.dataset.class_names
    return write_network(
        output,
        contents,
        {ONNX: about},
        staged.example,
        classes=len(classes),
        labels=classes,
        policy=last_exit_only(len(int8.stages)) if fitted is None else fitted.policy,
        about=_about(staged),
    )


def compared(before: StagedRun, after: StagedRun) -> str:
    """Returns a table of each exit's accuracy on the test split, in float32 and in int8."""
    found = []
    for staged in (before, after):
        logits, labels = staged.logits("test")
        found.append(100 * np.mean(logits.argmax(axis=-1) == labels, axis=1))
    rows = [
        (str(k + 1), f"{a:.2f} %", f"{b:.2f} %", f"{b - a:+.2f}")
        for k, (a, b) in enumerate(zip(*found, strict=True))
    ]
    return aligned([("exit", "float32", "int8", "points"), *rows])


def _about(staged: StagedRun) -> dict[str, Any]:
    costs = exit_costs(staged.experiment.model, staged.experiment.dataset.image_shape)
    return {**staged.about(), "exits": [{"exit": c.exit, "macs": c.macs} for c in costs]}


if __name__ == "__main__":
    main()
