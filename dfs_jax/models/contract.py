"""What a backbone is, and the one loop that runs its exits.

A backbone answers four questions (`block`, `feature` and `with_feature`, `head`); forks, staged
inference, per-exit gradients and counting all use the same seams, so none of them changes a model.
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

# Of a mesh of devices: those along it share the work of one layer.
TENSOR_AXIS = "tensor"


class MultiExitModel(nn.Module):
    """Base of every backbone: exits shallow to deep, 0-based, one at the end of each block.

    Parameters must lie under `block1`, `block2`, ... and `head1`, `head2`, ..., so that trunk and
    heads split by name. A subclass defines `num_exits`, `block` and `head`; one whose carry is more
    than the feature itself (MSDNet's scales) also `feature` and `with_feature`.

    Attributes:
      num_classes: width of every exit's logits.
      adapt_features: give each early head a layer that maps its pooled feature to the last exit's
        width; a loss that compares features across exits asks for it.
      remat: in training, keep nothing of the inside of blocks and heads for the backward pass,
        which computes it again: less memory for another pass forward, equal gradients.
      tensor_axes: of a model whose layers can be split over the devices along `TENSOR_AXIS`, the
        axis of each parameter that is, by the end of its path.
    """

    num_classes: int
    adapt_features: bool = False
    remat: bool = False

    tensor_axes: ClassVar[Mapping[str, int]] = {}

    @property
    def num_exits(self) -> int:
        """How many exits the network has."""
        raise NotImplementedError

    def block(self, i: int, carry: PyTree, live: LiveChannels = None, *, train: bool) -> PyTree:
        """Runs block i; block 0 takes the images `[batch, height, width, channels]`.

        Args:
          carry: what the block before returned, its feature replaced by the forked one.
          live: which channels of that feature can carry gradient.
          train: whether batch statistics are the batch's own and dropout is on.

        Returns:
          A pytree of arrays with the batch first.
        """
        raise NotImplementedError

    def head(self, i: int, x: jax.Array, live: LiveChannels = None, *, train: bool) -> HeadOutput:
        """Runs classifier i on its view of the feature, of whose channels `live` carry gradient."""
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

        None, every channel, for a block that mixes channels; where old channels travel on
        (concatenation) their intervals do too. Static: called outside any trace.
        """
        del i, live
        return None

    def __call__(
        self, images: jax.Array, fork: Fork | None = None, *, train: bool = False
    ) -> ExitOutputs:
        """Runs every exit on `images` `[batch, height, width, channels]`; by default unforked."""
        return run_exits(self, images, fork or PlainFork(), train=train)


class ConvolutionalModel(MultiExitModel):
    """Base of the backbones whose convolutions read a forked feature.

    Attributes:
      partitioned_backward: leave out the gradient of channels that train nothing (else the naive
        graph computes it, then drops it); the results are equal.
      cpu_kernels: use this package's own kernels where the program runs on a CPU.
      dtype: in which blocks compute, such as "bfloat16"; None for that of the parameters, which
        stay float32, as statistics do, and heads from their pools on.
      batch_norm_groups: parts of a training batch that each have statistics of their own.
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
      model: a bound multi-exit module (inside `apply` or a method).
      images: `[batch, height, width, channels]`.
      fork: how each feature is split between its exit and the next block.
      train: batch statistics and dropout as in training.

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
    """Runs block or head i; with `remat`, what its backward pass needs is computed again there."""

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
