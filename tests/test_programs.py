"""train.py and eval.py as a user runs them: killed, stopped, mistyped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PICTURES = ("accuracy_over_time.png", "accuracy_against_operations.png", "confusion.png")
# 30 training images in batches of 5, two epochs: 12 steps.
TINY = [
    "--config=configs/common.py",
    "--config.data.name=tests.support.helpers:tiny_images",
    "--config.data.augmentation=none",
    "--config.data.validation_examples=11",
    "--config.model.name=tests.support.helpers:ThreeStageVGG",
    "--config.model.width=2",
    "--config.batch_size=5",
    "--config.eval_batch_size=13",
    "--config.epochs=2",
    "--config.checkpoint_every_steps=2",
    "--config.optimizer.learning_rate=0.05",
]


def environment(devices=1):
    """The tests' own, so that what they compiled is found again."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    cache = {
        "XLA_FLAGS": flags if devices > 1 else os.environ["XLA_FLAGS"],
        "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "tests"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(REPOSITORY),
    }
    return {**os.environ, **cache}


def start(program, *arguments, devices=1):
    return subprocess.Popen(
        [sys.executable, program, *arguments],
        cwd=REPOSITORY,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(program, *arguments, devices=1):
    process = start(program, *arguments, devices=devices)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def latest_step(workdir):
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


def wait_for_checkpoint_after(step, workdir, process):
    """Waits until a later step of the run is on disk, and no longer."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and latest_step(workdir) <= step:
        if process.poll() is not None:
            return
        time.sleep(0.002)


def untimed(workdir):
    timings = ("images_per_second", "data_wait")
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


def final_checksums(workdir):
    document = workdir / "checkpoints" / "12" / "document" / "metadata"
    return json.loads(document.read_text())["checksums"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run, and its output."""
    workdir = tmp_path_factory.mktemp("finished")
    status, out, err = run("train.py", *TINY, f"--workdir={workdir}")
    assert status == 0, err
    return workdir, out


def test_a_run_leaves_everything_it_should(finished):
    workdir, out = finished
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        *("config.json", "data.json", "metrics.jsonl", "tensorboard", "checkpoints"),
        *("report.json", "report.md", "weights.safetensors", *PICTURES),
    }
    assert all((workdir / picture).read_bytes().startswith(b"\x89PNG") for picture in PICTURES)
    assert "3 exits" in out
    assert "\r" not in out  # no progress bar where nobody watches


def test_killed_runs_end_as_if_nothing_had_happened(finished, tmp_path):
    """kill -9, then SIGTERM, then to the end: the same parameters and metrics, bit for bit."""
    for number, expected in ((signal.SIGKILL, -9), (signal.SIGTERM, 0)):
        before = latest_step(tmp_path)
        assert before < 12  # or there is nothing to interrupt
        process = start("train.py", *TINY, f"--workdir={tmp_path}")
        wait_for_checkpoint_after(before, tmp_path, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == expected, err
    assert "the same command continues" in out
    assert latest_step(tmp_path) < 12
    status, out, err = run("train.py", *TINY, f"--workdir={tmp_path}")
    assert status == 0, err
    reference, _ = finished
    assert final_checksums(tmp_path) == final_checksums(reference)
    assert untimed(tmp_path) == untimed(reference)
    assert (tmp_path / "report.json").read_bytes() == (reference / "report.json").read_bytes()


@pytest.mark.slow
def test_two_devices_equal_one(tmp_path):
    """Data-parallel training: the same metrics but for rounding, batch statistics included."""
    lines = []
    for devices in (1, 2):
        workdir = tmp_path / str(devices)
        changed = ["--config.batch_size=6", "--config.epochs=1", "--config.schedule.name=constant"]
        status, out, err = run("train.py", *TINY, *changed, f"--workdir={workdir}", devices=devices)
        assert status == 0, err
        assert f"on {devices} device(s)" in out
        lines.append(untimed(workdir))
    for one, two in zip(*lines, strict=True):
        assert one == {
            key: pytest.approx(v, rel=1e-4) if key.endswith("loss") else v for key, v in two.items()
        }


def test_a_batch_that_devices_cannot_divide(tmp_path):
    status, _, err = run("train.py", *TINY, f"--workdir={tmp_path}", devices=3)
    assert status == 2
    assert "batch_size 5 cannot be divided over 3 device(s)" in err


def test_eval_reports_what_was_asked_for(finished, tmp_path):
    workdir, _ = finished
    output = tmp_path / "answers.json"
    before = (workdir / "report.json").read_bytes()
    status, out, err = run(
        "eval.py", f"--workdir={workdir}", "--checkpoint=latest", f"--output={output}"
    )
    assert status == 0, err
    assert "ensemble" in out
    report = json.loads(output.read_text())
    assert set(report) == {"run", "anytime", "ensemble", "budgeted", "classes"}
    assert report["run"]["step"] == 12
    assert report["run"]["examples"] == 13
    assert [row["exit"] for row in report["anytime"]] == [1, 2, 3]
    assert len(report["budgeted"]) == 40
    assert all(np.isfinite(point["accuracy"]) for point in report["budgeted"])
    assert (workdir / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/none.py"], "there is no config file configs/none.py"),
        (["--config=configs/common.py", "--config.model.wdth=3"], "no such field: 'wdth'. Did you"),
        (["--config=configs/common.py", "--config.epochs=many"], "epochs=many"),
        (["--config=configs/common.py", "stray"], "unexpected argument 'stray'"),
        ([*TINY, "--config.fork.partition_ratio=1.2", "--workdir={tmp}"], "[0, 1], got 1.2"),
        ([*TINY, "--workdir=README.md"], "README.md is a file: name a directory"),
        (
            ["--config=configs/cifar10_vgg7.py", "--config.data.data_dir={tmp}", "--workdir={tmp}"],
            "python -m dfs_jax.data.prepare cifar10",
        ),
    ],
)
def test_mistakes_end_with_one_sentence(tmp_path, arguments, message):
    status, _, err = run("train.py", *(a.format(tmp=tmp_path) for a in arguments))
    assert status != 0
    assert "Traceback" not in err
    assert message in err


def test_eval_of_nothing(tmp_path):
    status, _, err = run("eval.py", f"--workdir={tmp_path}")
    assert (status, err) == (2, f"error: there is no run in {tmp_path}: config.json is missing\n")
