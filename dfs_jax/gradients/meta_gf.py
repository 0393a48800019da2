"""Meta-GF: fuses the exits' gradients with learned weights, one for each tensor and exit."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dfs_jax.gradients.look_ahead import exits_weighted, learn, look_ahead, tried
from dfs_jax.gradients.rule import (
    Batch,
    GradientRule,
    Outcome,
    RuleStep,
    Setup,
    StepParts,
    Trained,
)
from dfs_jax.models.contract import split_trunk_and_heads
from dfs_jax.types import PyTree, TrunkAndHeads, UserError, check_whole

GRANULARITIES = ("tensor", "channel")
# Maps v to the scores of a softmax: softmax(log sigmoid(v)) is sigmoid(v) over its sum.
NORMALISATIONS = {"softmax": lambda v: v, "sigmoid": jax.nn.log_sigmoid}
SCALINGS = ("sum", "mean")
AUXILIARY, MEMORY = 0.1, 0.9


class Fusion(NamedTuple):
    """State of Meta-GF.

    Attributes:
      logits: logits v of the weights, in the structure of the trunk: `[exits]` or
        `[exits, channels]` for each tensor.
      opt_state: state of the optimizer of the logits.
      rounds: progress of a round; None if gradients are fused at every step.
    """

    logits: PyTree
    opt_state: PyTree
    rounds: Rounds | None


class Rounds(NamedTuple):
    """Progress of a round in which exits are trained one after another.

    Attributes:
      steps: number of steps taken, over all rounds.
      params: parameters of the exit that is being trained; the run's own stay as they were when
        the round began.
      moved: change of the parameters by each exit's training, in the structure of exit gradients.
      logits: logits when the round began.
    """

    steps: jax.Array
    params: PyTree
    moved: TrunkAndHeads
    logits: PyTree


@dataclasses.dataclass(frozen=True)
class MetaGF(GradientRule):
    """Fuses the exits' gradients with weights that learn from the losses after a trial step.

        fused_t = c sum_i a_it g_it,   a_it = e(v_it) / sum_j e(v_jt)       for each tensor t
        v <- v - Adam's update of d/dv sum_i l_i(params - update of fused(v))

    where the sum runs over the exits i whose gradient in the tensor is not all zero. Heads keep the
    gradient of their own exit. The trial applies the optimizer's whole update, momentum included,
    on the step's own batch; the step then uses the weights just learned.

    With a `window`, gradients are averaged over many steps, as in the published program: each exit
    is trained alone for `window` steps, from the same parameters; then v learns for `window` steps
    from the losses at the parameters moved by the fused g, and these become the run's parameters.
    Here g_i is the change of the parameters by exit i's own training.

    Args:
      learning_rate: learning rate of v; None is 0.01, and 0.1 with a window. The published program
        uses 0.1 with a window of an epoch; without a window, such a v would follow the noise.
      granularity: unit that has a weight: a "tensor", or a "channel" of its outputs. The published
        program uses channels for VGG and tensors for ResNet and MSDNet.
      normalisation: function e: "softmax" (e is exp), as in the paper and in the program for VGG,
        or "sigmoid", as in the program for ResNet and MSDNet.
      scaling: factor c: "sum", the number of exits that reach the tensor, with which equal weights
        give the sum, or "mean", 1. None is "mean" with a window, as published, else "sum".
      window: number of steps that each exit is trained for in a round; the published program uses
        an epoch. None fuses gradients at every step.
      auxiliary: weight of the other exits' losses while an exit is trained, only with a window;
        None is 0.1. The published program also has a factor for each exit.
      memory: weight of the logits from the start of a round in those at the start of the next one,
        only with a window; None is 0.9, published for ResNet and MSDNet (0.1 for VGG).

    Raises:
      ValueError: an argument outside its range, or `auxiliary` or `memory` without a window.

    Reference: Sun et al., "Meta-GF: Training Dynamic-Depth Neural Networks Harmoniously", ECCV
    2022. In its program the optimizer is not used while v learns. Here it keeps stepping, so that
    schedules continue: its momentum takes in the gradients at the moved parameters, but its updates
    are discarded.

    Example: equal weights give the sum of the gradients.
      >>> grads = TrunkAndHeads({"block1": jnp.array([[1.0, 2.0], [10.0, 20.0]])}, {})
      >>> MetaGF().fused(grads, {"block1": jnp.zeros(2)})
      {'block1': Array([11., 22.], dtype=float32)}
    """

    learning_rate: float | None = None
    granularity: str = "tensor"
    normalisation: str = "softmax"
    scaling: str | None = None
    window: int | None = None
    auxiliary: float | None = None
    memory: float | None = None

    takes_exit_gradients: ClassVar[bool] = True
    needs_blocks: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    def __post_init__(self):
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate!r}")
        for field, known in _CHOICES.items():
            value = getattr(self, field)
            if value not in known and not (field == "scaling" and value is None):
                raise ValueError(f"{field} must be one of {', '.join(known)}, got {value!r}")
        if self.window is not None:
            check_whole("window", self.window)
        for field in ("auxiliary", "memory"):
            value = getattr(self, field)
            if value is not None and self.window is None:
                raise ValueError(f"{field}={value!r} has no effect without a window: set both")
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{field} must lie in [0, 1), got {value!r}")

    def check(self, setup: Setup) -> None:
        """Raises UserError if the run would end within a round."""
        if self.window is None:
            return
        steps = self._steps_a_round(setup.num_exits)
        if setup.total_steps % steps:
            raise UserError(
                f"gradients.window={self.window} makes rounds of {steps} steps for "
                f"{setup.num_exits} exits, which do not divide the run's {setup.total_steps}: the "
                f"last one would be lost; choose another window or number of epochs"
            )

    def published_loop(self, num_exits: int) -> str:
        """Describes the passes of the published program over its data in an epoch."""
        return f"{num_exits + 1} passes an epoch: one for each exit, one to learn the weights"

    def init(self, params: PyTree, num_exits: int, key: jax.Array) -> Fusion:
        """Returns the state before the first step, with equal weights."""
        del key
        trunk, _ = split_trunk_and_heads(params)
        by_channel = self.granularity == "channel"

        def zeros(leaf: jax.Array) -> jax.Array:
            channels = leaf.shape[-1:] if by_channel else ()
            return jnp.zeros((num_exits, *channels), leaf.dtype)

        logits = jax.tree.map(zeros, trunk)
        rounds = None if self.window is None else _first_round(params, logits, num_exits)
        return Fusion(logits, self._optimizer.init(logits), rounds)

    def wrap(self, parts: StepParts) -> RuleStep:
        """Returns the training step: a fusion of gradients, or one step of a round."""
        return self._step(parts) if self.window is None else self._step_of_round(parts)

    def fused(self, grads: TrunkAndHeads, logits: PyTree) -> PyTree:
        """Returns fused gradients, shaped as the parameters.

        Args:
          grads: gradients of the trunk by exit, `[k, ...]` of the last k exits, and of the heads.
          logits: logits of the weights, see `Fusion`.
        """
        return {**jax.tree.map(self._fuse, grads.trunk, logits), **grads.heads}

    def _step(self, parts: StepParts) -> RuleStep:
        def step(trained: Trained, state: Fusion, batch: Batch) -> Outcome:
            found = parts.exit_gradients(trained, batch)

            def trial(logits: PyTree) -> Trained:
                return tried(parts, trained, self.fused(found.grads, logits))

            again = batch._replace(dropout_key=jax.random.fold_in(batch.dropout_key, 1))
            grads, _ = look_ahead(
                trial, state.logits, lambda ahead: parts.gradients(ahead, again, parts.loss)
            )
            logits, opt_state = learn(self._optimizer, grads, state.opt_state, state.logits)
            trained, updates = parts.update(
                trained._replace(batch_stats=found.batch_stats), self.fused(found.grads, logits)
            )
            state = Fusion(logits, opt_state, None)
            return Outcome(trained, state, found.loss, found.logits, updates)

        return step

    def _step_of_round(self, parts: StepParts) -> RuleStep:
        exits, window = parts.num_exits, self.window or 1
        others = AUXILIARY if self.auxiliary is None else self.auxiliary

        def step(trained: Trained, state: Fusion, batch: Batch) -> Outcome:
            rounds: Any = state.rounds
            turn = rounds.steps // window % (exits + 1)
            is_fusion = turn == exits
            is_end = (rounds.steps + 1) % window == 0
            alone = jnp.where(jnp.arange(exits) == turn, 1, others)
            loss = exits_weighted(parts.loss, jnp.where(is_fusion, 1, alone))

            def place(logits: PyTree) -> Trained:
                moved = optax.apply_updates(trained.params, self.fused(rounds.moved, logits))
                return trained._replace(params=_either(is_fusion, moved, rounds.params))

            grads, found = look_ahead(
                place, state.logits, lambda at: parts.gradients(at, batch, loss)
            )
            learned = learn(self._optimizer, grads, state.opt_state, state.logits)
            logits, opt_state = _either(is_fusion, learned, (state.logits, state.opt_state))
            after, updates = parts.update(trained._replace(params=rounds.params), found.grads)
            moved = _record(rounds.moved, after.params, trained.params, turn, is_end, exits)
            ends = is_fusion & is_end
            params = _either(ends, place(logits).params, trained.params)
            new = after._replace(params=params, batch_stats=found.batch_stats)
            logits = _either(ends, self._remembered(rounds.logits, logits), logits)
            rounds = Rounds(
                rounds.steps + 1,
                _either(is_fusion | is_end, params, after.params),
                moved,
                _either(ends, logits, rounds.logits),
            )
            state = Fusion(logits, opt_state, rounds)
            return Outcome(new, state, found.loss, found.logits, updates)

        return step

    def _fuse(self, leaf: jax.Array, logits: jax.Array) -> jax.Array:
        """Fuses one tensor's gradients `[k, ...]`; an exit with zero gradient has weight zero."""
        own = logits[len(logits) - len(leaf) :]
        inner = tuple(range(1, leaf.ndim - own.ndim + 1))
        reaches = jnp.any(leaf != 0, axis=inner)
        scores = NORMALISATIONS[self.normalisation](own)
        lowest = jnp.finfo(scores.dtype).min
        weights = jax.nn.softmax(jnp.where(reaches, scores, lowest), axis=0)
        if self._scaling == "sum":
            weights = weights * reaches.sum(0).astype(weights.dtype)
        return jnp.sum(jnp.expand_dims(weights, inner) * leaf, axis=0)

    def _remembered(self, before: PyTree, now: PyTree) -> PyTree:
        memory = MEMORY if self.memory is None else self.memory
        return optax.incremental_update(now, before, step_size=1 - memory)

    def _steps_a_round(self, num_exits: int) -> int:
        return (num_exits + 1) * (self.window or 1)

    @property
    def _scaling(self) -> str:
        return self.scaling or ("sum" if self.window is None else "mean")

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        default = 0.01 if self.window is None else 0.1
        return optax.adam(default if self.learning_rate is None else self.learning_rate)


