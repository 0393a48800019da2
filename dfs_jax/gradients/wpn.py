"""WPN: a small network learns the weight of each example's loss at each exit."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax

from dfs_jax.exits.distribution import exit_distribution
from dfs_jax.gradients.look_ahead import examples_weighted, learn, look_ahead, tried
from dfs_jax.gradients.rule import (
    Batch,
    GradientRule,
    Outcome,
    RuleStep,
    Setup,
    StepParts,
    Trained,
)
from dfs_jax.losses import Loss, LossFunction
from dfs_jax.types import ExitOutputs, PyTree, UserError, check_whole

# Axes of `[exits, batch]` over which the predictions are centred.
CENTRES = {"all": (0, 1), "examples": (1,), "exits": (0,)}


class Prediction(NamedTuple):
    """State of WPN.

    Attributes:
      params: parameters theta of the weight prediction network.
      opt_state: state of its optimizer.
      steps: number of steps taken.
    """

    params: PyTree
    opt_state: PyTree
    steps: jax.Array


class WeightPredictor(nn.Module):
    """Maps examples' losses at all exits, `[examples, exits]`, to values in (-1, 1) of that shape.

    Attributes:
      num_exits: number of exits.
      hidden_size: number of units in a hidden layer.
      hidden_layers: number of hidden layers, each with ReLU.
    """

    num_exits: int
    hidden_size: int
    hidden_layers: int

    @nn.compact
    def __call__(self, losses: jax.Array) -> jax.Array:
        x = losses
        for _ in range(self.hidden_layers):
            x = nn.relu(nn.Dense(self.hidden_size, param_dtype=losses.dtype)(x))
        return jnp.tanh(nn.Dense(self.num_exits, param_dtype=losses.dtype)(x))


@dataclasses.dataclass(frozen=True)
class WPN(GradientRule):
    """Weights the losses of examples; the weights learn from the exits where examples will leave.

        loss = sum_i mean_n w_in l_in,   w = 1 + e (r - mean r),   r = tanh(network(l_1n .. l_Ln))
        theta <- theta - Adam's update of d/dtheta sum_i mean over S_i of l_in(trial)
        trial = params - update of the gradient of the weighted loss

    The trial is a step on one half of the batch, the optimizer's momentum included. The losses
    after it are those of the other half, where each example counts at one exit: exit by exit,
    shallow first, S_i holds the floor(n q_i) most confident examples that no earlier exit took, and
    the last exit takes the rest. q is the distribution of budgeted inference,
    `exit_distribution(p)`. The step itself uses the whole batch and the weights that theta then
    predicts. The published program makes two such steps, one on each half.

    Args:
      learning_rate: constant learning rate of theta. The published programs start from 1e-4 and
        decay it by a cosine.
      weight_decay: weight decay of theta, added to its gradient.
      hidden_size: number of units in a hidden layer of the network.
      hidden_layers: number of hidden layers of the network.
      strength: factor e, the scale of a weight's deviation from 1, in [0, 1).
      centre: axes of the mean of r: "all" exits and examples, as published; "examples", a mean for
        each exit; or "exits", a mean for each example.
      p: parameter of q, positive; below 1 most examples leave early. The published program uses
        0.75 for ImageNet and 1 by default.
      exchange: whether a trial is made on each half in turn, as published; theta then learns twice
        a step.
      interval: number of steps from one trial to the next. The published program uses 100 for
        ImageNet and 1 by default.

    Raises:
      ValueError: an argument outside its range.

    Reference: Han et al., "Learning to Weight Samples for Dynamic Early-exiting Networks", ECCV
    2022.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    hidden_size: int = 500
    hidden_layers: int = 1
    strength: float = 0.3
    centre: str = "all"
    p: float = 0.75
    exchange: bool = False
    interval: int = 1

    looks_ahead: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate!r}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay!r}")
        for field in ("hidden_size", "hidden_layers", "interval"):
            check_whole(field, getattr(self, field))
        if not 0 <= self.strength < 1:
            raise ValueError(f"strength must lie in [0, 1), got {self.strength!r}")
        if self.centre not in CENTRES:
            raise ValueError(f"centre must be one of {', '.join(CENTRES)}, got {self.centre!r}")
        exit_distribution(self.p, 1)

    def check(self, setup: Setup) -> None:
        """Raises UserError if the loss has no example losses or the batch cannot be halved."""
        if not setup.loss.is_mean_of_examples:
            raise UserError(
                f"wpn weighs examples, and loss {setup.loss.label} does not say what each "
                f"one's is: give it example_losses(outputs, labels), or choose another loss"
            )
        if setup.accumulate_steps > 1:
            raise UserError(
                f"wpn weighs the examples of a batch against each other, not in "
                f"accumulate_steps={setup.accumulate_steps} micro batches: leave it unset"
            )
        if setup.batch_size % (2 * setup.batch_parts):
            raise UserError(
                f"wpn tries a step on half of the batch: batch_size "
                f"{setup.batch_size} must be a multiple of {2 * setup.batch_parts}"
            )
        if setup.batch_size // 2 % setup.batch_norm_groups:
            raise UserError(
                f"wpn tries a step on half of the batch, {setup.batch_size // 2} "
                f"examples, which batch_norm_groups={setup.batch_norm_groups} does not divide"
            )

    def published_loop(self, num_exits: int) -> str:
        """Describes the passes of the published program over its data in an epoch."""
        del num_exits
        return (
            "3 passes an epoch, trial, look ahead and step, and one back through the trial's "
            "gradients"
        )

    def init(self, params: PyTree, num_exits: int, key: jax.Array) -> Prediction:
        """Returns the state before the first step, with a randomly initialised network."""
        dtype = jax.tree.leaves(params)[0].dtype
        theta = self._network(num_exits).init(key, jnp.zeros((1, num_exits), dtype))
        return Prediction(theta, self._optimizer.init(theta), jnp.int32(0))

    def wrap(self, parts: StepParts) -> RuleStep:
        """Returns the training step: a trial that theta learns from, then a weighted update."""

        def step(trained: Trained, state: Prediction, batch: Batch) -> Outcome:
            def learned(state: Prediction) -> Prediction:
                return self._learned(parts, trained, state, batch)

            is_due = state.steps % self.interval == 0
            if self.interval == 1:
                state = learned(state)
            else:
                state = lax.cond(is_due, learned, lambda state: state, state)
            loss = examples_weighted(parts.loss, lambda losses, _: self.weigh(state.params, losses))
            found = parts.gradients(trained, batch, loss)
            after, updates = parts.update(
                trained._replace(batch_stats=found.batch_stats), found.grads
            )
            state = state._replace(steps=state.steps + 1)
            return Outcome(after, state, found.loss, found.logits, updates)

        return step

    def weigh(self, theta: PyTree, losses: jax.Array) -> jax.Array:
        """Returns the weights of the losses, both `[exits, batch]`."""
        predicted = self._network(len(losses)).apply(theta, losses.T)
        predicted = jnp.asarray(predicted).T
        mean = predicted.mean(CENTRES[self.centre], keepdims=True)
        return 1 + self.strength * (predicted - mean)

    def _learned(
        self, parts: StepParts, trained: Trained, state: Prediction, batch: Batch
    ) -> Prediction:
        """Returns the state after a trial on the first half, and one on the second if exchanged."""
        first, second = parts.divide(batch, 2)
        for half, other in ((first, second), (second, first))[: 1 + self.exchange]:
            grads = self._look_ahead(parts, trained, state.params, half, other)
            theta, opt_state = learn(self._optimizer, grads, state.opt_state, state.params)
            state = Prediction(theta, opt_state, state.steps)
        return state

    def _look_ahead(
        self, parts: StepParts, trained: Trained, theta: PyTree, half: Batch, other: Batch
    ) -> PyTree:
        """Returns the gradient of the other half's losses after a trial step on one half."""

        def trial(theta: PyTree) -> Trained:
            loss = examples_weighted(parts.loss, lambda losses, _: self.weigh(theta, losses))
            return tried(parts, trained, parts.gradients(trained, half, loss).grads)

        ahead = leaving(parts.loss, self.p)
        return look_ahead(trial, theta, lambda at: parts.gradients(at, other, ahead))[0]

    def _network(self, num_exits: int) -> WeightPredictor:
        return WeightPredictor(num_exits, self.hidden_size, self.hidden_layers)

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay), optax.adam(self.learning_rate)
        )


