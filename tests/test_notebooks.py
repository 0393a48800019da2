"""The notebooks: tidy as files, right about what they import and install, and they run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from notebooks import install

REPOSITORY = Path(__file__).resolve().parent.parent
DIRECTORY = REPOSITORY / "notebooks"
NOTEBOOKS = ("colab_tpu", "your_own_model")
HOSTED = ("google",)  # what a hosted notebook alone has


def read(name: str) -> dict:
    return json.loads((DIRECTORY / f"{name}.ipynb").read_text(encoding="utf-8"))


def code(name: str) -> dict[str, str]:
    """The source of every code cell, by the cell's id, in order."""
    cells = read(name)["cells"]
    return {c["id"]: "".join(c["source"]) for c in cells if c["cell_type"] == "code"}


def imports(source: str) -> list[tuple[str, str | None]]:
    """What a cell imports, wherever in it: modules, and names from them."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(str(node.module), alias.name) for alias in node.names]
    return found


def test_every_notebook_is_tested():
    assert sorted(path.stem for path in DIRECTORY.glob("*.ipynb")) == sorted(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_cleared_and_metadata_is_tidy(name):
    notebook = read(name)
    assert set(notebook["metadata"]) <= {"accelerator", "colab", "kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags"}
        assert "".join(cell["source"]).strip() == "".join(cell["source"]) != ""
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            assert cell["execution_count"] is None


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_the_notebooks_import_exists(name):
    for source in code(name).values():
        for module, attribute in imports(source):
            top = module.partition(".")[0]
            if top == "dfs_jax" and attribute is not None:
                assert hasattr(importlib.import_module(module), attribute), (module, attribute)
            elif top not in HOSTED:
                assert importlib.util.find_spec(top), module


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_nothing_but_the_install_program_installs(name):
    for source in code(name).values():
        assert "pip" not in source.split()
        assert '"pip"' not in source
    assert any("notebooks/install.py" in source for source in code(name).values())


def starts_a_program(source: str) -> bool:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return any(isinstance(call.func, ast.Name) and call.func.id == "run" for call in calls)


def test_the_device_is_taken_after_the_last_program_has_run():
    """A TPU serves one process: none can be started once the notebook's own has it."""
    cells = list(code("colab_tpu").values())
    starts = [i for i, source in enumerate(cells) if starts_a_program(source)]
    takes = [
        i
        for i, source in enumerate(cells)
        if {"jax", "dfs_jax"} & {module.partition(".")[0] for module, _ in imports(source)}
    ]
    assert len(starts) > 5
    assert max(starts) < min(takes)


def run_function(print_):
    """The hosted notebook's `run`, which shows what programs print by `print_`."""
    cells = code("colab_tpu")
    names = {"print": print_, "os": os, "subprocess": subprocess, "sys": sys}
    exec(cells["run"], names)
    return names["run"]


def test_a_program_that_fails_stops_the_notebook():
    lines = []
    run = run_function(lambda *words, **_: lines.append(words[-1]))
    with pytest.raises(RuntimeError, match="ended with status 3"):
        run("-c", "import sys; print('said'); sys.exit(3)")
    assert lines[-1] == "said\n"


WAITS = """
import signal, time
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
print("ready", flush=True)
while not seen:
    time.sleep(0.01)
time.sleep(0.05)
print("saved after", len(seen), flush=True)
"""


def test_an_interrupt_reaches_the_program_once_and_is_waited_for():
    lines = []

    def print_(*words, **_):
        lines.append(words[-1])
        if words[-1] == "ready\n":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_function(print_)("-c", WAITS)
    assert lines[-1] == "saved after 1\n"


INSTALLED = {"jax": "0.7.2", "jax-cuda12-plugin": "0.7.2", "numpy": "2.0.2", "flax": "0.11.2"}


def test_what_is_missing_or_too_old_is_installed_and_jax_is_a_constraint():
    asked = [Requirement(text) for text in ("jax>=0.7", "flax>=0.12", "numpy", "ML_Collections")]
    assert install.missing_requirements(asked, INSTALLED) == ["flax>=0.12", "ML_Collections"]
    kept = ["jax==0.7.2", "jax-cuda12-plugin==0.7.2", "numpy==2.0.2"]
    assert install.constraints(INSTALLED) == kept


