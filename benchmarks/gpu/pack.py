"""Prepares the files for a machine without a network.

    python -m benchmarks.gpu.pack --data_dir=DIR --output=packed

Reads a prepared TFDS set, writes it without loss to `--parts` archives that can be read without
TFDS, and downloads the pure-Python wheels that the stages need (`--wheels`). Prints the size of
every file.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from absl import flags

from benchmarks.gpu.data import first_examples
from benchmarks.gpu.packed import pack
from dfs_jax import program
from dfs_jax.data.dataset import RawDataset, check_raw_dataset
from dfs_jax.paths import output_directory
from dfs_jax.types import UserError

_MIB = 2**20


def main() -> None:
    """Runs the program."""
    name = flags.DEFINE_string("name", "cifar100", "TFDS set to pack.")
    data_dir = flags.DEFINE_string("data_dir", None, "Directory of TFDS sets; default: TFDS's own.")
    output = flags.DEFINE_string("output", "packed", "Destination directory.")
    parts = flags.DEFINE_integer("parts", 2, "Number of archives of about equal size.")
    first = flags.DEFINE_integer(
        "first", None, "Number of examples of each split, for a rehearsal; default: all."
    )
    wheels = flags.DEFINE_list("wheels", ["ml_collections"], "Packages whose wheels to download.")

    def run() -> None:
        directory = output_directory(output.value, "--output")
        raw = _read(name.value, data_dir.value)
        if first.value is not None:
            raw = first_examples(raw, first.value, first.value)
        paths = pack(raw, name.value, directory, parts=parts.value)
        paths += [fetch_wheel(package, directory) for package in wheels.value]
        for path in paths:
            program.say(f"{path.stat().st_size / _MIB:8.2f} MiB  {path}")

    program.run(run)


def fetch_wheel(package: str, directory: Path) -> Path:
    """Downloads the wheel of an installed package, in the installed version, and returns its path.

    Raises:
      UserError: the package is not installed, has no pure-Python wheel, or cannot be downloaded.
    """
    try:
        wanted = f"{package}=={metadata.version(package)}"
    except metadata.PackageNotFoundError as error:
        raise UserError(f"the package {package} is not installed: install it first") from error
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(directory), wanted]
    outcome = subprocess.run(command, capture_output=True, text=True)
    stem = wanted.replace("==", "-").replace("-", "_", package.count("-"))
    found = sorted(directory.glob(f"{stem}-*-none-any.whl"))
    if outcome.returncode or not found:
        reason = (outcome.stderr.strip().splitlines() or ["it is not pure Python"])[-1]
        raise UserError(f"no wheel of {wanted} could be fetched: {reason}")
    return found[0]


def _read(name: str, data_dir: str | None) -> RawDataset:
    from dfs_jax.data.tfds_source import load_tfds  # TFDS takes two seconds to import

    return check_raw_dataset(name, load_tfds(name, data_dir=data_dir))


if __name__ == "__main__":
    main()
