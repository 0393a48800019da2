"""Measures the speed-up of early exits on this machine.

    python -m benchmarks.inference --workdir=DIR --output=FILE.json [--static=DIR --static=DIR]
    python -m benchmarks.inference --workdir=DIR --runtimes=jax,onnx,onnx_int8

Rows for each batch size, runtime and policy, in a list (`KEYS`):

    batch                  examples in a full batch; 1: one at a time
    runtime                "jax", "onnx" or "onnx_int8" (ONNX Runtime)
    policy                 "full", "exit K", "no early exit", "2.5x" (that many times fewer
                           operations), "policy.json", "static RUN"
    accuracy, macs         on the whole test split; a fraction, and mean multiply-adds of one image
    ideal_speedup          if only the stages took time, each its measured time in a full batch,
                           against that of the whole network as one program; null for static
                           networks, which have no stages
    ideal_speedup_by_macs  if time were proportional to operations
    speedup                measured, of the stream, or of single calls if batch is 1; "full" runs
                           before and after each other policy, see `benchmarks.inference.speed`
    p50_ms, p99_ms         from a call with one batch until an example's answer is known

The printed table also has the number of images per second, the number of decisions within 1e-6 of a
threshold, where rounding decides, and whether the whole network ran instead because it is faster.

Speed-ups are relative to "full", the whole network as one program with only its last head, in the
runtime where it is fastest. "exit K" is such a program up to exit K, for all examples (measured if
there is one runtime). Policies of a network in int8 are fitted to its own confidences. "static RUN"
is the whole network of another run (`--static`, its best checkpoint) as such a program, in the
fastest runtime; rows of policies then also have

    static                 name of the static network that is nearest in accuracy
    speedup_over_static    the policy's throughput over this network's

and a sentence says which policies are slower than a static network of no less accuracy.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags, logging

from benchmarks.inference.runtimes import INT8, RUNTIMES, check_runtimes, in_runtimes
from benchmarks.inference.speed import Contender, EarlyExits, Speed, UpToExit, race
from benchmarks.inference.static import KEYS as STATIC_KEYS
from benchmarks.inference.static import (
    StaticNetwork,
    compared,
    load_static,
    static_directories,
    static_table,
)
from dfs_jax import program
from dfs_jax.costs.flops import exit_costs
from dfs_jax.files import write_whole
from dfs_jax.inference import policy as policies
from dfs_jax.inference.fitting import PolicyOutcome, exits_taken, fit_policy, outcome
from dfs_jax.inference.policy import Policy, last_exit_only
from dfs_jax.inference.predictor import EarlyExitPredictor
from dfs_jax.inference.run_policy import load_with_policy
from dfs_jax.inference.trained import StagedRun
from dfs_jax.paths import input_directory, output_file
from dfs_jax.stopwatch import median_seconds
from dfs_jax.tables import aligned
from dfs_jax.types import UserError

SPEEDUPS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
# One at a time: fewer examples and more rounds, so that contenders alternate faster than the speed
# of the machine drifts.
_ALONE, _TURNS_ALONE = 128, 5
_TRIES = 7  # of each runtime's whole network, to find the fastest
KEYS = (
    "batch",
    "runtime",
    "policy",
    "accuracy",
    "macs",
    "ideal_speedup",
    "ideal_speedup_by_macs",
    "speedup",
    "p50_ms",
    "p99_ms",
)

Row = dict[str, Any]


class Candidate(NamedTuple):
    """A policy to measure, or the network up to one exit.

    Attributes:
      name: name of the row.
      policy: early-exit policy; for the network up to exit K, all examples exit there.
      exit_index: that exit, 0-based; None for a policy.
      result: results on the whole test split.
      taken: exits (0-based) of the examples that may be timed, `[n]`.
    """

    name: str
    policy: Policy
    exit_index: int | None
    result: PolicyOutcome
    taken: np.ndarray

    def shares(self, n: int) -> tuple[float, ...]:
        """Returns the fraction of the first n examples that each exit answers."""
        counts = np.bincount(self.taken[:n], minlength=self.policy.num_exits)
        return tuple((counts / n).tolist())


class Runtime(NamedTuple):
    """A run in one runtime.

    Attributes:
      name: name of the runtime.
      staged: checkpoint of the run, with its stages in this runtime.
      candidates: what to measure, the whole network first.
    """

    name: str
    staged: StagedRun
    candidates: list[Candidate]


def main() -> None:
    """Runs the program."""
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    data_dir = flags.DEFINE_string("data_dir", None, "Directory of the data, if it has moved.")
    checkpoint = flags.DEFINE_string(
        "checkpoint", None, "best, latest or a step number; default: the policy's checkpoint."
    )
    own = flags.DEFINE_string(
        "policy", None, "Policy file, or none; default: policy.json in workdir."
    )
    output = flags.DEFINE_string("output", None, "JSON file; default: benchmark.json in workdir.")
    batches = flags.DEFINE_multi_integer("batch", [1, 32, 256], "Batch sizes; may be repeated.")
    examples = flags.DEFINE_integer("examples", 5120, "Number of test examples to time.")
    rounds = flags.DEFINE_integer("rounds", 5, "Number of rounds that medians are taken over.")
    measure = flags.DEFINE_string("measure", "max_softmax", "Confidence measure of the policies.")
    runtimes = flags.DEFINE_list("runtimes", ["jax"], f"Some of {', '.join(RUNTIMES)}.")
    static = flags.DEFINE_multi_string(
        "static", [], "Directory of a smaller network's run to compare with; may be repeated."
    )

    def run() -> None:
        program.use_compilation_cache()
        root = input_directory(workdir.value, "--workdir")
        path = root / "benchmark.json" if output.value is None else output.value
        path = output_file(path, "--output")
        names = check_runtimes(runtimes.value)
        others = static_directories(static.value, root)
        staged, chosen = load_with_policy(
            root, policy=own.value, checkpoint=checkpoint.value, data_dir=data_dir.value
        )
        images = staged.images("test", examples.value)
        statics = load_static(others, staged, images, data_dir=data_dir.value)
        measured = []
        for name, in_it in in_runtimes(staged, names).items():
            policy = None if name == INT8 else chosen  # which was fitted on other confidences
            candidates = find_candidates(
                in_it, policy, measure.value, len(images), with_exits=len(names) == 1
            )
            measured.append(Runtime(name, in_it, candidates))
        rows: list[Row] = []
        for batch in batches.value:
            some = benchmark(measured, images, batch=batch, rounds=rounds.value, statics=statics)
            program.say(table(some))
            if statics:
                program.say(static_table(some))
            rows += some
        write_whole(path, to_json(rows))
        from benchmarks.inference.speed_plots import plot_speed

        program.say(f"wrote {path}\nwrote {plot_speed(rows, path.with_suffix('.png'))}")

    program.run(run)


def find_candidates(
    staged: StagedRun, own: Policy | None, measure: str, timed: int, *, with_exits: bool = True
) -> list[Candidate]:
    """Returns the whole network, every exit, policies of fewer operations, and the run's policy.

    Policies are fitted on validation data, if they are available; results are on the test split.

    Args:
      staged: checkpoint of the run.
      own: policy of the run, if it has one.
      measure: confidence measure of the other policies.
      timed: number of test examples, from the first, that may be timed.
      with_exits: whether the network up to each exit is a candidate.
    """
    macs = _macs(staged)
    last = len(macs) - 1
    logits, labels = staged.logits("test")

    def candidate(name: str, policy: Policy, exit_index: int | None = None) -> Candidate:
        taken = exits_taken(policy, logits[:, :timed], labels[:timed])
        return Candidate(name, policy, exit_index, outcome(policy, logits, labels, macs), taken)

    def at_exit(k: int) -> Policy:
        return Policy((*[None] * k, *[policies.EVERYBODY] * (last - k)))

    found = [candidate("full", last_exit_only(last + 1), last)]
    if with_exits:
        found += [candidate(f"exit {k + 1}", at_exit(k), k) for k in range(last)]
    found.append(candidate("no early exit", last_exit_only(last + 1)))
    try:
        validation = staged.logits(staged.experiment.score_split)
    except UserError as error:
        logging.warning("no policies are fitted: %s", error)
        validation = None
    for speedup in SPEEDUPS:
        if validation is not None and macs[-1] / speedup > macs[0]:
            fitted = fit_policy(*validation, macs, at_most=macs[-1] / speedup, measure=measure)
            found.append(candidate(f"{speedup:g}x", fitted.policy))
    return found if own is None else [*found, candidate(policies.FILE, own)]


def benchmark(
    runtimes: Sequence[Runtime],
    images: np.ndarray,
    *,
    batch: int,
    rounds: int,
    statics: Sequence[StaticNetwork] = (),
) -> list[Row]:
    """Returns the rows of one batch size, with speed-ups relative to the fastest whole network.

    Rows of the runtime in which it is fastest are first, those of static networks last. All take
    turns.

    Raises:
      UserError: fewer images than a batch.
    """
    rounds = rounds * _TURNS_ALONE if batch == 1 else rounds
    if len(images) < batch:
        raise UserError(f"batches of {batch} need as many examples: there are {len(images)}")
    images = images[: _ALONE if batch == 1 else len(images) - len(images) % batch]
    by_runtime = [_contenders(r.staged, r.candidates, batch) for r in runtimes]
    whole = [functools.partial(c[0].go_through, images[:batch], batch) for c in by_runtime]
    seconds = median_seconds(whole, _TRIES) if len(runtimes) > 1 else [0.0]
    order = np.argsort(seconds, kind="stable")  # the fastest whole network is the reference
    runtimes, by_runtime = [runtimes[k] for k in order], [by_runtime[k] for k in order]
    predictors = [
        next(c.predictor for c in some if isinstance(c, EarlyExits)) for some in by_runtime
    ]
    reference = runtimes[0]
    contenders = [c for some in by_runtime for c in some]
    contenders += [static.contender(reference.name) for static in statics]
    for contender in contenders:
        contender.go_through(images[:batch], batch)
        contender.answer(images[:batch])
    speeds, times = race(contenders, predictors, images, batch=batch, rounds=rounds)
    macs = _macs(reference.staged)
    rows, measured = [], iter(zip(contenders, speeds, strict=True))
    for runtime, own_times in zip(runtimes, times, strict=True):
        for candidate in runtime.candidates:
            contender, speed = next(measured)
            staged = own_times.staged(candidate.shares(len(images)))
            ideal = times[0].whole / staged
            rows.append(
                _row(
                    runtime.name,
                    candidate,
                    contender,
                    speed,
                    ideal_speedup=ideal,
                    batch=batch,
                    macs=macs,
                )
            )
    for static, (_, speed) in zip(statics, measured, strict=True):
        rows.append(_static_row(reference.name, static, speed, batch=batch, macs=macs[-1]))
    return compared(rows)


def to_json(rows: Sequence[Row]) -> str:
    """Returns the rows as JSON: the fields of `KEYS`, and of `STATIC_KEYS` where they have them."""
    kept = [
        {key: row[key] for key in (*KEYS, *STATIC_KEYS) if key in row or key in KEYS}
        for row in rows
    ]
    return json.dumps(kept, indent=2, allow_nan=False) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as a table for a terminal, without a final newline."""
    titles = (
        "runtime",
        "policy",
        "accuracy",
        "M MACs",
        "by MACs",
        "ideal",
        "real",
        "images/s",
        "p50 ms",
    )
    lines = [
        (
            str(row["runtime"]),
            str(row["policy"]),
            f"{100 * row['accuracy']:.2f} %",
            f"{row['macs'] / 1e6:.3f}",
            *(_number(row[key]) for key in ("ideal_speedup_by_macs", "ideal_speedup", "speedup")),
            f"{row['images_per_second']:,.0f}",
            *(f"{row[key]:.2f}" for key in ("p50_ms", "p99_ms")),
            str(row["close"]),
            "fell back" if row["falls_back"] else "",
        )
        for row in rows
    ]
    table = aligned([(*titles, "p99 ms", "close", ""), *lines])
    return f"batch {rows[0]['batch']}\n{table}"


