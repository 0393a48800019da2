"""Reads a profile of `jax.profiler.trace`: a device's time by kind of operation, and idle time.

python -m benchmarks.gpu.trace FILE.trace.json.gz
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dfs_jax import program
from dfs_jax.types import UserError

# The first pattern found in an event's name decides; library kernels are recognised by name.
KINDS = (
    ("copy between host and device", r"memcpy(h2d|d2h)|infeed|outfeed"),
    ("depthwise convolution", r"depthwise|grouped_direct"),
    ("convolution", r"conv(?!ert)|fprop|dgrad|wgrad|implicit_gemm|cudnn.*(fprop|dgrad|wgrad)"),
    ("matrix product", r"gemm|cublas|nvjet|\bdot\b|dot[._]"),
    ("concatenation", r"concatenate"),
    ("pooling", r"reduce[-_]window|select[-_]and[-_]scatter"),
    ("reduction", r"reduce|norm"),
    ("gather or scatter", r"gather|scatter|dynamic[-_]slice|dynamic[-_]update"),
    ("transpose or copy", r"transpose|copy|memcpy|memset"),
    ("random numbers", r"rng|threefry|random"),
    ("elementwise", r"fusion|fused|loop_|add|multiply|select|convert|broadcast|wrapped|input_"),
)
OTHER = "other"
_DEVICE = "/device:"
_STREAM = re.compile(r"stream", re.IGNORECASE)
_OPERATIONS, _MODULES = "XLA Ops", "XLA Modules"


class Span(NamedTuple):
    """An event: start and end in microseconds, and name."""

    begin: float
    end: float
    names: str


class Profile(NamedTuple):
    """Distribution of the time of a traced program.

    Attributes:
      span_ms: time from the start of the first operation to the end of the last.
      busy_ms: part of the span in which at least one operation ran.
      idle: fraction of the span in which no operation ran.
      idle_between_steps: fraction of the span between the last operation of one program and the
        first of the next; None if the trace does not distinguish programs.
      steps: number of programs that ran; None likewise.
      kinds: fraction of all operations' time by kind, largest first.
      longest: the ten longest operations, with their fractions of the time.
    """

    span_ms: float
    busy_ms: float
    idle: float
    idle_between_steps: float | None
    steps: int | None
    kinds: dict[str, float]
    longest: dict[str, float]


def read_profile(path: Path) -> Profile:
    """Reads a `.trace.json.gz`.

    Raises:
      UserError: the file is missing or no trace, or no operation ran in it.
    """
    try:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    except FileNotFoundError as error:
        raise UserError(f"there is no trace {path}: check the path") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a trace of jax.profiler: {error}") from error
    operations, programs = _operations_and_programs(events)
    if not operations:
        raise UserError(f"no operation of a device is in {path}: trace while steps run")
    begin = min(span.begin for span in operations)
    end = max(span.end for span in operations)
    busy = sum(b - a for a, b in _union(operations))
    whole = max(end - begin, 1e-9)
    return Profile(
        span_ms=(end - begin) / 1e3,
        busy_ms=busy / 1e3,
        idle=1 - busy / whole,
        idle_between_steps=_between(operations, programs) / whole if programs else None,
        steps=len(programs) or None,
        kinds=_shares((kind_of(span.names), span.end - span.begin) for span in operations),
        longest=_shares(((span.names, span.end - span.begin) for span in operations), most=10),
    )


def find_trace(directory: Path) -> Path:
    """Returns the newest trace below a directory that `jax.profiler.trace` wrote to.

    Raises:
      UserError: there is none.
    """
    found = sorted(directory.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"there is no trace below {directory}")
    return found[-1]


def kind_of(names: str) -> str:
    """Returns the kind of an operation, from its names in XLA's program and on the device.

    >>> kind_of("sm90_xmma_fprop_implicit_gemm_bf16 cudnn-conv.4"), kind_of("loop_add_fusion.2")
    ('convolution', 'elementwise')
    """
    lower = names.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lower)), OTHER)


def _operations_and_programs(events: Sequence[dict[str, Any]]) -> tuple[list[Span], list[Span]]:
    """Returns the operations that ran on the device, and the executions of whole programs.

    A GPU's trace has a thread for each stream, a TPU's one for operations; a CPU's operations are
    recognised by their arguments.
    """
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    on_device, streams, listed, modules, on_cpu = set(), [], [], [], []
    for event in events:
        if event.get("ph") != "X":
            continue
        thread = threads.get((event["pid"], event.get("tid")), "")
        if _DEVICE in processes.get(event["pid"], ""):
            on_device.add(event["pid"])
            if thread.startswith(_MODULES):
                modules.append(event)
            elif thread.startswith(_OPERATIONS):
                listed.append(event)
            elif _STREAM.search(thread):
                streams.append(event)
        elif "hlo_op" in event.get("args", {}):
            on_cpu.append(event)
    chosen = streams or listed if on_device else on_cpu
    operations = [_span(event) for event in chosen]
    return operations, [_span(event) for event in modules] or _programs_by_run(chosen)


def _programs_by_run(events: Iterable[dict[str, Any]]) -> list[Span]:
    runs: dict[Any, list[Span]] = defaultdict(list)
    for event in events:
        run = event.get("args", {}).get("run_id")
        if run is not None:
            runs[run].append(_span(event))
    return [
        Span(min(s.begin for s in spans), max(s.end for s in spans), "") for spans in runs.values()
    ]


def _span(event: dict[str, Any]) -> Span:
    begin = float(event["ts"])
    operation = event.get("args", {}).get("hlo_op", "")
    name = event.get("name", "")
    names = name if operation in ("", name) else f"{name} {operation}"
    return Span(begin, begin + float(event.get("dur", 0.0)), names)


def _union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """Returns the intervals in which at least one span ran, in order and disjoint."""
    joined: list[tuple[float, float]] = []
    for begin, end, _ in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def _between(operations: Sequence[Span], programs: Sequence[Span]) -> float:
    """Returns the time without an operation between two programs, in microseconds.

    A program extends from its first operation to its last, since its own span in the trace also
    covers work of the host.
    """
    busy = _union(operations)
    total = 0.0
    for before, after in itertools.pairwise(busy):
        gap = before[1], after[0]
        inside = any(p.begin <= gap[0] and gap[1] <= p.end for p in programs)
        total += 0.0 if inside else gap[1] - gap[0]
    return total


def _shares(items: Iterable[tuple[str, float]], most: int | None = None) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for name, duration in items:
        sums[name] += duration
    total = sum(sums.values()) or 1.0
    largest = sorted(sums.items(), key=lambda item: -item[1])[:most]
    return {name: round(taken / total, 4) for name, taken in largest}


def main(paths: Sequence[str]) -> int:
    """Prints the profile of every trace given."""
    try:
        if not paths:
            raise UserError("name at least one FILE.trace.json.gz")
        for path in paths:
            program.say(f"{path}\n{json.dumps(read_profile(Path(path))._asdict(), indent=2)}")
    except UserError as error:
        return program.fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
