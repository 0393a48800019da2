"""Static networks beside the early exits: smaller networks that run whole for every image.

Early exits pay only where no smaller network is as accurate and as fast. The networks come from
other runs on the same data, such as those of a narrower network with a single exit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from benchmarks.inference.runtimes import JAX, TORCH, Files, files_of, in_runtime
from benchmarks.inference.speed import Contender, OneProgram
from dfs_jax.costs.flops import exit_costs
from dfs_jax.inference.trained import StagedRun, load_staged
from dfs_jax.paths import UserPath, input_directory, shown
from dfs_jax.tables import aligned
from dfs_jax.types import UserError

PREFIX = "static "  # of the names of rows
# Fields of a policy's row if there are static networks.
KEYS = ("static", "speedup_over_static")

Row = Mapping[str, Any]


class StaticNetwork(NamedTuple):
    """A network that runs whole for every image, up to its last exit.

    Attributes:
      name: name of the row.
      staged: best checkpoint of its run.
      accuracy: accuracy of the last exit on the whole test split, a fraction.
      macs: multiply-adds of one image, without early heads.
      files: its files for the runtimes that need them (`runtimes.files_of`).
    """

    name: str
    staged: StagedRun
    accuracy: float
    macs: float
    files: Files = MappingProxyType({})

    def contender(self, runtime: str = JAX) -> Contender:
        """Returns the network as one program of a runtime."""
        if runtime == TORCH:
            from benchmarks.inference.torch_network import TorchNetwork

            return TorchNetwork(self.staged)
        staged = in_runtime(self.staged, runtime, self.files)
        return OneProgram(staged.stages, staged.example)


def static_directories(given: Sequence[UserPath], workdir: Path) -> list[Path]:
    """Returns the directories of static networks' runs.

    Args:
      given: paths as the user wrote them.
      workdir: directory of the run with early exits.

    Raises:
      UserError: a directory that does not exist, is `workdir`, or is given twice.
    """
    paths = [input_directory(path, "--static") for path in given]
    known = {workdir.resolve()}
    for path in paths:
        if path.resolve() == workdir.resolve():
            raise UserError(
                f"--static {shown(path)} is the run of --workdir, which is row `full` of the "
                f"table: name the run of a smaller network"
            )
        if path.resolve() in known:
            raise UserError(f"--static {shown(path)} is given twice: name each run once")
        known.add(path.resolve())
    return paths


def load_static(
    paths: Sequence[Path],
    staged: StagedRun,
    images: np.ndarray,
    runtimes: Sequence[str] = (JAX,),
    *,
    weight_bits: int = 7,
    data_dir: str | None = None,
) -> list[StaticNetwork]:
    """Returns the best checkpoints of other runs as static networks.

    Args:
      paths: directories of the runs.
      staged: run with early exits.
      images: test images that are timed, from the first.
      runtimes: runtimes in which they may be timed.
      weight_bits: bits of a weight in int8.
      data_dir: directory of the data, if it has moved.

    Raises:
      UserError: no run, or a run with other classes, another image shape or other test examples.
    """
    names = [path.name for path in paths]
    shorts = [path.name if names.count(path.name) == 1 else str(path) for path in paths]
    if not paths:
        return []
    _, labels = staged.logits("test")
    loaded = [
        _load(PREFIX + short, path, staged, labels, images, data_dir)
        for short, path in zip(shorts, paths, strict=True)
    ]
    return [
        static._replace(files=files_of(static.staged, runtimes, weight_bits)) for static in loaded
    ]


def is_static(row: Row) -> bool:
    """Returns whether a row of the benchmark is a static network's."""
    return row["policy"].startswith(PREFIX)


def is_policy(row: Row) -> bool:
    """Returns whether a row is a policy's; the others run one program for every image."""
    return not (row["policy"] == "full" or row["policy"].startswith("exit ") or is_static(row))