_CHOICES = {
    "granularity": GRANULARITIES,
    "normalisation": tuple(NORMALISATIONS),
    "scaling": SCALINGS,
}


def _first_round(params: PyTree, logits: PyTree, num_exits: int) -> Rounds:
    trunk, heads = split_trunk_and_heads(params)

    def rows(name: str, tree: PyTree) -> PyTree:
        count = num_exits - _place(name)
        return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), tree)

    by_exit = {name: rows(name, tree) for name, tree in trunk.items()}
    moved = TrunkAndHeads(by_exit, jax.tree.map(jnp.zeros_like, heads))
    copied = jax.tree.map(jnp.copy, (params, logits))  # the step donates each array of its state
    return Rounds(jnp.int32(0), copied[0], moved, copied[1])


def _record(
    moved: TrunkAndHeads,
    params: PyTree,
    start: PyTree,
    turn: jax.Array,
    is_end: jax.Array,
    exits: int,
) -> TrunkAndHeads:
    """Records how far the training of an exit has moved the parameters that it reaches."""
    trunk, heads = split_trunk_and_heads(jax.tree.map(jnp.subtract, params, start))

    def by_exit(rows: jax.Array, change: jax.Array) -> jax.Array:
        is_row = jnp.arange(len(rows)) == turn - (exits - len(rows))
        is_row = jnp.expand_dims(is_row & is_end, range(1, rows.ndim))
        return jnp.where(is_row, change[None], rows)

    return TrunkAndHeads(
        jax.tree.map(by_exit, moved.trunk, trunk),
        {
            name: _either(is_end & (turn == _place(name)), heads[name], moved.heads[name])
            for name in heads
        },
    )


def _place(name: str) -> int:
    """Returns the 0-based exit that a block or head belongs to: 1 for `block2` or `head2`."""
    return int(name.removeprefix("block").removeprefix("head")) - 1


def _either(condition: jax.Array, then: PyTree, otherwise: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), then, otherwise)
