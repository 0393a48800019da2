"""Stage `step`: time of a training step by method, compared with PyTorch and two lower bounds.

A cell is a network, a batch size and a type. Its contenders are prepared in order of importance, as
many as the time allows. They run in turn, round after round, in bursts of steps that wait only for
the last step, as in training. An incomplete cell is kept, and measured again by the next session,
which finds compiled programs in the cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.gpu.clock import Expected
from benchmarks.gpu.floors import Ceilings, Floors, floors, measure_ceilings
from benchmarks.gpu.session import Session, reason_of
from benchmarks.gpu.trace import find_trace, read_profile
from benchmarks.training_step.method_costs import (
    OURS,
    Case,
    changed,
    count_operations,
    noise_like,
    plan_cases,
    without_augmentation,
)
from benchmarks.training_step.step_timing import compile_whole_step
from benchmarks.training_step.torch_peer import COMPILED, TorchPeer, release
from configs import cifar100_msdnet, cifar100_resnet18, cifar100_vgg7
from dfs_jax.program import say
from dfs_jax.stopwatch import median_seconds
from dfs_jax.types import Config, UserError

BETA = 0.5
METHODS = ("dfs", "dsn", "dfs_naive", "byot")
# Contenders by importance: method, framework and, for PyTorch, the mode of torch.compile.
BEST, SEARCHED = COMPILED
ORDER = (
    ("dfs", OURS),
    ("dfs", BEST),
    ("dsn", OURS),
    ("dsn", BEST),
    ("dfs_naive", OURS),
    ("byot", OURS),
    ("byot", BEST),
    ("dfs", SEARCHED),
    ("dsn", SEARCHED),
    ("byot", SEARCHED),
)
NETWORKS: dict[str, Callable[[str], Config]] = {
    "vgg7": cifar100_vgg7.get_config,
    "resnet18": cifar100_resnet18.get_config,
    "msdnet": cifar100_msdnet.get_config,
}
TINY: dict[str, dict[str, Any]] = {
    "vgg7": {"model.width": 4},
    "resnet18": {"model.width": 4},
    "msdnet": {"model.growth": 2, "model.initial_channels": 4, "model.base": 1, "model.step": 1},
}
BATCHES, TINY_BATCHES = (500, 128), (8, 4)
ROUNDS, BURST_S, MOST_IN_A_BURST = 9, 0.2, 50
TRACED_STEPS = 8
# Initial guesses for a GPU: compilation, including its search for the fastest algorithms.
_GUESS_S = {OURS: 60.0, BEST: 60.0, SEARCHED: 120.0}
_MEASURING_S = 45.0
_KEPT_BEFORE = (4, 7)  # numbers of contenders: DFS and DSN of both frameworks, then BYOT's too


class StepCell(NamedTuple):
    """Contenders that are measured together."""

    network: str
    batch: int
    dtype: str

    @property
    def name(self) -> str:
        """Name of the cell.

        >>> StepCell("vgg7", 500, "bfloat16").name
        'vgg7/batch500/bfloat16'
        """
        return f"{self.network}/batch{self.batch}/{self.dtype}"


class Contender(NamedTuple):
    """A prepared step.

    Attributes:
      case: case of the step.
      run: function that takes a number of steps and waits for the last.
      compile_s, peak_mib: see `StepPrograms`.
      floors: lower bounds of our step; None for the peer's.
    """

    case: Case
    run: Callable[..., Any]
    compile_s: float | None
    peak_mib: float | None
    floors: Floors | None


def cells(rehearses: bool) -> list[StepCell]:
    """Returns the cells by importance: large batches, bfloat16, the small network first."""
    if rehearses:
        tiny = [StepCell(network, TINY_BATCHES[0], "bfloat16") for network in NETWORKS]
        return [*tiny, StepCell("vgg7", TINY_BATCHES[1], "float32")]
    order = [(batch, dtype) for dtype in ("bfloat16", "float32") for batch in BATCHES]
    return [StepCell(network, batch, dtype) for batch, dtype in order for network in NETWORKS]


def run(session: Session) -> None:
    """Measures cells without a record, as long as time remains."""
    ceilings = _ceilings(session)
    expected = {kind: Expected(2.0 if session.rehearses else s) for kind, s in _GUESS_S.items()}
    for cell in cells(session.rehearses):
        unit = session.unit(cell.name)
        if session.known(unit) is not None:
            continue
        # Measurements are useful only with a contender of each framework.
        least = _reserve(session) + expected[OURS].seconds + expected[BEST].seconds
        if not session.clock.allows(least):
            say(f"{session.clock.left():.0f} s are left: too few for {cell.name}")
            return
        say(f"--- {cell.name}")
        try:
            _measure(session, cell, ceilings, expected)
        except Exception as error:
            session.fail(unit, error)
        finally:
            jax.clear_caches()


def _ceilings(session: Session) -> Ceilings:
    unit = session.unit("ceilings")
    known = session.known(unit)
    if known is not None:
        return Ceilings(known["flops"], known["bandwidth"])
    found = measure_ceilings(**({"side": 256, "mebibytes": 8} if session.rehearses else {}))
    session.keep(unit, found._asdict())
    rates = ", ".join(f"{rate / 1e12:.1f} TFLOP/s {dtype}" for dtype, rate in found.flops.items())
    say(f"{unit.name}: {rates}, {found.bandwidth / 1e9:.0f} GB/s")
    return found


def _measure(
    session: Session, cell: StepCell, ceilings: Ceilings, expected: dict[str, Expected]
) -> None:
    peer = _peer()
    cases = _cases(cell, session.rehearses, peer)
    counted = count_operations(cases)
    ready: list[Contender] = []
    failures: list[dict[str, Any]] = []
    complete = True

    def keep(complete: bool) -> dict[str, Any]:
        rows = _timed(ready, cell, ceilings, counted, 2 if session.rehearses else ROUNDS)
        record = {
            "rows": rows + failures,
            "over_peer": ratios_to_peer(rows),
            "ceilings": ceilings._asdict(),
            "complete": complete,
        }
        session.keep(session.unit(cell.name), record)
        return record

    for number, case in enumerate(cases):
        kind = OURS if case.framework == OURS else case.layout
        if not session.clock.allows(_reserve(session) + expected[kind].seconds):
            complete = False
            continue
        if number in _KEPT_BEFORE:  # the next contender may exceed the time limit
            keep(complete=False)
        say(f"preparing {case.method}, {case.framework} {case.layout}")
        flops = 2.0 * cell.batch * (counted[case.key]["macs"] or 0)
        try:
            with expected[kind].timed(session.clock):
                ready.append(_prepare(case, peer, ceilings, flops, cell.dtype))
        except UserError:
            raise
        except Exception as error:  # out of memory, or a compiler that gives up
            failures.append({**_about(case), "failed": reason_of(error)})
            say(f"failed: {failures[-1]['failed']}")
    record = keep(complete)
    for row in record["rows"]:
        if "step_ms" in row:
            what = f"{row['method']:10} {row['framework']:6} {row['layout']:30}"
            say(f"{what} {row['step_ms']:9.3f} ms")
    profile = _profile(session, cell, [c for c in ready if c.floors is not None])
    session.keep(session.unit(cell.name), {**record, "profile": profile})
    ready.clear()
    if peer is not None:
        release()


def _timed(
    ready: Sequence[Contender],
    cell: StepCell,
    ceilings: Ceilings,
    counted: dict[tuple, dict[str, int | None]],
    rounds: int,
) -> list[dict[str, Any]]:
    """Runs the contenders in turn, in bursts, and returns their rows."""
    bursts = [_burst(contender) for contender in ready]
    programs = [lambda c=c, n=n: c.run(n) for c, n in zip(ready, bursts, strict=True)]
    seconds = median_seconds(programs, rounds)
    return [
        _row(contender, cell, 1e3 * taken / n, ceilings, counted)
        for contender, taken, n in zip(ready, seconds, bursts, strict=True)
    ]


def _reserve(session: Session) -> float:
    return 5.0 if session.rehearses else _MEASURING_S


def _peer() -> TorchPeer | None:
    try:
        return TorchPeer(compiles=True)
    except UserError as error:
        say(f"without PyTorch: {error}")
        return None


def _cases(cell: StepCell, rehearses: bool, peer: TorchPeer | None) -> list[Case]:
    """Returns the contenders of a cell by importance."""
    fields = {
        "batch_size": cell.batch,
        "compute_dtype": cell.dtype,
        **(TINY[cell.network] if rehearses else {}),
    }
    config = changed(without_augmentation(NETWORKS[cell.network]("dfs")), fields)
    dataset = noise_like(config, cell.batch)
    planned = plan_cases(config, dataset, METHODS, (BETA,), peer)
    place = {(c.method, OURS if c.framework == OURS else c.layout): c for c in planned}
    order = [key for key in ORDER if key in place]
    if rehearses:  # compilation on a CPU takes long, so each method runs once
        kept = {("dfs", OURS), ("dfs", BEST)}
        if cell == cells(True)[0]:
            kept |= {(method, OURS) for method in METHODS}
        order = [key for key in order if key in kept]
    return [place[key] for key in order]


def _prepare(
    case: Case, peer: TorchPeer | None, ceilings: Ceilings, flops: float, dtype: str
) -> Contender:
    if peer is not None and case.framework == peer.name:
        parts = peer.compile_step(case.experiment, case.layout)
        return Contender(case, parts.step, parts.compile_s, parts.peak_mib, None)
    whole = compile_whole_step(case.experiment)
    whole.run(2)
    return Contender(
        case,
        whole.run,
        whole.compile_s,
        memory_mib(whole.compiled),
        floors(ceilings, whole.compiled, flops, dtype),
    )


def _burst(contender: Contender) -> int:
    """Returns the number of steps that take about `BURST_S` seconds."""
    (seconds,) = median_seconds([contender.run], 3)
    return int(min(max(BURST_S / seconds, 2), MOST_IN_A_BURST))


def _about(case: Case) -> dict[str, Any]:
    ratio = case.partition_ratio
    return {
        "method": case.method,
        "partition_ratio": ratio,
        "framework": case.framework,
        "layout": case.layout,
    }


def _row(
    contender: Contender,
    cell: StepCell,
    step_ms: float,
    ceilings: Ceilings,
    counted: dict[tuple, dict[str, int | None]],
) -> dict[str, Any]:
    case, macs = contender.case, counted[contender.case.key]["macs"]
    flops = 2.0 * cell.batch * (macs or 0)
    row = {
        **_about(case),
        "step_ms": round(step_ms, 4),
        "images_per_second": round(1e3 * cell.batch / step_ms, 1),
        "compile_s": None if contender.compile_s is None else round(contender.compile_s, 2),
        "peak_mib": None if contender.peak_mib is None else round(contender.peak_mib, 1),
        "macs": macs,
        "share_of_peak": round(1e3 * flops / step_ms / ceilings.flops[cell.dtype], 4),
    }
    return row if contender.floors is None else {**row, **contender.floors._asdict()}


def _profile(session: Session, cell: StepCell, ours: Sequence[Contender]) -> dict[str, Any]:
    """Traces some steps of our first contender and returns a profile of their time.

    Steps are dispatched one by one, like the timed ones. For large batches in bfloat16 the trace
    itself is also kept.
    """
    directory = session.work / "traces" / cell.name.replace("/", "-")
    shutil.rmtree(directory, ignore_errors=True)
    try:
        contender = ours[0]
        contender.run(2)
        with jax.profiler.trace(str(directory)):
            contender.run(TRACED_STEPS)
        trace = find_trace(directory)
        profile = read_profile(trace)
    except Exception as error:  # the times are valid without it
        say(f"no profile: {reason_of(error)}")
        return {"failed": reason_of(error)}
    _keep_trace(session, cell, trace)
    return {"method": contender.case.method, "traced_steps": TRACED_STEPS, **profile._asdict()}


def _keep_trace(session: Session, cell: StepCell, trace: Path) -> None:
    if cell.batch in (BATCHES[0], TINY_BATCHES[0]) and cell.dtype == "bfloat16":
        session.output.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trace, session.output / f"profile-{cell.network}.trace.json.gz")


def ratios_to_peer(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns our step's time over the peer's fastest, for methods that both have.

    >>> rows = [{"method": "dfs", "framework": f, "step_ms": t} for f, t in
    ...         (("jax", 9.0), ("torch", 12.0), ("torch", 10.0))]
    >>> ratios_to_peer(rows)
    {'dfs': 0.9}
    """
    timed = [row for row in rows if "step_ms" in row]
    ours = {row["method"]: row["step_ms"] for row in timed if row["framework"] == OURS}
    theirs: dict[str, float] = {}
    for row in timed:
        if row["framework"] != OURS:
            best = theirs.get(row["method"], float("inf"))
            theirs[row["method"]] = min(best, row["step_ms"])
    return {method: round(ours[method] / theirs[method], 4) for method in ours if method in theirs}


def memory_mib(compiled: Any) -> float:
    """Returns the memory of a compiled program on the device in MiB."""
    from dfs_jax.costs.compiled import memory

    return memory(compiled).total / 2**20