@pytest.mark.parametrize("there", ["0.5.3", None])
def test_a_jax_that_is_too_old_or_absent_is_told_and_never_installed(there):
    installed = {} if there is None else {"jax": there}
    with pytest.raises(ValueError, match=rf"needs jax>=0\.7, and here is {there or 'none'}"):
        install.missing_requirements([Requirement("jax>=0.7")], installed)


def test_the_requirements_are_read_for_this_machine():
    names = [one.name for one in install.read_requirements(["requirements.txt"])]
    assert {"jax", "flax", "array_record"} <= set(names)
    tensorflow = install.read_requirements(["requirements-prepare.txt"])
    assert len(tensorflow) == 1  # of two lines for different machines


def test_where_everything_is_installed_nothing_is_done(monkeypatch, capsys):
    monkeypatch.setattr(install, "_pip", lambda *a: pytest.fail("it installed something"))
    assert install.main([]) == 0
    assert capsys.readouterr().out.startswith("everything is there; jax stays ")


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outside_a_clone_the_repository_is_cloned_once(name, tmp_path):
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("needs git and a git repository")
    cell = f"REPOSITORY = {str(REPOSITORY)!r}\n{code(name)['clone']}\nprint(root, Path.cwd())"
    for _ in range(2):  # the second time, as after a restart of the session, it is there
        program = subprocess.run(
            [sys.executable, "-c", cell], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert program.stdout.split() == [str(tmp_path / "dfs_jax")] * 2
    assert (tmp_path / "dfs_jax" / "train.py").is_file()


def execute(name: str, settings: str, monkeypatch) -> dict[str, list]:
    """Runs a notebook with `settings` behind its own, and returns each cell's outputs."""
    nbformat = pytest.importorskip("nbformat", reason="running notebooks needs nbformat")
    nbclient = pytest.importorskip("nbclient", reason="running notebooks needs nbclient")
    pytest.importorskip("ipykernel", reason="running notebooks needs ipykernel")
    # What the kernel and the programs that it starts shall see: this clone, and the tests' cache.
    search = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", search)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "tests"))
    notebook = nbformat.read(DIRECTORY / f"{name}.ipynb", 4)
    (place,) = (
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())
    )
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(settings))
    where = {"metadata": {"path": str(DIRECTORY)}}
    nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=1500, resources=where
    ).execute()
    return {cell.id: cell.get("outputs", []) for cell in notebook.cells}


def printed(outputs: list) -> str:
    return "".join(o["text"] for o in outputs if o["output_type"] == "stream")


def has_picture(outputs: list) -> bool:
    return any("image/png" in output.get("data", ()) for output in outputs)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("default")
def test_the_own_model_runs(monkeypatch):
    outputs = execute("your_own_model", "SMALL = True", monkeypatch)
    for cell in ("accuracy-figure", "gradients-figure", "gallery", "budget-figure"):
        assert has_picture(outputs[cell]), cell
    # Of 4 blocks of 8 filters: exit k trains half of those below, and half of its own block's.
    assert "exit 1: 4, exit 2: 8, exit 3: 12, exit 4: 20" in printed(outputs["facts"])
    assert "answered by exits 1 to 4" in printed(outputs["predict"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("default")
def test_the_hosted_notebook_runs_from_install_to_export(monkeypatch, tmp_path):
    settings = f"SMALL = True\nRUN = {str(tmp_path / 'run')!r}"
    outputs = execute("colab_tpu", settings, monkeypatch)
    assert "mesh: {'data': 1, 'fsdp': 1, 'tensor': 1}" in printed(outputs["devices"])
    assert "epoch 2/2" in printed(outputs["train"])
    for cell in ("over-time", "curve", "benchmark", "gallery"):
        assert has_picture(outputs[cell]), cell
    for file in ("report.json", "policy.json", "benchmark.json", "exported/model.json"):
        assert (tmp_path / "run" / file).is_file(), file
    assert "test images" in printed(outputs["answers"])
    assert ", exit " in printed(outputs["files"])
