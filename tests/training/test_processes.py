"""Two processes as one run, over localhost: what they agree on, and how both of them end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dfs_jax.training.checkpoint import file_checksums
from dfs_jax.training.metrics import read_metrics
from dfs_jax.training.processes import by_writer, is_writer, joined
from tests.support.process_cases import CASES

REPOSITORY = Path(__file__).resolve().parents[2]
# 1197 training images in batches of 64, two epochs: 36 steps.
DIGITS = [
    "--config=configs/digits_vgg7.py",
    "--config.model.width=2",
    "--config.epochs=2",
    "--config.eval_every_epochs=1",
    "--config.checkpoint_every_steps=3",
    "--config.log_every_steps=1",
    "--config.optimizer.learning_rate=0.01",
    "--config.schedule.warmup_epochs=0.5",
]
STEPS = 36


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(*arguments, devices=1):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    changes = {
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "tests"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(REPOSITORY),
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(processes, timeout=300):
    """Returns each process's status, output and errors."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return found


def both(case):
    port = free_port()
    return ends(
        [start("-m", "tests.support.process_cases", case, port, i, devices=2) for i in range(2)]
    )


def test_alone_nobody_has_to_be_asked():
    with joined(None):
        assert is_writer()
        assert by_writer(max, 3, 5) == 5


def test_two_processes_agree():
    (status, out, err), (other_status, other_out, other_err) = both("agree")
    assert (status, other_status) == (0, 0), err + other_err
    assert "True" in out.splitlines()  # the collectives of a CPU have their say too
    assert other_out == ""
    found, other = (json.loads(text.splitlines()[-1]) for text in (err, other_err))
    own = ("data", "fsdp", "tensor")
    assert {k: v for k, v in found.items() if k not in own} == {
        "answer": "answer of 0",
        "errors": ["refused by 0", "refused by 0"],
        "devices": 4,
    }
    assert {**other, **{name: found[name] for name in own}} == found
    for name in ("data", "fsdp"):
        assert (found[name], other[name]) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert found["tensor"] == other["tensor"] == list(range(8))


@pytest.mark.slow
def test_a_trunk_from_a_file_lies_on_both_whole_or_split():
    results = both("trunk")
    assert [status for status, _, _ in results] == [0, 0], results
    found, other = (json.loads(err.splitlines()[-1]) for _, _, err in results)
    assert found == other
    assert found["made"] == found["whole"] == found["split"]
    assert len(found["made"]) > 6


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_stays_alone_says_so(index):
    port = free_port()
    ((status, _, err),) = ends([start("-m", "tests.support.process_cases", "alone", port, index)])
    assert status == 2
    expected = f"error: the processes of this run did not find each other through localhost:{port}"
    assert err.splitlines()[-1].startswith(expected)


