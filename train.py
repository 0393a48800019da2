"""Trains a multi-exit network: python train.py --config=configs/cifar100_vgg7.py [--workdir=DIR]

--dry_run compiles the training step without data and prints its costs.
"""

import signal
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from configs.common import RUN
from dfs_jax import launch, program
from dfs_jax.output import CLOSED_PIPE_STATUS
from dfs_jax.paths import output_directory, output_file
from dfs_jax.training.sections import define_config_flag, describe_config
from dfs_jax.types import UserError

CONFIG = define_config_flag("Configuration of the run: FILE.py or FILE.py:METHOD.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; default: runs/NAME[_METHOD] of the config."
)
ACCEPT_DATA_CHANGES = flags.DEFINE_bool(
    "accept_data_changes",
    False,
    "Continue with changed data; normalisation and held-out images stay those of the run.",
)
HELP_CONFIG = flags.DEFINE_bool("help_config", False, "Print every field of the config and exit.")
LAUNCH = launch.define_flags()
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Compile the training step without data and print its costs."
)
DEVICES = flags.DEFINE_integer("devices", None, "Dry run: number of simulated CPU devices.")
TOPOLOGY = flags.DEFINE_string("topology", None, "Dry run: TPU slice, such as v5e:4x4.")
OUTPUT = flags.DEFINE_string("output", None, "Dry run: JSON file to write.")


def main() -> int | None:
    if HELP_CONFIG.value:
        return program.say(
            describe_config(CONFIG.value, {name: doc for name, (_, doc) in RUN.items()})
        )
    if DRY_RUN.value:
        return dry_run()
    for flag in (DEVICES, TOPOLOGY, OUTPUT):
        if flag.present:
            raise UserError(f"--{flag.name} is for a dry run: add --dry_run or leave it out")
    return train_and_report()


def dry_run() -> None:
    if LAUNCH() is not None:
        raise UserError("a dry run is one process, whatever it compiles for: start it alone")
    from dfs_jax.reports.dry_run import run_dry

    output = None if OUTPUT.value is None else output_file(OUTPUT.value, "--output")
    run_dry(CONFIG.value, devices=DEVICES.value, topology=TOPOLOGY.value, output=output)


def train_and_report() -> int | None:
    default = Path("runs") / _config_name()
    workdir = output_directory(default if WORKDIR.value is None else WORKDIR.value, "--workdir")
    launched = LAUNCH()
    program.use_compilation_cache()
    from dfs_jax.reports.run_report import report_run
    from dfs_jax.training.loop import train
    from dfs_jax.training.processes import joined

    with joined(launched):
        result = train(CONFIG.value, workdir, accept_data_changes=ACCEPT_DATA_CHANGES.value)
        if result.stopped_by == signal.SIGPIPE:
            return CLOSED_PIPE_STATUS
        if result.stopped_by is not None:
            program.say(f"stopped after step {result.step}: the same command continues")
        else:
            report_run(workdir, experiment=result.experiment)


def _config_name() -> str:
    """Returns the config file's name without its ending, with the method after its colon."""
    file, _, method = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return f"{Path(file).stem}_{method}" if method else Path(file).stem


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    program.run(main)
