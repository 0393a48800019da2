"""A network as a sequence of stages, each a block and its head as a function of a carry.

    stage(carry) -> (carry, logits)

The first stage takes images `[batch, height, width, channels]`; the last stage's carry is not used.
A carry is a pytree of arrays with the batch first, whose rows are independent. Stages come from a
model and its variables (`model_stages`) or from exported files. The weights of a stage that is a
`jax.tree_util.Partial` are its leaves, and arguments of the compiled program; any other callable
is used as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from dfs_jax.inference.onnx_stages import OnnxStages, recorded_onnx
from dfs_jax.tracing.cpu import inference_options
from dfs_jax.tracing.for_cpu import for_cpu
from dfs_jax.tracing.stages_of import stages_of
from dfs_jax.types import Example, PyTree, UserError

if TYPE_CHECKING:
    # Exported stages also run where flax, which models need, is not installed.
    from dfs_jax.forks import Fork
    from dfs_jax.models.contract import MultiExitModel

Stage: TypeAlias = Callable[[PyTree], tuple[PyTree, jax.Array]]


def model_stages(
    model: MultiExitModel,
    variables: dict[str, Any],
    fork: Fork,
    example: jax.ShapeDtypeStruct,
    *,
    prepare: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[Partial, ...]:
    """Returns the stages of a model, in evaluation mode (see `stages_of`).

    Args:
      model: unbound backbone.
      variables: `{"params": ..., "batch_stats": ...}`.
      fork: fork as in training; some forks change values (`referencing="none"` cuts channels).
      example: shape and type of one image, before `prepare`.
      prepare: function applied to the images first, such as normalisation.

    Returns:
      One stage for each exit, shallow first. Together they compute the same as `run_exits`; what
      an exit does not need is computed by the first stage that needs it.
    """
    stages = stages_of(_Network(model, fork, prepare), variables, example)
    if not model.cpu_kernels:
        return stages
    return tuple(Partial(_WithCpuKernels(stage.func), *stage.args) for stage in stages)


def plain_stages(stages: Sequence[Stage]) -> tuple[Partial, ...]:
    """Returns the stages without this package's kernels for a CPU, for other compilers."""
    return tuple(
        Partial(stage.func.run, *stage.args) if isinstance(stage.func, _WithCpuKernels) else stage
        for stage in as_pytrees(stages)
    )


class _Network(NamedTuple):
    """A model in evaluation mode, which marks its exits, as a function of its variables."""

    model: MultiExitModel
    fork: Fork
    prepare: Callable[[jax.Array], jax.Array] | None

    def __call__(self, variables: dict[str, Any], images: jax.Array) -> Any:
        images = images if self.prepare is None else self.prepare(images)
        return self.model.apply(variables, images, self.fork)


class _WithCpuKernels(NamedTuple):
    """A stage whose programs for a CPU use this package's kernels."""

    run: Callable[..., Any]

    def __call__(self, weights: dict[str, jax.Array], carry: PyTree) -> Any:
        is_on_cpu = jax.default_backend() == "cpu"
        return (for_cpu(self.run) if is_on_cpu else self.run)(weights, carry)


def run_stages(stages: Sequence[Stage], images: jax.Array) -> jax.Array:
    """Returns every exit's logits, `[exits, batch, classes]`."""
    carry, logits = images, []
    for stage in stages:
        carry, exit_logits = stage(carry)
        logits.append(exit_logits)
    return jnp.stack(logits)


def last_logits(stages: Sequence[Stage], images: jax.Array) -> jax.Array:
    """Returns the last exit's logits, `[batch, classes]`; compilation removes the early heads."""
    carry, logits = images, None
    for stage in stages:
        carry, logits = stage(carry)
    assert logits is not None
    return logits


def recorded_logits(
    stages: Sequence[Stage], batches: Iterable[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Runs every exit on many images and returns logits `[exits, n, classes]` float32.

    Args:
      stages: stages of a model or of an export, in either format.
      batches: pairs of images `[batch, height, width, channels]`, all of one size, and masks
        `[batch]` bool, False for padding.
    """
    if isinstance(stages, OnnxStages):
        return recorded_onnx(stages, batches)
    stages, run = as_pytrees(stages), _recorder(jax.default_backend())
    return np.concatenate([np.asarray(run(stages, x))[:, mask] for x, mask in batches], axis=1)


@functools.cache
def _recorder(platform: str) -> Callable[..., jax.Array]:
    """Returns one function for all networks, so that compiled programs are reused."""
    return jax.jit(
        lambda stages, x: run_stages(stages, x).astype(jnp.float32),
        compiler_options=inference_options(platform),
    )


def as_pytrees(stages: Sequence[Stage]) -> tuple[Partial, ...]:
    """Returns the stages as pytrees, so that a compiled program can take them as arguments."""
    return tuple(stage if isinstance(stage, Partial) else Partial(stage) for stage in stages)


def check_stages(stages: Sequence[Stage], example: Example) -> int:
    """Traces the stages on images like `example` (without a batch); returns the number of classes.

    Raises:
      UserError: no stages, logits that are not `[batch, classes]` with one number of classes, or a
        carry whose leaves do not have the batch first.
    """
    if not stages:
        raise UserError("a network has at least 1 stage, got none")
    batch = 3
    carry: PyTree = jax.ShapeDtypeStruct((batch, *example.shape), example.dtype)
    classes = None
    for i, stage in enumerate(stages):
        carry, logits = jax.eval_shape(stage, carry)
        if (
            len(logits.shape) != 2
            or logits.shape[0] != batch
            or logits.shape[1] != (classes or logits.shape[1])
        ):
            raise UserError(
                f"stage {i + 1} must return logits [batch, {classes or 'classes'}], "
                f"got {list(logits.shape)} for a batch of {batch}"
            )
        classes = logits.shape[1]
        if i < len(stages) - 1:
            _check_batch_first(i, carry, batch)
    assert classes is not None
    return classes


def _check_batch_first(i: int, carry: PyTree, batch: int) -> None:
    for leaf in jax.tree.leaves(carry):
        if leaf.shape[:1] != (batch,):
            raise UserError(
                f"stage {i + 1} must return a carry with the batch first, "
                f"got {list(leaf.shape)} for a batch of {batch}"
            )