@pytest.mark.parametrize(
    ("case", "statuses", "message"),
    [
        ("fail", (3, 2), "process 1 stopped: a mistake of process 1"),
        pytest.param("crash", (1, 3), "process 0 stopped: RuntimeError", marks=pytest.mark.slow),
        pytest.param(
            "silent",
            (3, 3),
            "process 1 of this run has not answered for 3 s",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_goes_wrong_in_one_process_ends_both(case, statuses, message):
    begin = time.monotonic()
    results = both(case)
    assert time.monotonic() - begin < 45
    assert tuple(status for status, _, _ in results) == statuses
    assert any(message in err for _, _, err in results)
    assert all(err.count("error: ") == 1 for _, _, err in results)


def test_every_case_is_run():
    assert set(CASES) == {"agree", "trunk", "alone", "fail", "crash", "silent"}


# Real training, as a user starts it.


def train(workdir, *changes, processes=2, program="train.py"):
    """Starts `train.py` on all processes of a run."""
    port = free_port()
    joining = [
        [f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={i}"]
        for i in range(processes)
    ]
    return [
        start(program, *DIGITS, *changes, f"--workdir={workdir}", *(flags if processes > 1 else ()))
        for flags in joining
    ]


def trained(workdir, *changes, processes=2):
    results = ends(train(workdir, *changes, processes=processes))
    assert [status for status, _, _ in results] == [0] * processes, results
    return results


def steps_in(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def interrupt(workdir, victim, number, *changes):
    """Starts two processes, sends one of them a signal after the first checkpoint; returns ends."""
    started = train(workdir, *changes)
    deadline = time.monotonic() + 240
    while not steps_in(workdir) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in started)
        time.sleep(0.005)
    started[victim].send_signal(number)
    begin = time.monotonic()
    results = ends(started)
    return results, time.monotonic() - begin


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir)]


def weights(workdir):
    from safetensors.numpy import load_file

    return load_file(workdir / "weights.safetensors")


def assert_within_rounding(workdir, reference):
    """The same steps in the same order; float32 rounding grows over the steps that are taken."""
    assert steps_in(workdir)[-1] == STEPS
    np.testing.assert_allclose(losses(workdir), losses(reference), rtol=2e-3)
    expected = weights(reference)
    for name, found in weights(workdir).items():
        np.testing.assert_allclose(found, expected[name], rtol=2e-2, atol=2e-3, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """An uninterrupted run of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    trained(workdir, processes=1)
    return workdir


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_of_them_writes(alone, tmp_path):
    (_, out, err), (_, other_out, other_err) = trained(tmp_path)
    assert "on 2 device(s)" in out
    assert (err, other_out, other_err) == ("", "", "")
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in alone.iterdir()}
    splits = [(line["step"], line["split"]) for line in read_metrics(tmp_path)]
    expected = [(18 * e, split) for e in (1, 2) for split in ("train", "validation")]
    assert splits == expected
    assert_within_rounding(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_as_two_and_resumed_as_one(alone, tmp_path, victim):
    """SIGTERM to one process stops both after the same step; kill -9 of one ends the other."""
    results, _ = interrupt(tmp_path, victim, signal.SIGTERM)
    assert [status for status, _, _ in results] == [0, 0], results
    stopped = steps_in(tmp_path)[-1]
    assert f"stopped after step {stopped}: the same command continues" in results[0][1]
    assert results[1][1] == ""
    assert stopped < STEPS

    # The checkpoints of before are there already: wait for a new one.
    started = train(tmp_path)
    deadline = time.monotonic() + 240
    while steps_in(tmp_path)[-1] == stopped and time.monotonic() < deadline:
        time.sleep(0.005)
    started[victim].kill()
    begin = time.monotonic()
    results = ends(started)
    assert time.monotonic() - begin < 60
    status, _, err = results[1 - victim]
    assert (results[victim][0], status) == (-9, 3), results
    assert err.rstrip().splitlines()[-1].startswith("error: ")
    assert "the same command, started on all processes, continues" in err.splitlines()[-1]
    assert steps_in(tmp_path)[-1] < STEPS

    trained(tmp_path, processes=1)
    assert_within_rounding(tmp_path, alone)


@pytest.mark.slow
def test_parameters_split_over_two_processes_come_back_as_one(alone, tmp_path):
    """Saved by two processes that hold half of each large array, continued by one."""
    fsdp = ("--config.mesh.fsdp=2", "--config.model.width=8")
    results, _ = interrupt(tmp_path, 0, signal.SIGTERM, *fsdp)
    assert [status for status, _, _ in results] == [0, 0], results
    step = steps_in(tmp_path)[-1]
    manifest = json.loads((tmp_path / "checkpoints" / str(step) / "files.json").read_text())
    assert manifest == file_checksums(tmp_path / "checkpoints" / str(step))
    trained(tmp_path, *fsdp)
    reference = tmp_path / "reference"
    trained(reference, "--config.model.width=8", processes=1)
    assert_within_rounding(tmp_path, reference)
    again = ends([start("eval.py", f"--workdir={tmp_path}", "--checkpoint=latest")])[0]
    assert again[0] == 0, again


@pytest.mark.slow
def test_a_damaged_checkpoint_is_left_by_both(tmp_path):
    results, _ = interrupt(tmp_path, 0, signal.SIGTERM)
    assert [status for status, _, _ in results] == [0, 0], results
    newest = steps_in(tmp_path)[-1]
    files = (tmp_path / "checkpoints" / str(newest)).rglob("*")
    victim = max(files, key=lambda path: path.stat().st_size if path.is_file() else 0)
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    (_, out, err), _ = trained(tmp_path)
    assert f"the checkpoint of step {newest} is damaged" in err
    assert "continuing after step" in out
    assert (tmp_path / "damaged_checkpoints" / str(newest)).is_dir()
    assert steps_in(tmp_path)[-1] == STEPS


@pytest.mark.slow
def test_processes_of_different_commands_end_with_a_sentence(tmp_path):
    port = free_port()
    joining = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    results = ends(
        [
            start(
                "train.py",
                *DIGITS,
                f"--config.seed={i}",
                f"--workdir={tmp_path}",
                *joining,
                f"--process_id={i}",
            )
            for i in range(2)
        ]
    )
    assert [status for status, _, _ in results] == [3, 2]
    assert "different configs: seed is 1 here and 0 elsewhere" in results[1][2]
    assert "different configs" in results[0][2]
