"""Gradients by exit: each exit's own for the trunk, those of the summed losses for the heads.

There is one forward pass. The backward pass goes block by block from the last, and each block is
passed only for the exits at or beyond it. A backward pass of the whole network for each exit would
repeat the work of deep blocks, which most exits do not reach.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dfs_jax.forks import Fork
from dfs_jax.losses import LossFunction, as_loss
from dfs_jax.models.contract import MultiExitModel, split_trunk_and_heads
from dfs_jax.tracing.dead_gradients import skip_dead_gradients
from dfs_jax.types import ExitOutputs, HeadOutput, PyTree, UserError


class ExitGradients(NamedTuple):
    """Losses and gradients of one training step.

    Attributes:
      losses: loss of each exit, `[exits]`.
      logits: logits of the exits, `[exits, batch, classes]`.
      trunk: gradients by exit, shaped as the trunk's parameters with a leading axis of exits:
        `[k, ...]` of the last k exits; earlier ones do not reach the parameter.
      heads: gradients of the summed losses, shaped as the heads' parameters.
      batch_stats: running statistics after the step.
    """

    losses: jax.Array
    logits: jax.Array
    trunk: PyTree
    heads: PyTree
    batch_stats: PyTree


def exit_gradients(
    model: MultiExitModel,
    fork: Fork,
    loss: LossFunction,
    variables: dict[str, Any],
    images: jax.Array,
    labels: jax.Array,
    *,
    key: jax.Array,
    exits: str | None = None,
) -> ExitGradients:
    """Returns the gradient of each exit's own loss in the trunk, and the rest of a step's results.

    The forward pass, with batch statistics and dropout, is that of
    `model.apply(variables, images, fork, train=True, mutable=["batch_stats"], rngs=...)`. A model
    that does not run in blocks (`runs_in_blocks`) takes a backward pass of the whole network for
    each exit.

    Args:
      model: backbone; the parameters of one that runs in blocks lie under `block1`.. and `head1`..
      fork: fork at each exit.
      loss: loss of the exits. Unless it sets `couples_exits = False`, the loss of any exit may have
        a gradient at the outputs of any other, and every block is passed for all exits.
      variables: variables of the model, `{"params": ..., "batch_stats": ...}`.
      images: images, `[batch, height, width, channels]`.
      labels: integer labels, `[batch]`.
      key: random key of the dropout.
      exits: order of the backward passes, which does not change the results: "vmap" batches the
        exits of a block; "unroll" takes one exit after another, and keeps feature gradients of one
        exit at a time; "scan" does so in a loop, the smallest program to compile. None is "unroll"
        on a CPU, where it is the fastest (convolutions are slow inside loops there), else "vmap".

    Raises:
      UserError: an unknown value of `exits`, or parameters outside the blocks and heads.
    """
    check_exits(exits)
    check_names(model, variables["params"])
    if not model.runs_in_blocks:
        return _of_the_whole(model, fork, loss, variables, images, labels, key, exits)
    stages, outputs, batch_stats = _forward(model, fork, variables, images, key)
    losses, pull = jax.vjp(lambda outputs: loss(outputs, labels), outputs)
    couples = as_loss(loss).couples_exits
    if couples:
        of_outputs = jax.vmap(lambda seed: pull(seed)[0])(jnp.eye(len(losses), dtype=losses.dtype))
        of_outputs = of_outputs._replace(logits=of_outputs.logits.swapaxes(0, 1))
    else:
        (of_outputs,) = pull(jnp.ones_like(losses))
    heads, of_carries = _back_through_heads(stages, of_outputs, couples)
    way = _WAYS[exits or best_way(jax.default_backend())]
    trunk = way(stages, of_carries, couples)
    return ExitGradients(
        losses, outputs.logits, _named("block", trunk), _named("head", heads), batch_stats
    )


def best_way(platform: str) -> str:
    """Returns the value of `exits` that is the fastest on a platform, such as "cpu"."""
    return "unroll" if platform == "cpu" else "vmap"


def check_exits(exits: str | None) -> None:
    """Raises UserError unless `exits` is None or a value that `exit_gradients` knows."""
    if exits is not None and exits not in _WAYS:
        raise UserError(f"exits must be one of {', '.join(_WAYS)}, got {exits!r}")


def check_names(model: MultiExitModel, params: PyTree) -> None:
    """Raises UserError unless the parameters of blocks and heads lie under block1.. and head1.."""
    if not model.runs_in_blocks:
        return
    exits = range(1, model.num_exits + 1)
    outside = set(params) - {f"{part}{i}" for part in ("block", "head") for i in exits}
    if outside:
        raise UserError(
            f"gradients of single exits need a model whose parameters lie under block1.. and "
            f"head1.., this one also has {', '.join(sorted(outside))}"
        )


def _of_the_whole(
    model: MultiExitModel,
    fork: Fork,
    loss: LossFunction,
    variables: dict[str, Any],
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    exits: str | None,
) -> ExitGradients:
    """Returns the gradients with a backward pass of the whole network for each exit."""
    trunk, heads = split_trunk_and_heads(variables["params"])
    stats = variables.get("batch_stats", {})

    def losses_of(trunk: PyTree, heads: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
        state = {"mutable": ["batch_stats"], "rngs": {"dropout": key}}
        of_model = {"params": {**trunk, **heads}, "batch_stats": stats}
        outputs, updated = model.apply(of_model, images, fork, train=True, **state)
        return loss(outputs, labels), (outputs.logits, updated.get("batch_stats", {}))

    losses_of = skip_dead_gradients(losses_of) if model.partitioned_backward else losses_of
    losses, pull, (logits, stats) = jax.vjp(losses_of, trunk, heads, has_aux=True)
    seeds = jnp.eye(len(losses), dtype=losses.dtype)
    if (exits or best_way(jax.default_backend())) == "vmap":
        by_exit, of_heads = jax.vmap(pull)(seeds)
    else:
        by_exit, of_heads = lax.map(pull, seeds) if exits == "scan" else _stacked(pull, seeds)
    heads = jax.tree.map(lambda leaf: leaf.sum(0), of_heads)
    return ExitGradients(losses, logits, by_exit, heads, stats)


def _stacked(pull: Callable[[jax.Array], PyTree], seeds: jax.Array) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(pull, seeds))


class _Stage(NamedTuple):
    """Backward passes (VJPs) of a head and of a block, each with the fork in front of it.

    Attributes:
      head: gradient of the head's output -> gradients of its parameters and of the block's output.
      block: gradient of the block's output -> gradients of its parameters and of the output of the
        block before; None for images.
      params: parameters of the block.
    """

    head: Callable[[PyTree], tuple[PyTree, PyTree]]
    block: Callable[[PyTree], tuple[PyTree, PyTree]]
    params: PyTree


def _forward(
    model: MultiExitModel, fork: Fork, variables: dict[str, Any], images: jax.Array, key: jax.Array
) -> tuple[list[_Stage], ExitOutputs, PyTree]:
    """Runs the exits as `run_exits` does, and keeps the backward pass of each part."""
    params = variables["params"]
    run = functools.partial(_run_part, model, fork, params, key)
    stats, carry, stages, outputs = variables.get("batch_stats", {}), images, [], []
    for i in range(model.num_exits):
        carry, block, stats = run("block", i, carry, stats)
        output, head, stats = run("head", i, carry, stats)
        outputs.append(output)
        stages.append(_Stage(head, block, params.get(f"block{i + 1}", {})))
    features = tuple(output.feature for output in outputs)
    return stages, ExitOutputs(jnp.stack([o.logits for o in outputs]), features), stats


def _run_part(
    model: MultiExitModel,
    fork: Fork,
    params: PyTree,
    key: jax.Array,
    part: str,
    i: int,
    carry: PyTree,
    stats: PyTree,
) -> tuple[PyTree, Callable, PyTree]:
    """Runs block or head i; returns its output, its backward pass and the new statistics."""
    name = f"{part}{i + 1}"

    def apply(own: PyTree, carry: PyTree) -> tuple[PyTree, PyTree]:
        variables = {"params": {name: own}, "batch_stats": stats}
        state = {"mutable": ["batch_stats"], "rngs": {"dropout": key}}
        output, updated = model.apply(
            variables, fork, i, carry, train=True, method=f"run_{part}", **state
        )
        return output, updated.get("batch_stats", {})

    apply = jax.checkpoint(apply) if model.remat else apply
    apply = skip_dead_gradients(apply) if model.partitioned_backward else apply
    own = params.get(name, {})
    if name == "block1":  # images need no gradient
        output, pull, stats = jax.vjp(lambda own: apply(own, carry), own, has_aux=True)
        return output, lambda gradient: (*pull(gradient), None), stats
    return jax.vjp(apply, own, carry, has_aux=True)


def _back_through_heads(
    stages: Sequence[_Stage], of_outputs: ExitOutputs, couples: bool
) -> tuple[list[PyTree], list[PyTree]]:
    """Returns the gradients of the heads' parameters, summed over losses, and of their carries.

    The gradients of a carry are by exit, `[exits, ...]`, if losses couple exits; otherwise each
    carry has the gradient of its own exit's loss.
    """
    heads, of_carries = [], []
    for stage, logits, feature in zip(stages, of_outputs.logits, of_outputs.features, strict=True):
        pull = jax.vmap(stage.head) if couples else stage.head
        own, of_carry = pull(HeadOutput(logits, feature))
        heads.append(jax.tree.map(lambda leaf: leaf.sum(0), own) if couples else own)
        of_carries.append(of_carry)
    return heads, of_carries


def _vmap(stages: Sequence[_Stage], of_carries: Sequence[PyTree], couples: bool) -> list[PyTree]:
    """Returns the gradients of the blocks' parameters by exit, batched over exits by block."""
    blocks, beyond = [], None
    for stage, gradient in zip(reversed(stages), reversed(of_carries), strict=True):
        if not couples:
            gradient = jax.tree.map(lambda leaf: leaf[None], gradient)
        if beyond is not None:
            join = jnp.add if couples else lambda own, rest: jnp.concatenate([own, rest])
            gradient = jax.tree.map(join, gradient, beyond)
        block, beyond = jax.vmap(stage.block)(gradient)
        blocks.append(block)
    return blocks[::-1]


