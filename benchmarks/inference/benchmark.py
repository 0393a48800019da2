"""Measures the speed-up of early exits on this machine.

    python -m benchmarks.inference --workdir=DIR --output=FILE.json [--static=DIR --static=DIR]
    python -m benchmarks.inference --workdir=DIR --runtimes=jax,onnx,onnx_int8,torch

Rows for each batch size, runtime and policy, in a list (`rows.KEYS`):

    batch                  examples in a full batch; 1: one at a time
    runtime                "jax", "onnx" or "onnx_int8" (ONNX Runtime), "torch" (channels last)
    policy                 "full", "exit K", "no early exit", "2.5x" (that many times fewer
                           operations), "policy.json", "static RUN"
    accuracy, macs         on the whole test split; a fraction, and mean multiply-adds of one image
    ideal_speedup          if only the stages took time, each its measured time in a full batch,
                           against that of the whole network as one program; null for static
                           networks and PyTorch, which have no stages
    ideal_speedup_by_macs  if time were proportional to operations
    speedup                measured, of the stream, or of single calls if batch is 1; "full" runs
                           before and after each other policy, see `benchmarks.inference.speed`
    p50_ms, p99_ms         from a call with one batch until an example's answer is known
    limits                 of "full": speed-ups that no policy exceeds which loses at most `loss` of
                           the last exit's accuracy, `by_macs` and `by_time` of the stages; those of
                           an oracle that knows the labels

The printed table also has the number of images per second, the number of decisions within 1e-6 of a
threshold, where rounding decides, and whether the whole network ran instead because it is faster.

Speed-ups are relative to "full", the whole network as one program with only its last head, in the
runtime where it is fastest. "exit K" is such a program up to exit K, for all examples (measured if
jax or onnx is the only runtime). Policies of a network in int8 are fitted to its own confidences.
"static RUN" is the whole network of another run (`--static`, its best checkpoint) as such a
program, in the fastest runtime; rows of policies then also have

    static                 name of the static network that is nearest in accuracy
    speedup_over_static    the policy's throughput over this network's

and a sentence says which policies are slower than a static network of no less accuracy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks.inference.candidates import Candidate, find_candidates, macs_of
from benchmarks.inference.rows import Row, limits, row_of, static_row, table, to_json
from benchmarks.inference.runtimes import (
    INT8,
    JAX,
    ONNX,
    RUNTIMES,
    TORCH,
    check_runtimes,
    files_of,
    in_runtime,
    part_of,
)
from benchmarks.inference.speed import EarlyExits, OneProgram, race
from benchmarks.inference.static import (
    StaticNetwork,
    compared,
    is_policy,
    load_static,
    static_directories,
    static_table,
)
from dfs_jax import program
from dfs_jax.files import write_whole
from dfs_jax.inference import quantize
from dfs_jax.inference.predictor import EarlyExitPredictor
from dfs_jax.inference.run_policy import load_with_policy
from dfs_jax.inference.trained import StagedRun
from dfs_jax.paths import input_directory, output_file
from dfs_jax.stopwatch import median_seconds
from dfs_jax.types import UserError

# One at a time: fewer examples and more rounds, so that contenders alternate faster than the speed
# of the machine drifts.
_ALONE, _TURNS_ALONE = 128, 5
_TRIES = 7  # of each runtime's whole network, to find the fastest


class Runtime(NamedTuple):
    """A run in one runtime.

    Attributes:
      name: name of the runtime.
      staged: checkpoint of the run, with its stages in this runtime.
      candidates: what to measure, the whole network first.
      original: the same checkpoint with its stages in jax, of which parts are made; None for
        `staged`.
    """

    name: str
    staged: StagedRun
    candidates: list[Candidate]
    original: StagedRun | None = None


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
    bits = flags.DEFINE_integer("weight_bits", 7, "Bits of a weight in onnx_int8: 7 or 8.")
    static = flags.DEFINE_multi_string(
        "static", [], "Directory of a smaller network's run to compare with; may be repeated."
    )

    def run() -> None:
        program.use_compilation_cache()
        root = input_directory(workdir.value, "--workdir")
        path = root / "benchmark.json" if output.value is None else output.value
        path = output_file(path, "--output")
        names = check_runtimes(runtimes.value)
        if bits.present and INT8 not in names:
            raise UserError(f"--weight_bits takes {INT8} among --runtimes")
        quantize.check_weight_bits(bits.value)
        others = static_directories(static.value, root)
        staged, chosen = load_with_policy(
            root, policy=own.value, checkpoint=checkpoint.value, data_dir=data_dir.value
        )
        images = staged.images("test", examples.value)
        statics = load_static(
            others, staged, images, names, weight_bits=bits.value, data_dir=data_dir.value
        )
        files, measured = files_of(staged, names, bits.value), []
        for name in names:
            in_it = in_runtime(staged, name, files)
            policy = None if name == INT8 else chosen  # which was fitted on other confidences
            candidates = find_candidates(
                in_it,
                policy,
                measure.value,
                len(images),
                with_exits=names in ((JAX,), (ONNX,)),
                with_policies=name != TORCH,
            )
            measured.append(Runtime(name, in_it, candidates, staged))
        rows: list[Row] = []
        for batch in batches.value:
            some = benchmark(measured, images, batch=batch, rounds=rounds.value, statics=statics)
            program.say(table(some))
            if statics:
                program.say(static_table(some))
            rows += some
        write_whole(path, to_json(rows))
        from benchmarks.inference.speed_plots import plot_speed

        program.say(f"wrote {path}")
        for name in names:
            own_rows = [row for row in rows if row["runtime"] == name]
            if not any(map(is_policy, own_rows)):
                continue
            picture = path.with_suffix(".png" if len(names) == 1 else f".{name}.png")
            program.say(f"wrote {plot_speed(own_rows, picture)}")

    program.run(run)


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
    by_runtime = [_contenders(r, batch) for r in runtimes]
    whole = [functools.partial(c[0].go_through, images[:batch], batch) for c in by_runtime]
    seconds = median_seconds(whole, _TRIES) if len(runtimes) > 1 else [0.0]
    order = np.argsort(seconds, kind="stable")  # the fastest whole network is the reference
    runtimes, by_runtime = [runtimes[k] for k in order], [by_runtime[k] for k in order]
    reference = runtimes[0]
    contenders = [c for some in by_runtime for c in some]
    contenders += [static.contender(reference.name) for static in statics]
    for contender in contenders:
        contender.go_through(images[:batch], batch)
        contender.answer(images[:batch])
    # One of each runtime measures its stages, which up to an exit are a network of their own.
    measuring = [next(c for c in some if not isinstance(c, OneProgram)) for some in by_runtime]
    stage_times = [contender.times for contender in measuring]
    speeds, times = race(contenders, stage_times, images, batch=batch, rounds=rounds)
    macs = macs_of(reference.staged)
    rows, measured = [], iter(zip(contenders, speeds, strict=True))
    for runtime, own_times in zip(runtimes, times, strict=True):
        for candidate in runtime.candidates:
            contender, speed = next(measured)
            shares = candidate.shares(len(images))
            ideal = times[0].whole / own_times.staged(shares) if own_times.stages else None
            row = row_of(
                runtime.name,
                candidate,
                contender,
                speed,
                ideal_speedup=ideal,
                batch=batch,
                macs=macs,
            )
            if candidate.oracles and own_times.stages:
                row["limits"] = limits(candidate.oracles, own_times, times[0].whole, macs)
            rows.append(row)
    for static, (_, speed) in zip(statics, measured, strict=True):
        rows.append(static_row(reference.name, static, speed, batch=batch, macs=macs[-1]))
    return compared(rows)


def _contenders(runtime: Runtime, batch: int) -> list[Any]:
    """Returns what runs for each candidate."""
    staged = runtime.staged
    if runtime.name == TORCH:
        from benchmarks.inference.torch_network import TorchNetwork

        return [TorchNetwork(staged)]
    predictors: dict[str, EarlyExitPredictor] = {}
    contenders: list[OneProgram | EarlyExits] = []
    for candidate in runtime.candidates:
        if candidate.exit_index is not None:
            original = runtime.original or staged
            part = part_of(original, staged, runtime.name, candidate.exit_index)
            contenders.append(OneProgram(part, staged.example))
            continue
        measure = candidate.policy.measure
        if measure not in predictors:
            predictors[measure] = EarlyExitPredictor(
                staged.stages, staged.example, candidate.policy, batch_size=batch
            )
            predictors[measure].warm_up()
        contenders.append(EarlyExits(predictors[measure].with_policy(candidate.policy)))
    return contenders


if __name__ == "__main__":
    main()
