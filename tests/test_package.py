"""The package as `pip install dfs-jax` gives it: public names, what they need, what extras add."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dfs_jax
from dfs_jax import extras, guard

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
WITHOUT_EXTRAS = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(extras.EXTRAS)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def requirements(name):
    lines = (line.partition(" #")[0].strip() for line in (REPOSITORY / name).open())
    return {line for line in lines if line and not line.startswith("#")}


def in_python(source):
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, cwd=REPOSITORY, timeout=120
    )


def test_requirements_are_the_package_and_its_extras():
    optional = PROJECT["optional-dependencies"]
    assert optional["all"] == ["dfs-jax[train,data,plots,onnx]"]
    extras_listed = (optional[name] for name in ("train", "data", "plots", "onnx"))
    listed = {*PROJECT["dependencies"], *itertools.chain(*extras_listed)}
    assert requirements("requirements.txt") == listed
    assert requirements("requirements-prepare.txt") == set(optional["prepare"][1:])


def test_every_extra_that_a_message_names_exists():
    assert set(extras.EXTRAS.values()) <= set(PROJECT["optional-dependencies"])


def test_importing_the_package_imports_no_jax():
    found = in_python("import dfs_jax, sys; assert not {'jax', 'flax', 'numpy'} & set(sys.modules)")
    assert found.returncode == 0, found.stderr


def test_public_names_need_no_extra():
    names = ", ".join(dfs_jax.__all__)
    use = "create_model('vgg7', num_classes=3, width=2)"
    found = in_python(f"{WITHOUT_EXTRAS}\nfrom dfs_jax import {names}\n{use}")
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("module", "extra"), [("dfs_jax.data", "data"), ("dfs_jax.training", "train")]
)
def test_a_room_that_needs_an_extra_says_which(module, extra):
    found = in_python(f"{WITHOUT_EXTRAS}\nimport {module}")
    assert found.returncode == 1
    assert f"pip install 'dfs-jax[{extra}]'" in found.stderr.splitlines()[-1]


def test_a_program_that_needs_an_extra_ends_with_a_sentence(capsys):
    def draw():
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.axes")

    assert guard.guarded(draw) == guard.USAGE_STATUS
    error = capsys.readouterr().err
    assert error == "error: matplotlib is not installed: pip install 'dfs-jax[plots]'\n"


def test_a_module_that_is_no_extra_keeps_its_traceback():
    def broken():
        raise ModuleNotFoundError("No module named 'mine'", name="mine")

    with pytest.raises(ModuleNotFoundError, match="mine"):
        guard.guarded(broken)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dfs_jax.nonsense
    assert set(dfs_jax.__all__) <= set(dir(dfs_jax))
    assert all(getattr(dfs_jax, name).__name__ == name for name in dfs_jax.__all__)
