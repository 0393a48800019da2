"""The interface of a backbone, and the loop that runs its exits.

A backbone defines `block` and `head`, and `feature` and `with_feature` if its carry is more than
the feature. Forks, staged inference, gradients by exit and counting use these four methods, so that
none of them changes a model.
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
from dfs_jax.partitioned import Execution
from dfs_jax.surgery import LiveChannels
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
      tensor_axes: axis of each parameter that is split over the devices along `TENSOR_AXIS`, by
        the end of the parameter's path; empty if the layers cannot be split.
    """

    num_classes: int
    adapt_features: bool = False
    remat: bool = False

    tensor_axes: ClassVar[Mapping[str, int]] = {}

    @property
    def num_exits(self) -> int:
        """Number of exits."""
        raise NotImplementedError

    def block(self, i: int, carry: PyTree, live: LiveChannels = None, *, train: bool) -> PyTree:
        """Runs block i; block 0 reads the images `[batch, height, width, channels]`.

        Args:
          i: index of the block, from 0.
          carry: output of the previous block, with its feature replaced by the forked one.
          live: channels of that feature that can carry gradient.
          train: whether to use the batch's own statistics and dropout.

        Returns:
          A pytree of arrays with the batch first.
        """
        raise NotImplementedError

    def head(self, i: int, x: jax.Array, live: LiveChannels = None, *, train: bool) -> HeadOutput:
        """Runs classifier i on its view of the feature; `live` channels can carry gradient."""
        raise NotImplementedError

    def feature(self, carry: PyTree) -> jax.Array:
        """Returns the part of the carry that is forked, channels last."""
        return carry

    def with_feature(self, carry: PyTree, x: jax.Array) -> PyTree:
        """Returns the carry with its feature replaced by the forked one."""
        del carry
        return x

    def live_after(self, i: int, live: LiveChannels) -> LiveChannels:
        """Returns the feature's live channels after block i, given those of the block's input.

        The result is None (every channel) for a block that mixes channels. A block that
        concatenates new channels to old ones keeps the intervals of the old ones. The function is
        static: it is called outside any trace.
        """
        del i, live
        return None

    def __call__(
        self, images: jax.Array, fork: Fork | None = None, *, train: bool = False
    ) -> ExitOutputs:
        """Runs every exit on `images` `[batch, height, width, channels]`, by default unforked."""
        return run_exits(self, images, fork or PlainFork(), train=train)


class ConvolutionalModel(MultiExitModel):
    """Base of the backbones whose convolutions read a forked feature.

    Attributes:
      partitioned_backward: whether the backward pass skips the gradient of channels that train
        nothing (the naive graph computes and discards it); results are equal.
      cpu_kernels: whether the program uses this package's kernels on a CPU.
      dtype: type in which blocks compute, such as "bfloat16"; None for that of the parameters.
        Parameters and statistics stay float32, as do heads from their pools on.
      batch_norm_groups: number of parts of a training batch with statistics of their own.
    """

    partitioned_backward: bool = True
    cpu_kernels: bool = True
    dtype: str | None = None
    batch_norm_groups: int = 1

    @property
    def execution(self) -> Execution:
        """How the layers run."""
        return Execution(
            self.partitioned_backward, self.cpu_kernels, self.dtype, self.batch_norm_groups
        )


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
    carry, live, outputs = images, None, []
    for i in range(model.num_exits):
        carry = _run_part(model, "block", i, carry, live, train=train)
        forked = fork(
            model.feature(carry), model.live_after(i, live), exit_index=i, num_exits=model.num_exits
        )
        outputs.append(_run_part(model, "head", i, forked.to_head, forked.head_live, train=train))
        carry, live = model.with_feature(carry, forked.to_trunk), forked.trunk_live
    return ExitOutputs(jnp.stack([o.logits for o in outputs]), tuple(o.feature for o in outputs))


def _run_part(
    model: MultiExitModel, part: str, i: int, x: PyTree, live: LiveChannels, *, train: bool
) -> Any:
    """Runs block or head i; with `remat`, its backward pass recomputes the inside."""

    def run(model: MultiExitModel, x: PyTree) -> Any:
        return getattr(model, part)(i, x, live, train=train)

    return nn.remat(run)(model, x) if model.remat and train else run(model, x)


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
    trunk = {name: leaf for name, leaf in tree.items() if not name.startswith("head")}
    heads = {name: leaf for name, leaf in tree.items() if name.startswith("head")}
    return trunk, heads
