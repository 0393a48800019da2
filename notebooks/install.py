"""Installs what a notebook's environment lacks of this project, and leaves its jax alone.

    python notebooks/install.py            what training, reports and inference need
    python notebooks/install.py --prepare  TensorFlow too, where there is none: for preparing data
    python notebooks/install.py equinox    other packages too, by their requirements

The jax of a hosted notebook is the one that fits its TPU or GPU, and numpy is already loaded: both
are constraints of every installation here, never a part of it. Requirements that are met stay as
they are, so where everything is installed nothing is done.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "dfs-jax"
KEPT = ("jax", "jaxlib", "libtpu", "numpy")  # and jax's plugins, jax-cuda12-plugin and the like


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python notebooks/install.py", description=__doc__)
    parser.add_argument("--prepare", action="store_true", help="TensorFlow too, if there is none")
    parser.add_argument("requirements", nargs="*", type=Requirement, help="other packages")
    given = parser.parse_args(arguments)
    installed = installed_versions()
    files = ["requirements.txt"]
    if given.prepare and importlib.util.find_spec("tensorflow") is None:
        files.append("requirements-prepare.txt")
    try:
        asked = [*read_requirements(files), *given.requirements]
        missing = missing_requirements(asked, installed)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if missing:
        _say(f"installing {', '.join(missing)}")
        _pip(missing, constraints(installed))
    if PACKAGE not in installed:
        _say(f"installing {PACKAGE} from {REPOSITORY}")
        _pip(["--no-deps", "--editable", str(REPOSITORY)], constraints(installed))
    _say(f"everything is there; jax stays {installed['jax']}")
    return 0


def installed_versions() -> dict[str, str]:
    """Returns the version of every installed package, by its canonical name."""
    found = importlib.metadata.distributions()
    return {canonicalize_name(package.metadata["Name"]): package.version for package in found}


def read_requirements(files: Iterable[str]) -> list[Requirement]:
    """Returns what the repository's requirements files ask of this machine."""
    lines = [line for name in files for line in (REPOSITORY / name).read_text().splitlines()]
    texts = [line.partition("#")[0].strip() for line in lines]
    requirements = [Requirement(text) for text in texts if text]
    return [one for one in requirements if one.marker is None or one.marker.evaluate()]


def missing_requirements(
    requirements: Iterable[Requirement], installed: Mapping[str, str]
) -> list[str]:
    """Returns the requirements that are not met and may be installed.

    Raises:
      ValueError: a package that is kept as it is does not meet its requirement.
    """
    missing = []
    for one in requirements:
        version = installed.get(canonicalize_name(one.name))
        if version is not None and one.specifier.contains(version, prereleases=True):
            continue
        if is_kept(one.name):
            raise ValueError(
                f"this project needs {one}, and here is {version or 'none'}: choose a newer "
                f"runtime version of the hosted notebook, or install {one.name} yourself"
            )
        missing.append(f"{one.name}{one.specifier}")
    return missing


def constraints(installed: Mapping[str, str]) -> list[str]:
    """Returns the constraints that keep what belongs to the machine as it is."""
    return [f"{name}=={version}" for name, version in installed.items() if is_kept(name)]


def is_kept(name: str) -> bool:
    """Returns whether a package is never installed, upgraded or replaced."""
    return canonicalize_name(name) in KEPT or canonicalize_name(name).startswith("jax-")


def _pip(arguments: Sequence[str], limits: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "constraints.txt"
        path.write_text("\n".join(limits))
        command = [sys.executable, "-m", "pip", "install", "--quiet", f"--constraint={path}"]
        subprocess.run([*command, *arguments], check=True)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
