"""The interface of a backbone, and the walk over its stages.

A backbone defines `block` and `head`, and `feature` and `with_feature` if its carry is more than
the feature. `run_block` and `run_head` of the base class call these four and the fork; `run_exits`
calls those two in training, gradients by exit and inference, whose stages are cut out of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfs_jax.forks import Fork
from dfs_jax.forks.plain import PlainFork
from dfs_jax.models.evaluation_by_parts import evaluate_by_parts
from dfs_jax.tracing.exit_markers import exit_logits
from dfs_jax.types import ExitOutputs, HeadOutput, PyTree

# Mesh axis whose devices share the work of one layer.
TENSOR_AXIS = "tensor"


class MultiExitModel(nn.Module):
    """Base of every backbone: an exit at the end of each block, 0-based, shallow to deep.

    Parameters must lie under `block1`, `block2`, ... and `head1`, `head2`, ..., so that trunk and
    heads can be told apart by name. A subclass defines `num_exits`, `block` and `head`, and also
    `feature` and `with_feature` if its carry is more than the feature (MSDNet's scales).

    Attributes:
      num_classes: number of classes, the width of every exit's logits.
      adapt_features: whether each early head has a layer that maps its pooled feature to the width
        of the last exit's, for losses that compare features across exits.
      remat: whether training recomputes the inside of blocks and heads in the backward pass: less
        memory for another forward pass, equal gradients.
      partitioned_backward: whether training skips the gradients of channels that train nothing
        (`skip_dead_gradients`); otherwise it computes and discards them. Results are equal.
      frozen_trunk: whether training leaves the trunk as it is: blocks run in evaluation mode and
        pass no gradients.
      cpu_kernels: whether programs for one CPU use this package's convolutions and pools.
      runs_in_blocks: whether the model defines `block` and `head`; otherwise its `__call__` alone.
      tensor_axes: axis of each parameter that is split over the devices along `TENSOR_AXIS`, by
        the end of the parameter's path; empty if the layers cannot be split.
      dtype: type in which blocks compute; None for that of the parameters. A field of the models
        that offer the choice.
    """

    num_classes: int
    adapt_features: bool = False
    remat: bool = False
    partitioned_backward: bool = True
    frozen_trunk: bool = False
    cpu_kernels: bool = True

    tensor_axes: ClassVar[Mapping[str, int]] = {}
    runs_in_blocks: ClassVar[bool] = True
    dtype: ClassVar[str | None] = None

    @property
    def num_exits(self) -> int:
        """Number of exits."""
        raise NotImplementedError

    def block(self, i: int, carry: PyTree, *, train: bool) -> PyTree:
        """Runs block i; block 0 reads the images `[batch, height, width, channels]`.

        Args:
          i: index of the block, from 0.
          carry: output of the previous block, with its feature replaced by the forked one.
          train: whether to use the batch's own statistics and dropout.

        Returns:
          A pytree of arrays with the batch first.
        """
        raise NotImplementedError

    def head(self, i: int, x: jax.Array, *, train: bool) -> HeadOutput:
        """Runs classifier i on its view of the feature."""
        raise NotImplementedError

    def feature(self, carry: PyTree) -> jax.Array:
        """Returns the part of the carry that is forked, channels last."""
        return carry

    def with_feature(self, carry: PyTree, x: jax.Array) -> PyTree:
        """Returns the carry with its feature replaced by the forked one."""
        del carry
        return x

    def run_block(self, fork: Fork, i: int, carry: PyTree, *, train: bool = False) -> PyTree:
        """Runs block i on what block i - 1 returned, forked, or on images if i = 0."""
        if i > 0:
            forked = fork(self.feature(carry), exit_index=i - 1, num_exits=self.num_exits)
            carry = self.with_feature(carry, forked.to_trunk)
        if not self.frozen_trunk:
            return self.block(i, carry, train=train)
        return jax.lax.stop_gradient(self.block(i, carry, train=False))

    def run_head(self, fork: Fork, i: int, carry: PyTree, *, train: bool = False) -> HeadOutput:
        """Runs classifier i on what block i returned, forked."""
        forked = fork(self.feature(carry), exit_index=i, num_exits=self.num_exits)
        return self.head(i, forked.to_head, train=train)

    def __call__(
        self, images: jax.Array, fork: Fork | None = None, *, train: bool = False
    ) -> ExitOutputs:
        """Runs every exit on `images` `[batch, height, width, channels]`, by default unforked."""
        return run_exits(self, images, fork or PlainFork(), train=train)


class ConvolutionalModel(MultiExitModel):
    """Base of the backbones made of convolutions and BatchNorm.

    Attributes:
      dtype: type in which blocks compute, such as "bfloat16"; None for that of the parameters.
        Parameters and statistics stay float32, as do heads from their pools on.
      batch_norm_groups: number of parts of a training batch with statistics of their own.
    """

    dtype: str | None = None
    batch_norm_groups: int = 1


def run_exits(
    model: MultiExitModel, images: jax.Array, fork: Fork, *, train: bool = False
) -> ExitOutputs:
    """Runs every block and head of a bound model, forking the feature at the end of each block.

    Args:
      model: bound model (inside `apply` or a method).
      images: images, `[batch, height, width, channels]`.
      fork: fork of each feature between its exit and the next block.
      train: whether to use the batch's own statistics and dropout.

    Returns:
      `ExitOutputs`, shallow exit first.
    """

    def run(part: str, i: int, carry: PyTree) -> Any:
        def of_model(model: MultiExitModel, carry: PyTree) -> Any:
            return getattr(model, part)(fork, i, carry, train=train)

        return (nn.remat(of_model) if model.remat and train else of_model)(model, carry)

    carry, outputs = images, []
    for i in range(model.num_exits):
        carry = run("run_block", i, carry)
        output = run("run_head", i, carry)
        outputs.append(output._replace(logits=exit_logits(i, output.logits)))
    return ExitOutputs(jnp.stack([o.logits for o in outputs]), tuple(o.feature for o in outputs))


def init_variables(
    model: MultiExitModel, key: jax.Array, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Returns fresh `{"params": ..., "batch_stats": ...}` for images `[height, width, channels]`.

    Parameters do not depend on the fork, so one initialisation serves every method.
    """
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = evaluate_by_parts(lambda key, x: model.init({"params": key}, x), key, images)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def split_trunk_and_heads(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a model's parameters (or statistics) by name into the trunk's and the heads'.

    >>> split_trunk_and_heads({"block1": 1, "head1": 2})
    ({'block1': 1}, {'head1': 2})
    """
    trunk = {name: leaf for name, leaf in tree.items() if not is_head(name)}
    heads = {name: leaf for name, leaf in tree.items() if is_head(name)}
    return trunk, heads


def is_head(name: str) -> bool:
    """Returns whether a name among a model's parameters is that of a head."""
    return name.startswith("head")
