"""Golden files: results of another implementation, and their differences from ours.

A golden file (gzipped JSON) names a model, its fork, and the published names and shapes of its
weights, which any program can generate; it holds logits, batch statistics, losses and digests
(norm, sum, first four values) of gradients, all in float64.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dfs_jax.forks import Fork, create_fork
from dfs_jax.interop.torch_names import (
    from_torch_state_dict,
    is_counter,
    to_torch_gradients,
    to_torch_state_dict,
)
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.paths import local_path
from dfs_jax.types import ExitOutputs, PyTree, UserError

INPUT_SEED = 1234
REFERENCINGS = {"exclusive": "symmetric", "full": "trunk_only"}
# Gradients that are zero except for rounding (a bias before a norm) are compared with this
# fraction of the largest gradient instead of with themselves.
NEGLIGIBLE = 1e-9
# Compilation takes longer than a batch of four; at level 0, float64 convolutions are very slow.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}


@dataclasses.dataclass(frozen=True)
class GoldenCase:
    """One golden file, with the fields of the file (no other keys are allowed in it).

    Attributes:
      case, model: names of the case and the model.
      partition, reference, exit_gradient, beta: parameters of the fork; see `fork`.
      batch, image_size, num_classes, labels: the input.
      state_dict: (published name, shape) of every tensor.
      eval_logits, train_logits: logits `[exits, batch, classes]`.
      batch_stats_after: published name -> digest, after one forward pass in training mode.
      losses: name -> {"loss", "grads": published name -> digest, None for exactly zero}.
      options: options of the model other than its number of classes.
    """

    case: str
    model: str
    partition: bool
    reference: bool
    exit_gradient: str
    beta: float | None
    batch: int
    image_size: int
    num_classes: int
    labels: list[int]
    state_dict: list[tuple[str, list[int]]]
    eval_logits: np.ndarray
    train_logits: np.ndarray
    batch_stats_after: dict[str, dict[str, Any]]
    losses: dict[str, dict[str, Any]]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        shape = (self.num_classes, self.batch)
        for name in ("eval_logits", "train_logits"):
            logits = np.asarray(getattr(self, name), np.float64)
            object.__setattr__(self, name, logits)
            if logits.ndim != 3 or logits.shape[:0:-1] != shape:
                raise ValueError(f"{name} has shape {logits.shape}, not [exits, *{shape[::-1]}]")
        if self.exit_gradient not in REFERENCINGS:
            raise ValueError(f"exit_gradient is {self.exit_gradient!r}")
        if len(self.labels) != self.batch or not set(self.labels) <= set(range(self.num_classes)):
            raise ValueError(f"labels are {self.labels}")
        self._check_digests()

    def _check_digests(self) -> None:
        statistics = {name for name, _ in self.state_dict if _is_statistic(name)}
        parameters = {name for name, _ in self.state_dict} - statistics
        counters = set(filter(is_counter, statistics))
        if not self.losses or self.batch_stats_after.keys() != statistics - counters:
            raise ValueError("losses or batch statistics are missing")
        digests = list(self.batch_stats_after.values())
        for name, loss in self.losses.items():
            if not math.isfinite(loss["loss"]) or loss["grads"].keys() != parameters:
                raise ValueError(f"the loss or the gradients' names of {name} do not fit")
            digests += [digest for digest in loss["grads"].values() if digest is not None]
        if not all(math.isfinite(digest["norm"]) and digest["head"] for digest in digests):
            raise ValueError("a digest has no norm or no first values")

    @property
    def partition_ratio(self) -> float:
        """Beta, or 0.5 if it has no meaning."""
        return 0.5 if self.beta is None else self.beta

    @property
    def fork(self) -> Fork:
        """The fork that the flags describe."""
        if not self.partition:
            return create_fork("plain")
        referencing = REFERENCINGS[self.exit_gradient] if self.reference else "none"
        return create_fork("dfs", partition_ratio=self.partition_ratio, referencing=referencing)

    def create_model(self) -> MultiExitModel:
        """Builds the model, with adaptation layers where the weights have them."""
        adapts = any(name.startswith("adaptation_layer") for name, _ in self.state_dict)
        model = create_model(
            self.model, num_classes=self.num_classes, adapt_features=adapts, **self.options
        )
        if model.num_exits != len(self.eval_logits):
            raise UserError(
                f"{self.case}: the file has {len(self.eval_logits)} exits, "
                f"but {self.model} has {model.num_exits}"
            )
        return model


class Results(NamedTuple):
    """Results of our model, in the file's names and layouts.

    Attributes:
      eval_logits, train_logits: logits `[exits, batch, classes]`.
      batch_stats: published name -> array.
      losses, gradients: loss name -> summed loss; loss name -> published name -> array.
    """

    eval_logits: np.ndarray
    train_logits: np.ndarray
    batch_stats: dict[str, np.ndarray]
    losses: dict[str, float]
    gradients: dict[str, dict[str, np.ndarray]]


class Comparison(NamedTuple):
    """Worst relative differences between a golden file and our model.

    Attributes:
      differences: kind of number -> worst difference.
      zeros: number of gradients that must be zero.
      nonzero: names of those that are not.
    """

    differences: dict[str, float]
    zeros: int
    nonzero: list[str]

    def passes(self, tolerance: float) -> bool:
        """Returns whether all differences are within `tolerance` (NaN is not) and zeros exact."""
        return all(d <= tolerance for d in self.differences.values()) and not self.nonzero


def read_golden(path: str | os.PathLike[str]) -> GoldenCase:
    """Reads a golden file.

    Raises:
      UserError: the file is missing, damaged, or not a golden file.
    """
    path = local_path(path, "golden file")
    try:
        fields = json.loads(gzip.decompress(path.read_bytes()))
        return GoldenCase(**fields)
    except FileNotFoundError as error:
        raise UserError(f"there is no golden file {path}: check the path") from error
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} is damaged or not a golden file ({reason}): copy it again"
        ) from error


def draw_state_dict(names_and_shapes: Iterable[tuple[str, Any]]) -> dict[str, np.ndarray]:
    """Generates every tensor with a generator seeded by its name, in PyTorch's layout and float64.

    >>> draw_state_dict([("bn.running_var", [2])])["bn.running_var"].min() >= 0.5
    np.True_
    """
    return {name: _draw(name, tuple(shape)) for name, shape in names_and_shapes}


def draw_images(case: GoldenCase) -> np.ndarray:
    """Generates the case's images, `[batch, height, width, channels]`."""
    rng = np.random.Generator(np.random.PCG64(INPUT_SEED))
    images = rng.standard_normal((case.batch, 3, case.image_size, case.image_size))
    return images.transpose(0, 2, 3, 1)


