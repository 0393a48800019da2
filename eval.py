"""Evaluates a run: python eval.py --workdir=DIR [--split=test] [--checkpoint=best]"""

from absl import flags

from dfs_jax import launch, program
from dfs_jax.paths import input_directory, output_directory, output_file

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
SPLIT = flags.DEFINE_string("split", "test", "Split to report: test, validation or train.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best, latest or a step number.")
OUTPUT = flags.DEFINE_string("output", None, "Report file; default: report.json in workdir.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Directory of the data, if it has moved.")
LAUNCH = launch.define_flags()


def main() -> None:
    workdir = input_directory(WORKDIR.value, "--workdir")
    if OUTPUT.value is None:
        output_directory(workdir, "--workdir")
        output = None
    else:
        output = output_file(OUTPUT.value, "--output", inside="report.json")
    launched = LAUNCH()
    program.use_compilation_cache()
    from dfs_jax.reports.run_report import report_run
    from dfs_jax.training.experiment import rebuild_experiment
    from dfs_jax.training.processes import joined

    with joined(launched):
        report_run(
            workdir,
            experiment=rebuild_experiment(workdir, data_dir=DATA_DIR.value),
            split=SPLIT.value,
            checkpoint=CHECKPOINT.value,
            output=output,
        )


if __name__ == "__main__":
    program.run(main)
