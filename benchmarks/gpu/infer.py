"""Stage `infer`: speed-ups of early exits on this card, in batches of 1, 256 and 1,024.

A network that stage `train` left in `work` also gives the accuracy of its thresholds. Otherwise
weights are random, which takes as long, and thresholds are chosen only for a mean cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.clock import Expected
from benchmarks.gpu.data import VALIDATION_REHEARSED, PackedDatasets
from benchmarks.gpu.session import Session
from benchmarks.gpu.step import NETWORKS, TINY
from benchmarks.gpu.train import TRAINED
from benchmarks.inference.speed import EarlyExits, OneProgram, Speed, race
from benchmarks.training_step.method_costs import changed, noise_like
from dfs_jax.costs.flops import exit_costs
from dfs_jax.data import Dataset
from dfs_jax.inference.budgeted import DEFAULT_BUDGETS, choose_thresholds
from dfs_jax.inference.fitting import outcome
from dfs_jax.inference.policy import NOBODY, Policy
from dfs_jax.inference.predictor import EarlyExitPredictor
from dfs_jax.inference.trained import StagedRun, staged_run
from dfs_jax.program import say
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.config import read_config
from dfs_jax.training.experiment import abstract_state, build_experiment, initial_state
from dfs_jax.types import Config, UserError

SPEEDUPS = (1.5, 2.0, 3.0)  # factors of fewer operations than the whole network's
BATCHES, TINY_BATCHES = (256, 1, 1024), (8, 1)
_BATCHES_TIMED, _ALONE, _ROUNDS = 5, 64, 5
_GUESS_S = 60.0


class Candidate(NamedTuple):
    """A policy and its results.

    Attributes:
      speedup: whole network's operations divided by the mean that it was chosen for.
      policy: the policy.
      macs: mean multiply-adds of one image of the test split.
      accuracy: accuracy on the test split, a fraction; None with random weights.
      shares: fraction of the test images that each exit answers.
    """

    speedup: float
    policy: Policy
    macs: float
    accuracy: float | None
    shares: tuple[float, ...]


def run(session: Session) -> None:
    """Measures networks and batch sizes without a record, as long as time remains."""
    expected = Expected(5.0 if session.rehearses else _GUESS_S)
    batches = TINY_BATCHES if session.rehearses else BATCHES
    for network in NETWORKS:
        trained = (session.work / TRAINED / network).is_dir()
        kind = "trained" if trained else "random"
        wanted = [(b, session.unit(f"{network}/batch{b}/{kind}")) for b in batches]
        wanted = [(b, unit) for b, unit in wanted if session.known(unit) is None]
        if not wanted:
            continue
        if not session.clock.allows(expected.seconds):
            say(f"{session.clock.left():.0f} s are left: too few for {network}")
            return
        staged = _trained(session, network) if trained else _random(session, network)
        candidates = find_candidates(staged, trained=trained)
        for batch, unit in wanted:
            if not session.clock.allows(expected.seconds):
                say(f"{session.clock.left():.0f} s are left: too few for {unit.name}")
                return
            say(f"--- {unit.name}")
            try:
                with expected.timed(session.clock):
                    rows = measure(staged, candidates, batch, rehearses=session.rehearses)
            except Exception as error:
                session.fail(unit, error)
                continue
            session.keep(unit, {"rows": rows})
            for row in rows:
                say(
                    f"{row['policy']:>8}  {row['images_per_second']:12,.0f} images/s  "
                    f"{row['speedup']:.2f} (ideal {row['ideal_speedup']:.2f})"
                )


def find_candidates(staged: StagedRun, *, trained: bool) -> list[Candidate]:
    """Returns thresholds from validation data with about the mean cost of each of `SPEEDUPS`."""
    model, shape = staged.experiment.model, staged.experiment.dataset.image_shape
    macs = [float(cost.macs) for cost in exit_costs(model, shape)]
    logits, labels = staged.logits(staged.experiment.score_split)
    policies = [_policy(row) for row in choose_thresholds(_confidence(logits), DEFAULT_BUDGETS)]
    costs = np.array([outcome(policy, logits, labels, macs).cost for policy in policies])
    reported, truth = staged.logits("test")
    found = []
    for speedup in SPEEDUPS:
        policy = policies[int(np.argmin(np.abs(costs - macs[-1] / speedup)))]
        result = outcome(policy, reported, truth, macs)
        taken = policy.exits(_confidence(reported))
        shares = np.bincount(taken, minlength=len(macs)) / len(taken)
        accuracy = result.accuracy if trained else None
        found.append(Candidate(speedup, policy, result.cost, accuracy, tuple(shares.tolist())))
    return found


def measure(
    staged: StagedRun, candidates: Sequence[Candidate], batch: int, *, rehearses: bool
) -> list[dict[str, Any]]:
    """Returns a row for the whole network, then one per candidate, all timed in turn."""
    count = (4 if rehearses else _ALONE) if batch == 1 else _BATCHES_TIMED * batch
    images = _repeated(staged.images("test", count), count)
    shapes = sorted({1, max(1, batch // 4), max(1, batch // 2), batch})
    predictor = EarlyExitPredictor(
        staged.stages,
        staged.example,
        candidates[0].policy,
        batch_size=batch,
        shapes=shapes,
        fall_back=False,
    )
    predictor.warm_up()
    whole = OneProgram(staged.stages, staged.example)
    early = [EarlyExits(predictor.with_policy(c.policy)) for c in candidates]
    contenders = [whole, *early]
    for contender in contenders:
        contender.go_through(images[:batch], batch)
        contender.answer(images[:batch])
    rounds = 1 if rehearses else _ROUNDS
    speeds, (times,) = race(contenders, [early[0].times], images, batch=batch, rounds=rounds)
    rows = [{"policy": "full", **_speed(speeds[0]), "ideal_speedup": 1.0}]
    for candidate, speed in zip(candidates, speeds[1:], strict=True):
        rows.append(
            {
                "policy": f"{candidate.speedup:g}x",
                **_speed(speed),
                "ideal_speedup": round(times.ideal_speedup(candidate.shares), 4),
                "macs": round(candidate.macs),
                "accuracy": candidate.accuracy,
                "exit_shares": [round(share, 4) for share in candidate.shares],
            }
        )
    return rows


def _trained(session: Session, network: str) -> StagedRun:
    run = session.work / TRAINED / network
    config = read_config(run)
    datasets = PackedDatasets(session.data, rehearses=session.rehearses)
    experiment = build_experiment(config, datasets.of(config))
    checkpoints = Checkpoints(run, read_only=True)
    state, step = checkpoints.restore("best", abstract_state(experiment))
    checkpoints.close()
    return staged_run(experiment, state.eval_variables, step)


def _random(session: Session, network: str) -> StagedRun:
    fields = {"compute_dtype": "bfloat16", "batch_size": 8}
    if session.rehearses:
        fields |= {**TINY[network], "data.validation_examples": VALIDATION_REHEARSED}
    config = changed(NETWORKS[network]("dfs"), fields)
    experiment = build_experiment(config, _images_of(session, config))
    return staged_run(experiment, initial_state(experiment).eval_variables, step=0)


def _images_of(session: Session, config: Config) -> Dataset:
    """Returns the packed set, or noise of its shape if it is not available."""
    try:
        return PackedDatasets(session.data, rehearses=session.rehearses).of(config)
    except UserError as error:
        say(f"on noise: {error}")
        noise = noise_like(config, 125 if session.rehearses else 1250)
        return Dataset(
            noise.name,
            noise.train,
            noise.train,
            noise.test,
            noise.class_names,
            noise.mean,
            noise.std,
        )


def _confidence(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return 1 / shifted.sum(axis=-1)


def _policy(thresholds: Sequence[float] | np.ndarray) -> Policy:
    *early, _ = map(float, thresholds)
    return Policy(tuple(None if t >= NOBODY else t for t in early))


def _repeated(images: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([images] * -(-count // len(images)))[:count]


def _speed(speed: Speed) -> dict[str, float]:
    return {
        "images_per_second": round(1 / speed.seconds, 1),
        "speedup": round(speed.speedup, 4),
        "p50_ms": round(1e3 * speed.p50, 4),
        "p99_ms": round(1e3 * speed.p99, 4),
    }
