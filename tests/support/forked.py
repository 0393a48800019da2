"""Runs programs as a user does, each in a process of its own that has imported everything.

    python -m tests.support.forked < modules_and_cases.json > results.json

Importing jax takes seconds, a fork takes none. A case is `{"program": "train.py" or the name of a
module, "arguments": [...], "cwd": ..., "environment": {...}, "encoding": of a strict standard
output, "stdout": "closed pipe" or None}`; a result is `{"status", "out", "err"}`.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]

Case = dict[str, Any]


def run_forked(
    cases: Sequence[Case],
    environment: dict[str, str],
    modules: Sequence[str] = ("dfs_jax.training.loop", "dfs_jax.inference.trained"),
) -> list[dict[str, Any]]:
    """Returns what came of each case, in order.

    Args:
      cases: the programs.
      environment: of all of them.
      modules: imported once, before.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.forked"],
        cwd=REPOSITORY,
        env=environment,
        input=json.dumps([list(modules), list(cases)]),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main() -> None:
    """Reads cases from standard input and writes their results to standard output."""
    modules, cases = json.load(sys.stdin)
    for module in modules:
        importlib.import_module(module)
    json.dump([_run(case) for case in cases], sys.stdout)


def _run(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = _be(case, out.fileno(), err.fileno())
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", errors="replace"))
    return {"status": os.waitstatus_to_exitcode(ended), "out": texts[0], "err": texts[1]}


def _be(case: Case, out: int, err: int) -> int:
    """Runs a case in this process and returns its status, as the interpreter would."""
    os.dup2(_stdout(case.get("stdout"), out), 1)
    os.dup2(err, 2)
    encoding = case.get("encoding", "utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding, errors="strict")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w")), encoding, write_through=True
    )
    os.chdir(case.get("cwd", REPOSITORY))
    os.environ.update(case.get("environment", {}))
    program = case["program"]
    is_file = program.endswith(".py")
    sys.argv = [program, *case["arguments"]]
    try:
        if is_file:
            runpy.run_path(str(REPOSITORY / program), run_name="__main__")
        else:
            sys.modules.pop(program, None)
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _stdout(kind: str | None, usual: int) -> int:
    if kind == "closed pipe":
        read, write = os.pipe()
        os.close(read)
        return write
    return usual


if __name__ == "__main__":
    main()
