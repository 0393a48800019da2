"""Stage `train`: the published settings on CIFAR-100, cell by cell in order of importance.

Cells are those of the suite `paper` of `benchmarks.accuracy`, recorded as there. A cell that is
unfinished at the time limit is saved twice: in `work`, where the same command continues it, and as
pieces (`benchmarks.gpu.transport`), from which another machine can continue.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.accuracy.cells import Cell, Suite, cell_config, choose, config_hash
from benchmarks.accuracy.results import (
    DIRECTORY,
    Record,
    Results,
    finished_record,
    read_records,
)
from benchmarks.accuracy.runner import run_cells, run_directory
from benchmarks.accuracy.suites import paper
from benchmarks.gpu.clock import SECONDS_TO_SAVE, rescued, stops_in_time
from benchmarks.gpu.data import VALIDATION_REHEARSED, PackedDatasets
from benchmarks.gpu.session import Session, card
from benchmarks.gpu.step import TINY
from benchmarks.gpu.transport import read_run, remove_run, restore_state, save_run
from dfs_jax.data import Dataset
from dfs_jax.files import write_whole
from dfs_jax.program import say
from dfs_jax.training.checkpoint import Checkpoints, has_steps
from dfs_jax.training.config import open_workdir
from dfs_jax.training.experiment import abstract_state, build_experiment
from dfs_jax.types import Config, UserError

DATA = "cifar100"
SESSIONS = "sessions.json"
TRAINED = "trained"
# Without enough time for compilation, a cell is not started.
LEAST_S, LEAST_REHEARSED_S = 90.0, 5.0
_REHEARSED_RESERVE_S = 30.0
REHEARSED_EPOCHS = 2
REHEARSED = (
    ("cifar100_vgg7", "dsn"),
    ("cifar100_vgg7", "static_w32"),
    ("cifar100_resnet18", "dfs"),
    ("cifar100_resnet18", "static_w32"),
    ("cifar100_msdnet", "pcgrad"),
)
# Fields that a run may change when it continues. An epoch of 45,000 images in batches of 500 is one
# dispatch.
_ON_THE_CARD = {"log_every_steps": 90, "steps_per_dispatch": 90}


def run(session: Session) -> int:
    """Trains unfinished cells, as long as time remains; returns 1 if a cell failed, else 0."""
    suite = create_suite(session.rehearses, flags.FLAGS.epochs)
    cells = choose(suite.cells, flags.FLAGS.cells, ())
    results = Results(session.output / "paper.json", session.work / "locks")
    datasets = PackedDatasets(session.data, rehearses=session.rehearses)
    runs = session.work / "runs"
    datasets.of(cell_config(suite, cells[0]))  # reports a missing set at the start
    carried = _continue_carried(session, suite, datasets, runs)
    left = _unfinished(session, suite, cells)
    left.sort(key=lambda cell: cell.name != carried)  # the unfinished run comes first
    say(f"{len(left)} of {len(cells)} cells are not finished")
    reserve = _REHEARSED_RESERVE_S if session.rehearses else SECONDS_TO_SAVE
    least = LEAST_REHEARSED_S if session.rehearses else LEAST_S

    def save() -> None:
        _save_unfinished(session, suite, left, datasets, runs)

    with stops_in_time(session.clock, reserve), rescued(session.clock, save, reserve / 2):
        outcome = run_cells(
            suite,
            left,
            results,
            runs,
            minutes=max(session.clock.left() - reserve - least, 0.0) / 60,
            datasets=datasets,
            dispose=_disposer(session, results),
        )
    say(f"{outcome.finished} cells finished, {outcome.failed} failed")
    if outcome.stopped:
        say(f"stopped ({outcome.stopped}): the same command continues")
    save()
    return 1 if outcome.failed else 0


def create_suite(rehearses: bool, fraction: float) -> Suite:
    """Returns the cells of `paper` on CIFAR-100; other epochs than published are in their names.

    Args:
      rehearses: whether to use tiny networks and two epochs.
      fraction: fraction of the published epochs.

    Raises:
      UserError: a fraction that is not above 0.
    """
    if not fraction > 0:
        raise UserError(f"epochs must be above 0, a fraction of the published ones, got {fraction}")
    suite = paper()
    cells = tuple(cell for cell in suite.cells if cell.data == DATA)
    if rehearses:
        by_place = {(c.network, c.method): c for c in cells if c.seed == 0}
        small = tuple(by_place[place]._replace(epochs=REHEARSED_EPOCHS) for place in REHEARSED)
        return suite._replace(cells=small, config_of=_tiny(suite.config_of))
    cells = tuple(cell._replace(epochs=max(1, round(fraction * cell.epochs))) for cell in cells)
    return suite._replace(cells=cells, config_of=_on_the_card(suite.config_of))


def _on_the_card(config_of: Callable[[Cell], Config]) -> Callable[[Cell], Config]:
    def configured(cell: Cell) -> Config:
        config = config_of(cell)
        config.update_from_flattened_dict(_ON_THE_CARD)
        return config

    return configured


def _tiny(config_of: Callable[[Cell], Config]) -> Callable[[Cell], Config]:
    def configured(cell: Cell) -> Config:
        config = _on_the_card(config_of)(cell)
        network = cell.network.removeprefix(f"{DATA}_")
        config.update_from_flattened_dict(
            {
                **TINY[network],
                "batch_size": 50,
                "eval_batch_size": 50,
                "log_every_steps": 2,
                "data.validation_examples": VALIDATION_REHEARSED,
            }
        )
        if config.conflict_every_steps:  # only 200 images remain
            config.conflict_every_steps = cell.epochs * 4
        return config

    return configured


def _unfinished(session: Session, suite: Suite, cells: Sequence[Cell]) -> list[Cell]:
    """Returns the cells that are finished neither here nor in earlier results."""
    known = [session.output / "paper.json", DIRECTORY / "paper.json"]
    if session.carried is not None:
        known.append(session.carried / "paper.json")
    records = [read_records(path) for path in known]

    def is_finished(cell: Cell) -> bool:
        wanted = config_hash(cell_config(suite, cell))
        return any(finished_record(found, cell, wanted) is not None for found in records)

    return [cell for cell in cells if not is_finished(cell)]


def _disposer(session: Session, results: Results) -> Callable[[Cell, Path], None]:
    """Returns a function for finished runs, which records their cards and keeps DFS networks."""

    def dispose(cell: Cell, run: Path) -> None:
        sessions = [*read_sessions(run), {"card": card()}]
        results.add(cell, {"sessions": sessions})
        remove_run(session.output)
        if cell.method in ("dfs", "dfs_beta0.5") and cell.seed == 0:
            trained = session.work / TRAINED / cell.network.removeprefix(f"{DATA}_")
            shutil.rmtree(trained, ignore_errors=True)
            trained.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(run, trained)
        else:
            shutil.rmtree(run, ignore_errors=True)

    return dispose


def read_sessions(run: Path) -> list[Record]:
    """Returns the earlier sessions of a run: card, step, and whether its state was rounded."""
    path = run / SESSIONS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _save_unfinished(
    session: Session, suite: Suite, cells: Sequence[Cell], datasets: PackedDatasets, runs: Path
) -> None:
    """Writes the unfinished run as pieces."""
    for cell in cells:
        config = cell_config(suite, cell)
        known_as = config_hash(config)
        run = run_directory(runs, cell, known_as)
        if not has_steps(run):
            continue
        state, step, total = _restore(config, run, datasets.of(config))
        sessions = [*read_sessions(run), {"card": card(), "step": step}]
        write_whole(run / SESSIONS, json.dumps(sessions))
        about = {"cell": cell.name, "config_hash": known_as, "step": step, "steps": total}
        try:
            manifest = save_run(
                run,
                state,
                about,
                session.output,
                piece_mib=flags.FLAGS.piece_mib,
                pieces_mib=flags.FLAGS.pieces_mib,
            )
        except UserError as error:
            say(f"{cell.name} stays on this machine: {error}")
            return
        rounded = ", rounded to fit" if manifest["rounded"] else ""
        say(
            f"{cell.name} after step {step} of {total} in {len(manifest['pieces'])} pieces{rounded}"
        )
        return


def _restore(config: Config, run: Path, dataset: Dataset) -> tuple[Any, int, int]:
    """Returns the latest state, its step and the run's steps; changes nothing on disk."""
    experiment = build_experiment(config, dataset)
    checkpoints = Checkpoints(run, read_only=True)
    try:
        state, step = checkpoints.restore("latest", abstract_state(experiment))
    finally:
        checkpoints.close()
    return state, step, experiment.total_steps