def compute(case: GoldenCase, model: MultiExitModel) -> Results:
    """Runs our model on a case's weights and input, in the precision that jax is set to.

    Raises:
      UserError: the file's weights do not belong to the model.
    """
    beta = case.partition_ratio
    images = draw_images(case)
    variables = from_torch_state_dict(
        model, draw_state_dict(case.state_dict), partition_ratio=beta, image_shape=images.shape[1:]
    )
    run = jax.jit(_make_run(model, case), compiler_options=COMPILER_OPTIONS)
    outputs = jax.device_get(run(variables, images, np.asarray(case.labels)))
    eval_logits, train_logits, stats, losses, gradients = outputs
    updated = to_torch_state_dict(
        model, {"params": variables["params"], "batch_stats": stats}, partition_ratio=beta
    )
    return Results(
        eval_logits,
        train_logits,
        {name: updated[name] for name in updated if _is_statistic(name) and not is_counter(name)},
        dict(zip(case.losses, losses.tolist(), strict=True)),
        {
            name: to_torch_gradients(
                model, jax.tree.map(lambda g, i=i: g[i], gradients), partition_ratio=beta
            )
            for i, name in enumerate(case.losses)
        },
    )


def compare(case: GoldenCase, results: Results) -> Comparison:
    """Compares our results with the file's; every difference is relative.

    Logits are compared relative to the largest logit, norms and sums of digests to the tensor's
    norm, first values to its root mean square, and losses to the loss.
    """
    logits = [
        _worst(np.abs(ours - theirs).max() / np.abs(theirs).max())
        for ours, theirs in (
            (results.eval_logits, case.eval_logits),
            (results.train_logits, case.train_logits),
        )
    ]
    stats = _digest_differences(results.batch_stats, case.batch_stats_after)
    losses, gradients, zeros, nonzero = [], [], 0, []
    for name, golden in case.losses.items():
        losses.append(abs(results.losses[name] - golden["loss"]) / abs(golden["loss"]))
        ours, digests = results.gradients[name], golden["grads"]
        gradients.append(_digest_differences(ours, {n: d for n, d in digests.items() if d}))
        null = [n for n, digest in digests.items() if digest is None]
        zeros += len(null)
        nonzero += [n for n in null if np.any(ours[n] != 0)]
    by_part = [_worst(*column) for column in zip(*gradients, strict=True)]
    differences = {
        "eval logits": logits[0],
        "train logits": logits[1],
        "batch stats": _worst(*stats),
        "losses": _worst(*losses),
        "grad norms": by_part[0],
        "grad sums": by_part[1],
        "grad values": by_part[2],
    }
    return Comparison(differences, zeros, nonzero)