def _unroll(stages: Sequence[_Stage], of_carries: Sequence[PyTree], couples: bool) -> list[PyTree]:
    """Returns the same, one exit after another; each starts when the one before has finished."""
    exits = len(stages)
    rows: list[list[PyTree]] = [[] for _ in stages]
    for e in range(exits):
        beyond = None
        for i in reversed(range(exits if couples else e + 1)):
            if couples:
                gradient = _row_added(of_carries[i], e, beyond)
            else:
                gradient = of_carries[i] if i == e else beyond
            block, beyond = stages[i].block(gradient)
            rows[i].append(block)
        rows, of_carries = lax.optimization_barrier((rows, of_carries))
    return [jax.tree.map(lambda *leaves: jnp.stack(leaves), *row) for row in rows]


def _scan(stages: Sequence[_Stage], of_carries: Sequence[PyTree], couples: bool) -> list[PyTree]:
    """Returns the same, one exit after another in a loop.

    At a block that an exit does not reach, its zeros are written to the row that the next exit
    overwrites.
    """
    exits = len(stages)

    def step(rows: list[PyTree], e: jax.Array) -> tuple[list[PyTree], None]:
        beyond, new = None, []
        for i in reversed(range(exits)):
            block, beyond = _through(stages[i], of_carries[i], i, e, beyond, couples)
            row = e if couples else jnp.maximum(e - i, 0)
            write = functools.partial(lax.dynamic_update_index_in_dim, index=row, axis=0)
            new.append(jax.tree.map(write, rows[i], block))
        return new[::-1], None

    def empty(i: int, leaf: jax.Array) -> jax.Array:
        return jnp.zeros((exits if couples else exits - i, *leaf.shape), leaf.dtype)

    rows = [jax.tree.map(functools.partial(empty, i), s.params) for i, s in enumerate(stages)]
    return lax.scan(step, rows, jnp.arange(exits))[0]


