"""Exports a run's network to files that need none of this package's training code.

    python -m dfs_jax.inference.export --workdir=DIR --output=DIR2

DIR2 receives each stage as StableHLO (any batch size; CPU, CUDA, TPU) or, with `--format=onnx`, as
ONNX for runtimes without jax, the weights, the policy, labels and preprocessing: see
`dfs_jax.inference.exported`. The default checkpoint is the one that the policy was fitted on, or
the best if there is no policy. No data is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dfs_jax import program
from dfs_jax.costs.flops import exit_costs
from dfs_jax.inference.export_network import FORMATS, export_network
from dfs_jax.inference.run_policy import load_with_policy
from dfs_jax.paths import input_directory, output_directory

BOTH = "both"


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

    format = flags.DEFINE_enum("format", "stablehlo", [*FORMATS, BOTH], "Format of the stages.")

    def run() -> None:
        program.use_compilation_cache()
        files = export_run(
            input_directory(workdir.value, "--workdir"),
            output_directory(output.value, "--output"),
            checkpoint=checkpoint.value,
            policy=policy.value,
            data_dir=data_dir.value,
            formats=[*FORMATS] if format.value == BOTH else [format.value],
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
    formats: Sequence[str] = ("stablehlo",),
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
    dataset = staged.experiment.dataset
    costs = exit_costs(staged.experiment.model, dataset.image_shape)
    about = {**staged.about(), "exits": [{"exit": c.exit, "macs": c.macs} for c in costs]}
    return export_network(
        output,
        staged.stages,
        staged.example,
        labels=dataset.class_names,
        policy=chosen,
        about=about,
        formats=formats,
    )


if __name__ == "__main__":
    main()