def leaving(loss: Loss, p: float) -> LossFunction:
    """Returns the loss in which each exit's mean is over the examples that leave there.

    Args:
      loss: loss with a method `example_losses`.
      p: parameter of `exit_distribution`.
    """

    def losses(outputs: ExitOutputs, labels: jax.Array) -> jax.Array:
        confidence = jnp.max(jax.nn.softmax(lax.stop_gradient(outputs.logits)), axis=-1)
        leaves = assigned(confidence, p)
        of_exits = jnp.sum(jnp.where(leaves, loss.example_losses(outputs, labels), 0), axis=1)
        return of_exits / jnp.maximum(leaves.sum(axis=1), 1)

    return losses


def assigned(confidence: jax.Array, p: float) -> jax.Array:
    """Returns whether an example leaves at an exit, bool `[exits, n]`; it leaves at exactly one.

    Exit by exit, shallow first, the floor(n q_i) most confident of the remaining examples leave;
    the last exit takes all that remain.

    Args:
      confidence: confidence of each exit in each example, `[exits, n]`.
      p: parameter of `exit_distribution`, which gives q.

    Example:
      >>> assigned(jnp.array([[0.5, 0.9, 0.7], [0.6, 0.8, 0.4]]), p=1.0).astype(int).tolist()
      [[0, 1, 0], [1, 0, 1]]
    """
    exits, n = confidence.shape
    counts = np.floor(n * exit_distribution(p, exits)).astype(int)
    left, rows = jnp.ones(n, bool), []
    for i in range(exits - 1):
        order = jnp.argsort(jnp.where(left, -confidence[i], jnp.inf))
        first = jnp.zeros(n, bool).at[order[: counts[i]]].set(True)
        rows.append(first & left)
        left = left & ~first
    return jnp.stack([*rows, left])
