"""Writes a run's network as files that run without this package's training code.

    python -m dfs_jax.inference.export --workdir=DIR --output=DIR2

DIR2 then holds each stage as StableHLO (any batch size; CPU, CUDA, TPU), the weights, the policy,
labels and preprocessing: see `dfs_jax.inference.exported`.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from dfs_jax import program
from dfs_jax.analysis.flops import exit_costs
from dfs_jax.inference import policy as policies
from dfs_jax.inference.exported import export_network
from dfs_jax.inference.policy import Policy, read_policy
from dfs_jax.paths import input_directory, input_file, output_directory
from dfs_jax.training.staged import load_staged


def main() -> None:
    """Runs the program."""
    workdir = flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
    output = flags.DEFINE_string("output", None, "The directory to write.", required=True)
    checkpoint = flags.DEFINE_string("checkpoint", "best", "best, latest or a step's number.")
    policy = flags.DEFINE_string("policy", None, "When to stop; policy.json in the workdir.")
    data_dir = flags.DEFINE_string("data_dir", None, "Where the data lies now, if it has moved.")

    def run() -> None:
        program.use_compilation_cache()
        files = export_run(
            input_directory(workdir.value, "--workdir"),
            output_directory(output.value, "--output"),
            checkpoint=checkpoint.value,
            policy=None if policy.value is None else input_file(policy.value, "--policy"),
            data_dir=data_dir.value,
        )
        program.say("".join(f"wrote {path}\n" for path in files).rstrip())

    program.run(run)


def export_run(
    workdir: Path,
    output: Path,
    *,
    checkpoint: str = "best",
    policy: Path | None = None,
    data_dir: str | None = None,
) -> tuple[Path, ...]:
    """Exports a checkpoint of a run; returns the files.

    Args:
      workdir: the run's directory.
      output: the directory to write.
      checkpoint: "best", "latest" or a step's number.
      policy: the policy's file; None for the one in `workdir`, and where there is none, for the
        last exit alone.
      data_dir: where the data lies now, if it has moved.

    Raises:
      UserError: no run, no such checkpoint, a policy that cannot be read or is of another network.
    """
    chosen = _policy(workdir, policy)
    staged = load_staged(workdir, checkpoint=checkpoint, data_dir=data_dir)
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
    )


def _policy(workdir: Path, path: Path | None) -> Policy | None:
    if path is not None:
        return read_policy(path)
    own = workdir / policies.FILE
    return read_policy(own) if own.exists() else None


if __name__ == "__main__":
    main()
