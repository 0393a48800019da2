"""Trains a multi-exit network: python train.py --config=configs/cifar100_vgg7.py [--workdir=DIR]"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from dfs_jax import launch, program

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The run's configuration: FILE.py or FILE.py:METHOD."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory; runs/NAME[_METHOD] of the config."
)
LAUNCH = launch.define_flags()


def main() -> None:
    launched = LAUNCH()
    program.use_compilation_cache()
    from dfs_jax.analysis.run_report import report_run
    from dfs_jax.training.loop import train
    from dfs_jax.training.processes import joined

    workdir = Path(WORKDIR.value or Path("runs") / _config_name()).absolute()
    with joined(launched):
        result = train(CONFIG.value, workdir)
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