def _contenders(
    staged: StagedRun, candidates: Sequence[Candidate], batch: int
) -> list[UpToExit | EarlyExits]:
    predictors: dict[str, EarlyExitPredictor] = {}
    contenders: list[UpToExit | EarlyExits] = []
    for candidate in candidates:
        if candidate.exit_index is not None:
            contenders.append(UpToExit(staged.stages, candidate.exit_index, staged.example))
            continue
        measure = candidate.policy.measure
        if measure not in predictors:
            predictors[measure] = EarlyExitPredictor(
                staged.stages, staged.example, candidate.policy, batch_size=batch
            )
            predictors[measure].warm_up()
        contenders.append(EarlyExits(predictors[measure].with_policy(candidate.policy)))
    return contenders


def _row(
    runtime: str,
    candidate: Candidate,
    contender: Contender,
    speed: Speed,
    *,
    ideal_speedup: float,
    batch: int,
    macs: Sequence[float],
) -> Row:
    early = contender.predictor if isinstance(contender, EarlyExits) else None
    result = candidate.result
    return {
        "batch": batch,
        "runtime": runtime,
        "policy": candidate.name,
        "accuracy": result.accuracy,
        "macs": result.cost,
        "ideal_speedup": ideal_speedup,
        "ideal_speedup_by_macs": macs[-1] / result.cost,
        **_measured(speed),
        "falls_back": early is not None and early.counts.whole > 0,
        "close": 0 if early is None else early.counts.close,
    }


def _static_row(
    runtime: str, static: StaticNetwork, speed: Speed, *, batch: int, macs: float
) -> Row:
    return {
        "batch": batch,
        "runtime": runtime,
        "policy": static.name,
        "accuracy": static.accuracy,
        "macs": static.macs,
        "ideal_speedup": None,
        "ideal_speedup_by_macs": macs / static.macs,
        **_measured(speed),
        "falls_back": False,
        "close": 0,
    }


def _measured(speed: Speed) -> Row:
    return {
        "speedup": speed.speedup,
        "p50_ms": 1000 * speed.p50,
        "p99_ms": 1000 * speed.p99,
        "images_per_second": 1 / speed.seconds,
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _macs(staged: StagedRun) -> tuple[float, ...]:
    costs = exit_costs(staged.experiment.model, staged.experiment.dataset.image_shape)
    return tuple(float(cost.macs) for cost in costs)


if __name__ == "__main__":
    main()