_WAYS = {"vmap": _vmap, "unroll": _unroll, "scan": _scan}


def _row_added(of_carry: PyTree, e: Any, beyond: PyTree | None) -> PyTree:
    """Returns exit e's gradient of a carry: through its head and through the next block."""
    own = jax.tree.map(lambda leaf: leaf[e], of_carry)
    return own if beyond is None else jax.tree.map(jnp.add, own, beyond)


def _through(
    stage: _Stage, of_carry: PyTree, i: int, e: jax.Array, beyond: PyTree, couples: bool
) -> tuple[PyTree, PyTree]:
    """Propagates exit e's gradient back through block i; zeros if it does not reach the block."""
    if couples:
        return stage.block(_row_added(of_carry, e, beyond))

    def reached(beyond: PyTree) -> tuple[PyTree, PyTree]:
        if beyond is None:
            return stage.block(of_carry)
        is_own = e == i
        return stage.block(
            jax.tree.map(lambda own, rest: jnp.where(is_own, own, rest), of_carry, beyond)
        )

    def not_reached(beyond: PyTree) -> tuple[PyTree, PyTree]:
        shapes = jax.eval_shape(reached, beyond)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return lax.cond(e >= i, reached, not_reached, beyond)


def _named(part: str, trees: Sequence[PyTree]) -> dict[str, PyTree]:
    """Returns the parts' gradients by name, without parts that have no parameters."""
    return {f"{part}{i}": tree for i, tree in enumerate(trees, start=1) if tree}