def _make_run(model: MultiExitModel, case: GoldenCase):
    """Returns a function that computes everything in one program: one forward pass in each mode,
    and one backward pass, mapped over the losses."""
    losses = [create_loss(name) for name in case.losses]
    fork = case.fork

    def run(variables: PyTree, images: jax.Array, labels: jax.Array):
        evaluated = cast(ExitOutputs, model.apply(variables, images, fork))
        stats = variables["batch_stats"]

        def train_pass(params: PyTree) -> tuple[ExitOutputs, PyTree]:
            with nn.intercept_methods(_without_dropout):
                return model.apply(
                    {"params": params, "batch_stats": stats},
                    images,
                    fork,
                    train=True,
                    mutable=["batch_stats"],
                )

        outputs, pullback, updated = jax.vjp(train_pass, variables["params"], has_aux=True)
        asked = [jax.value_and_grad(lambda o, f=f: f(o, labels).sum())(outputs) for f in losses]
        values, cotangents = zip(*asked, strict=True)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cotangents)
        (gradients,) = jax.lax.map(pullback, stacked)
        stats = updated.get("batch_stats", {})
        return evaluated.logits, outputs.logits, stats, jnp.stack(values), gradients

    return run


def _without_dropout(method, args, kwargs, context):
    return args[0] if isinstance(context.module, nn.Dropout) else method(*args, **kwargs)


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    if is_counter(name):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        return 0.5 + rng.random(shape)
    if name.endswith("running_mean"):
        return 0.1 * rng.standard_normal(shape)
    if len(shape) >= 2:
        return rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    noise = 0.1 * rng.standard_normal(shape)
    return 1 + noise if name.endswith("weight") else noise


def _is_statistic(name: str) -> bool:
    return is_counter(name) or name.endswith(("running_mean", "running_var"))


def _digest_differences(
    arrays: Mapping[str, np.ndarray], digests: Mapping[str, Mapping[str, Any]]
) -> list[float]:
    """Returns the worst differences of norms, sums (0 where the file has none), first values."""
    largest = max((digest["norm"] for digest in digests.values()), default=0.0)
    worst = [0.0, 0.0, 0.0]
    for name, digest in digests.items():
        ours = arrays[name].ravel()
        head = np.asarray(digest["head"])
        scale = max(digest["norm"], NEGLIGIBLE * largest)
        found = (
            abs(np.linalg.norm(ours) - digest["norm"]) / scale,
            abs(ours.sum() - digest["sum"]) / scale if "sum" in digest else 0.0,
            np.abs(ours[: head.size] - head).max() / (scale / math.sqrt(ours.size)),
        )
        worst = [_worst(old, new) for old, new in zip(worst, found, strict=True)]
    return worst


def _worst(*differences: float) -> float:
    """Returns the largest difference, or NaN if there is one, which `max` would ignore."""
    return float(np.max(differences, initial=0.0))