def compared(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the rows of one batch size; each policy's also names a static network.

    Policies of slower runtimes than that of the static networks, the fastest, have none.

    static               the nearest in accuracy; the faster one of two that are equally near
    speedup_over_static  the policy's throughput over that of this network, from their speed-ups
                         over `full`, which cancel the drift of the machine's speed
    """
    statics = [row for row in rows if is_static(row)]
    if not statics:
        return list(map(dict, rows))

    def beside(row: Row) -> dict[str, Any]:
        if not is_policy(row) or row["runtime"] != statics[0]["runtime"]:
            return dict(row)
        nearest = min(statics, key=lambda s: (abs(s["accuracy"] - row["accuracy"]), -s["speedup"]))
        values = nearest["policy"], row["speedup"] / nearest["speedup"]
        return {**row, **dict(zip(KEYS, values, strict=True))}

    return list(map(beside, rows))


def static_table(rows: Sequence[Row]) -> str:
    """Returns a table of each policy and its nearest static network, and a verdict.

    Args:
      rows: rows of one batch size, as `compared` returns them, with static networks.
    """
    policies = [row for row in rows if KEYS[0] in row]
    of_static = {row["policy"]: row["accuracy"] for row in rows if is_static(row)}
    titles = ("policy", "accuracy", "nearest static network", "accuracy", "throughput ratio")
    lines = [
        (
            row["policy"],
            f"{100 * row['accuracy']:.2f} %",
            row["static"].removeprefix(PREFIX),
            f"{100 * of_static[row['static']]:.2f} %",
            f"{row['speedup_over_static']:.2f}",
        )
        for row in policies
    ]
    return f"{aligned([titles, *lines])}\n{verdict(rows)}"


def verdict(rows: Sequence[Row]) -> str:
    """Returns a sentence on the policies that a static network beats in a batch size.

    A static network beats a policy if it is faster and no less accurate.

    Args:
      rows: rows of one batch size, as `compared` returns them.
    """
    beaten, policies = [], [row for row in rows if KEYS[0] in row]
    for row in policies:
        better = [
            static
            for static in rows
            if is_static(static)
            and static["speedup"] > row["speedup"]
            and static["accuracy"] >= row["accuracy"]
        ]
        if better:
            best = max(better, key=lambda static: static["speedup"])
            beaten.append(f"{row['policy']} ({best['policy'].removeprefix(PREFIX)})")
    start = f"in batches of {rows[0]['batch']}, "
    if not beaten:
        return f"{start}no static network is faster than a policy at no less accuracy"
    return (
        f"{start}a static network is faster at no less accuracy than {len(beaten)} of "
        f"{len(policies)} policies: {', '.join(beaten)}"
    )


def _load(
    name: str,
    path: Path,
    staged: StagedRun,
    labels: np.ndarray,
    images: np.ndarray,
    data_dir: str | None,
) -> StaticNetwork:
    static = load_staged(path, data_dir=data_dir)
    ours, other = staged.experiment.dataset, static.experiment.dataset
    said = f"--static {shown(path)} cannot be compared with the run of --workdir: it has"
    remedy = "name a run on the same data"
    if other.image_shape != ours.image_shape:
        shapes = ("x".join(map(str, d.image_shape)) for d in (other, ours))
        raise UserError(f"{said} images of {' instead of '.join(shapes)}, {remedy}")
    if tuple(other.class_names) != tuple(ours.class_names):
        raise UserError(
            f"{said} other classes ({_some(other.class_names)} instead of "
            f"{_some(ours.class_names)}), {remedy}"
        )
    logits, own_labels = static.logits("test")
    if not (
        np.array_equal(own_labels, labels)
        and np.array_equal(static.images("test", len(images)), images)
    ):
        raise UserError(f"{said} other test examples ({other.name} here), {remedy}")
    accuracy = float((logits[-1].argmax(-1) == labels).mean())
    costs = exit_costs(static.experiment.model, other.image_shape)
    return StaticNetwork(name, static, accuracy, float(costs[-1].macs_without_earlier_heads))


def _some(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
