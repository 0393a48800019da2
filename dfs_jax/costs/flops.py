"""Counts the cost of each exit in the traced program, without executing anything.

The model's blocks and heads are traced to jaxprs, whose operations are counted by what they
compute, not by the names of layers, so that any backbone with the model contract can be counted.
`python -m dfs_jax.reports.cost_report --config=FILE.py` prints the costs of a config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dfs_jax.costs.operations import LITERATURE_FLOPS, MULTIPLY_ADDS, Rule, count_by
from dfs_jax.costs.stage_costs import stage_costs, with_weights
from dfs_jax.forks.plain import PlainFork
from dfs_jax.models.contract import MultiExitModel, init_variables
from dfs_jax.tracing.stages_of import stages_of
from dfs_jax.tracing.traced import TracedProgram
from dfs_jax.types import PyTree


class ExitCost(NamedTuple):
    """Cost of the network up to and including one exit.

    Earlier heads are included, except in `macs_without_earlier_heads`.

    Attributes:
      exit: 1-based label, shallow first.
      params: number of trainable parameters.
      macs: multiply-adds for one image of the stages that early-exit inference runs; they leave to
        later stages what an exit does not need. 1 MAC = 2 FLOPs.
      published_macs: multiply-adds for one image of everything that the blocks compute, as in the
        published code.
      literature_flops: FLOPs for one image as counted in the literature on multi-exit networks.
      macs_without_earlier_heads: multiply-adds of the trunk and this exit's head alone.
    """

    exit: int
    params: int
    macs: int
    published_macs: int
    literature_flops: int
    macs_without_earlier_heads: int


class PartCount(NamedTuple):
    """A number for each block and each head, shallow first."""

    blocks: tuple[int, ...]
    heads: tuple[int, ...]

    def up_to_exit(self, i: int) -> int:
        """Returns the sum over blocks and heads up to and including exit i (0-based)."""
        return sum(self.blocks[: i + 1]) + sum(self.heads[: i + 1])

    def without_earlier_heads(self, i: int) -> int:
        """Returns the sum over blocks up to exit i (0-based), and its head."""
        return sum(self.blocks[: i + 1]) + self.heads[i]


def exit_costs(model: MultiExitModel, image_shape: tuple[int, int, int]) -> tuple[ExitCost, ...]:
    """Counts the cost of each exit for one image, in evaluation mode.

        multiply-adds      of convolutions and matrix products with weights or activations
        literature_flops   those, plus 1 per element of a linear's bias, 1 per element of a ReLU,
                           and k x k per pooled output; a pool over all positions counts them all

    Biases of convolutions, normalisation, other non-linearities and additions are free. Everything
    that a block computes counts, even if an exit does not need it, except in `macs`. Adaptation
    layers are used by a loss in training only and do not count.

    Args:
      model: unbound backbone.
      image_shape: `(height, width, channels)`.

    Returns:
      One `ExitCost` for each exit, shallow first.

    Raises:
      UserError: the model refuses images of this shape.
      ValueError: the model has parameters outside its blocks and heads, or counted operations in a
        loop of unknown length.

    Reference: Huang et al., "Multi-Scale Dense Networks", ICLR 2018, for the literature's count.

    Example: two 3x3 convolutions with 2 channels on 8x8 pixels, heads of 2 x 5.
      >>> from dfs_jax.models import create_model
      >>> vgg = create_model("vgg7", num_classes=5, width=2)
      >>> first = exit_costs(vgg, (8, 8, 3))[0]
      >>> first.params, first.macs, first.literature_flops
      (70, 3466, 3722)
    """
    if not model.runs_in_blocks:
        return _costs_of_stages(model, image_shape)
    parts = _Parts(model, image_shape)
    params = parts.parameters()
    macs, literature = parts.operations(MULTIPLY_ADDS), parts.operations(LITERATURE_FLOPS)
    example = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    network = _network(parts.model)
    staged = stage_costs(stages_of(network, parts.variables, example), example)
    return tuple(
        ExitCost(
            exit=i + 1,
            params=params.up_to_exit(i),
            macs=sum(staged[: i + 1]),
            published_macs=macs.up_to_exit(i),
            literature_flops=literature.up_to_exit(i),
            macs_without_earlier_heads=macs.without_earlier_heads(i),
        )
        for i in range(model.num_exits)
    )


def _network(model: MultiExitModel) -> Callable[[PyTree, jax.Array], Any]:
    return lambda variables, images: model.apply(variables, images, PlainFork())


def _costs_of_stages(
    model: MultiExitModel, image_shape: tuple[int, int, int]
) -> tuple[ExitCost, ...]:
    """Counts the costs of a model that does not run in blocks: those of its stages."""
    model = model.clone()  # detached from a parent
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
    example = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    stages = stages_of(_network(model), variables, example)
    macs, literature = (stage_costs(stages, example, r) for r in (MULTIPLY_ADDS, LITERATURE_FLOPS))
    sizes: dict[str, int] = {}
    costs = []
    for i, stage in enumerate(stages):
        sizes |= {name: _size(w) for name, w in stage.args[0].items() if name.startswith("params/")}
        alone = stages_of(_network(model), variables, example, exits=(i,))
        costs.append(
            ExitCost(
                exit=i + 1,
                params=sum(sizes.values()),
                macs=sum(macs[: i + 1]),
                published_macs=sum(macs[: i + 1]),
                literature_flops=sum(literature[: i + 1]),
                macs_without_earlier_heads=sum(stage_costs(alone, example)),
            )
        )
    return tuple(costs)


class _Parts:
    """The parts of a model by its contract: abstract variables, and a traced program for each."""

    def __init__(self, model: MultiExitModel, image_shape: tuple[int, int, int]):
        # `clone` in every case: it also detaches the model from a parent.
        self.model = model.clone(adapt_features=False)
        self.variables = jax.eval_shape(
            lambda: init_variables(self.model, jax.random.key(0), image_shape)
        )
        self.blocks, self.heads = [], []
        carry: PyTree = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        for i in range(model.num_exits):
            block, carry = self._trace("run_block", i, carry)
            head, _ = self._trace("run_head", i, carry)
            self.blocks.append(block)
            self.heads.append(head)

    def operations(self, rules: Mapping[str, Rule]) -> PartCount:
        """Counts each part's operations by the rules."""
        return PartCount(
            tuple(count_by(block, rules) for block in self.blocks),
            tuple(count_by(head, rules) for head in self.heads),
        )

    def parameters(self) -> PartCount:
        """Counts each part's trainable parameters, by the contract's names."""
        sizes = {name: _size(tree) for name, tree in self.variables["params"].items()}
        labels = range(1, self.model.num_exits + 1)
        blocks = tuple(sizes.pop(f"block{label}", 0) for label in labels)
        heads = tuple(sizes.pop(f"head{label}", 0) for label in labels)
        if sizes:
            raise ValueError(
                f"parameters must lie under block1, head1, ..., but this model also has "
                f"{', '.join(sizes)}"
            )
        return PartCount(blocks, heads)

    def _trace(self, part: str, i: int, carry: PyTree) -> tuple[TracedProgram, PyTree]:
        def run(variables, carry):
            output: Any = self.model.apply(variables, PlainFork(), i, carry, method=part)
            return output if part == "run_block" else output.logits

        program, shapes = jax.make_jaxpr(run, return_shape=True)(self.variables, carry)
        return with_weights(program, self.variables), shapes


def _size(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