def _continue_carried(
    session: Session, suite: Suite, datasets: PackedDatasets, runs: Path
) -> str | None:
    """Unpacks the run from another machine and returns its cell's name; None without one."""
    found = None if session.carried is None else read_run(session.carried)
    if found is None:
        return None
    manifest, content = found
    cell = next((cell for cell in suite.cells if cell.name == manifest["cell"]), None)
    if cell is None or config_hash(cell_config(suite, cell)) != manifest["config_hash"]:
        say(f"the run of {manifest['cell']} that was carried is of another config: left alone")
        return None
    config = cell_config(suite, cell)
    run = run_directory(runs, cell, manifest["config_hash"])
    if has_steps(run):
        return cell.name
    experiment = build_experiment(config, datasets.of(config))
    state = restore_state(manifest, content, abstract_state(experiment))
    open_workdir(run, config)
    for name, text in manifest["files"].items():
        write_whole(run / name, text)
    sessions = read_sessions(run)
    sessions[-1]["rounded"] = manifest["rounded"]
    write_whole(run / SESSIONS, json.dumps(sessions))
    checkpoints = Checkpoints(run)
    checkpoints.save(state, manifest["step"], score=None)
    checkpoints.close()
    say(f"{cell.name} continues after step {manifest['step']}")
    return cell.name
