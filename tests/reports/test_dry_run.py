"""Dry runs: of what is at hand, of forced devices, of a TPU, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dfs_jax.costs.chips import CHIPS
from dfs_jax.reports import dry_run as module
from dfs_jax.reports.dry_run import dry_run, forced_devices, run_dry, topology_devices
from dfs_jax.reports.dry_run_report import report, table_for_terminal
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config

REPOSITORY = Path(__file__).resolve().parents[2]
CIFAR = {"data.name": "cifar100", "data.validation_examples": None, "batch_size": 4}


@pytest.fixture(scope="module")
def found():
    config = tiny_config(**{**CIFAR, "model.name": "tests.support.mesh_cases:SMALL_VGG"})
    return dry_run(config, jax.devices())


def test_a_set_that_is_not_there_is_compiled_for(found):
    assert (found.num_devices, found.device_kind, found.devices_per_chip) == (1, "cpu", 1)
    assert found.collectives == []
    # Kernels of a CPU need fewer multiplications than the definition; XLA counts additions, too.
    assert 0 < found.operations.product_flops <= found.counted_flops * 1.01
    assert found.memory.arguments > 4 * 32 * 32 * 3
    assert 0 < found.memory.donated <= found.memory.arguments


def test_report_is_json_with_every_chip(found):
    data = json.loads(json.dumps(report(found), allow_nan=False))
    assert list(data["chips"]) == list(CHIPS)
    chip = data["chips"]["v5e"]
    longest = max(chip["products_s"], chip["memory_s"], chip["links_s"])
    assert chip["step_s"] == longest == chip[f"{chip['bound_by']}_s"]
    assert chip["images_per_second"] == pytest.approx(4 / longest)
    assert chip["fits"]
    assert data["memory"]["total"] == found.memory.total
    assert data["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}


def test_table(found):
    text = table_for_terminal(found)
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["total"][-1] == f"{found.memory.total / 2**20:,.1f}"
    assert lines["FLOPs of products, as defined"][-1] == f"{found.counted_flops / 1e9:,.3f}"
    assert lines["collectives: none"]
    times = found.on_chip(CHIPS["H100"])
    assert lines["H100"][4:] == [f"{1e3 * times.step_s:,.3f}", f"{4 / times.step_s:,.0f}", "fits"]


def test_two_devices_in_a_chip_have_half_of_it_each(found):
    halved = found._replace(devices_per_chip=2)
    chip = CHIPS["v4"]
    assert halved.on_chip(chip).step_s == pytest.approx(2 * found.on_chip(chip).step_s)
    large = found.memory._replace(temporaries=int(0.6 * chip.memory_bytes))
    assert found._replace(memory=large).fits(chip)
    assert not halved._replace(memory=large).fits(chip)
    assert "too little" in table_for_terminal(halved._replace(memory=large))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 8, "topology": "v5e:4x4"}, "devices=8 and topology=v5e:4x4 exclude each"),
        ({"devices": 0}, "devices must be a whole number of at least 1, got 0"),
        ({"devices": 3}, "devices=3 cannot be forced, jax has started with 1"),
    ],
)
def test_devices_that_cannot_be(options, message):
    jax.devices()  # started
    with pytest.raises(UserError, match=message):
        run_dry(tiny_config(**CIFAR), **options)


def test_devices_that_are_there_are_taken():
    assert forced_devices(len(jax.devices())) == jax.devices()


def test_a_batch_that_devices_cannot_divide():
    config = tiny_config(**{**CIFAR, "accumulate_steps": 3})
    with pytest.raises(UserError, match="batch_size 4 cannot be divided"):
        dry_run(config, jax.devices())


def test_a_topology_needs_the_tpus_compiler(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'v5e:4x4 needs .* libtpu: run pip install "jax\[tpu\]=='):
        topology_devices("v5e:4x4")


def test_a_step_that_does_not_fit_is_told(monkeypatch):
    class Step:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20G of 16G hbm\nlong story")

    monkeypatch.setattr(module, "training_step", lambda experiment: Step())
    with pytest.raises(UserError, match=r"does not fit .* 20G of 16G hbm\): take a larger mesh"):
        dry_run(tiny_config(**CIFAR), jax.devices())


def run(*arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "tests"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    options = {f"--config.{name}={value}" for name, value in CIFAR.items() if value is not None}
    result = subprocess.run(
        [sys.executable, "train.py", "--config=configs/common.py", *options, *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


SMALL = ("--config.model.name=tests.support.mesh_cases:SMALL_VGG", "--config.model.width=2")


def test_train_compiles_for_forced_devices(tmp_path):
    output = tmp_path / "cost.json"
    status, out, err = run("--dry_run", "--devices=4", f"--output={output}", *SMALL)
    assert status == 0, err
    assert "compiled for 4 x cpu: data=4 x fsdp=1 x tensor=1" in out
    assert f"wrote {output}" in out
    (reduced,) = json.loads(output.read_text())["collectives"]
    assert (reduced["kind"], reduced["devices"]) == ("all-reduce", 4)
    assert not list(tmp_path.glob("checkpoints"))


def test_train_knows_these_flags_of_dry_runs_alone():
    status, _, err = run("--devices=4")
    assert (status, err) == (
        2,
        "error: --devices is for a dry run: add --dry_run or leave it out\n",
    )


@pytest.mark.slow
def test_train_compiles_for_a_tpu_that_is_not_there(tmp_path):
    pytest.importorskip("libtpu")
    output = tmp_path / "cost.json"
    combined = ("--config.gradients.name=pcgrad", *SMALL)
    status, out, err = run("--dry_run", "--topology=v5e:2x2", f"--output={output}", *combined)
    assert status == 0, err
    assert "compiled for 4 x TPU v5 lite: data=4" in out
    data = json.loads(output.read_text())
    assert data["counted_flops"] is None
    assert data["operations"]["product_flops"] > 0
    assert data["chips"]["v5e"]["fits"]


@pytest.mark.slow
def test_topologies_that_no_tpu_has():
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match=r"topology=v5e:3x3 is not a slice .* such as v5e:4x4"):
        topology_devices("v5e:3x3")
