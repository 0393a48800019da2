"""Exits on a Flax network that has none, whose code stays as it is.

`add_exits` forks what named submodules return and gives each a head. It follows the calls of
submodules by Flax's interception of methods, so that the network itself runs unchanged.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfs_jax.forks import Fork
from dfs_jax.forks.plain import PlainFork
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.tracing.exit_markers import exit_logits
from dfs_jax.types import ExitOutputs, HeadOutput, PyTree, UserError

BACKBONE = "backbone"  # name of the network among the parameters
_COLLECTION = "dfs_jax_forked"  # what heads read, on its way out of the network
_SHOWN = 40  # submodules that a message lists


class LinearHead(nn.Module):
    """Mean over all positions, then a linear classifier.

    Attributes:
      num_classes: number of classes, the width of the logits.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> HeadOutput:
        """Classifies `x` `[batch, ..., channels]`."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        pooled = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), dtype=wide)
        return HeadOutput(nn.Dense(self.num_classes, name="classifier")(pooled), pooled)


def add_exits(
    model: nn.Module,
    at: Sequence[str],
    *,
    head: Callable[[int], nn.Module] = LinearHead,
    num_classes: int | None = None,
) -> AddedExits:
    """Returns a network with exits after named submodules of `model`, and its own output as last.

    The parameters are `backbone/...`, named as in `model`, and `head1/...`, `head2/...`, from
    shallow to deep. With a fork that changes no values, the last exit computes what `model` does.

    Args:
      model: Linen module that returns logits `[batch, classes]`. It is called with `train` (or
        `training`, `deterministic`, `use_running_average`) if it has such an argument.
      at: names of submodules that return arrays `[batch, ..., channels]`, such as "layer1" or
        "encoder/layer1"; exits are numbered in the order in which they are called.
      head: function from the number of classes to a module, which maps the forked feature to logits
        or to a `HeadOutput`.
      num_classes: number of classes; None for the attribute `num_classes` of `model`.

    Raises:
      UserError: names that are not those of submodules, or that repeat; (when called) a submodule
        that is called twice, or does not return an array with the batch first.

    Example:
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         x = nn.relu(nn.Conv(4, (3, 3), name="layer1")(x))
      ...         return nn.Dense(5)(x.mean((1, 2)))
      >>> model = add_exits(Net(), at=("layer1",), num_classes=5)
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 8, 8, 3)))
      >>> sorted(variables["params"]), model.apply(variables, jnp.ones((2, 8, 8, 3))).logits.shape
      (['backbone', 'head1'], (2, 2, 5))
    """
    if isinstance(model, MultiExitModel):
        raise UserError(f"{type(model).__name__} has exits of its own: none can be added")
    if not isinstance(model, nn.Module):
        raise UserError(f"exits can be added to a flax.linen module, got {model!r}")
    names = (at,) if isinstance(at, str) else tuple(at)
    if not names or len({*names}) < len(names) or not all(isinstance(n, str) and n for n in names):
        raise UserError(
            f"exits need the names of one or more different submodules, such as ('layer1', "
            f"'layer2'), got {names}"
        )
    classes = getattr(model, "num_classes", None) if num_classes is None else num_classes
    if not isinstance(classes, int):
        raise UserError(f"{type(model).__name__} has no num_classes: name the number of classes")
    return AddedExits(num_classes=classes, backbone=model, at=names, make_head=head)


class AddedExits(MultiExitModel, kw_only=True):
    """A network with added exits, as `add_exits` returns it.

    Attributes:
      backbone: the network, which is the trunk, its own classifier included.
      at: names of the submodules that have an exit.
      make_head: function from the number of classes to the head of an exit.
    """

    backbone: nn.Module
    at: tuple[str, ...]
    make_head: Callable[[int], nn.Module] = LinearHead

    runs_in_blocks: ClassVar[bool] = False

    def __post_init__(self):
        if self.adapt_features:
            raise UserError(
                "this loss compares the features of exits with the last one's, which a network "
                "with added exits does not show: choose another, such as distillation"
            )
        if self.remat:
            raise UserError("a network with added exits has no blocks to recompute: use nn.remat")
        super().__post_init__()

    @property
    def num_exits(self) -> int:
        return len(self.at) + 1

    def setup(self):
        for i in range(len(self.at)):
            setattr(self, f"head{i + 1}", self.make_head(self.num_classes))

    def __call__(
        self, images: jax.Array, fork: Fork | None = None, *, train: bool = False
    ) -> ExitOutputs:
        """Runs every exit on `images` `[batch, height, width, channels]`, by default unforked."""
        if self.is_initializing():
            self.backbone(images, **_mode(self.backbone, train))
        logits, forked = self._run_backbone(images, fork or PlainFork(), train)
        outputs = []
        for i, feature in enumerate(forked):
            head = getattr(self, f"head{i + 1}")
            output = head(feature, **_mode(head, train))
            outputs.append(
                output if isinstance(output, HeadOutput) else HeadOutput(output, feature)
            )
        outputs.append(HeadOutput(logits, logits))
        shape = (images.shape[0], self.num_classes)
        for i, output in enumerate(outputs):
            if output.logits.shape != shape:
                who = type(self.backbone).__name__ if i == len(forked) else f"head {i + 1}"
                raise UserError(
                    f"{who} must return logits {list(shape)}, got {list(output.logits.shape)}"
                )
        marked = [exit_logits(i, output.logits) for i, output in enumerate(outputs)]
        return ExitOutputs(jnp.stack(marked), tuple(output.feature for output in outputs))

    def _run_backbone(
        self, images: jax.Array, fork: Fork, train: bool
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Runs the network; returns its logits and what each head reads."""
        train = train and not self.frozen_trunk
        calls, variables = _Calls(self.at, fork, images.shape[0]), self.backbone.variables
        if self.frozen_trunk:
            variables = jax.lax.stop_gradient(variables)
        has_statistics = self.is_mutable_collection("batch_stats") and "batch_stats" in variables
        kept = ["batch_stats"] if has_statistics else []
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        with nn.intercept_methods(calls):
            outputs: Any = self.backbone.clone(parent=None, name=None).apply(
                variables,
                images,
                **_mode(self.backbone, train),
                mutable=[_COLLECTION, *kept],
                rngs=None if key is None else {"params": key, "dropout": key},
            )
        logits, updated = outputs
        for name, value in updated.get("batch_stats", {}).items():
            self.backbone.put_variable("batch_stats", name, value)
        if not isinstance(logits, jax.Array):
            raise UserError(
                f"{type(self.backbone).__name__} must return logits, got a {type(logits).__name__}"
            )
        return logits, calls.found(updated.get(_COLLECTION, {}), self.backbone, images)


class _Calls:
    """Forks what the named submodules return, in the order in which they are called."""

    def __init__(self, at: Sequence[str], fork: Fork, batch: Any):
        self._at, self._fork, self._batch = at, fork, batch
        self._order: list[str] = []
        self._inside: list[str] = []  # a transformed module's call contains the module's own

    def __call__(self, call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        name = "/".join(context.module.path)
        if context.method_name != "__call__" or name not in self._at or name in self._inside:
            return call(*args, **kwargs)
        with self._entered(name):
            result = call(*args, **kwargs)
        if name in self._order:
            raise UserError(f"submodule {name!r} is called twice: an exit needs one that is not")
        if not isinstance(result, jax.Array) or result.ndim < 2 or result.shape[0] != self._batch:
            shown = getattr(result, "shape", None)
            got = type(result).__name__ if shown is None else list(shown)
            raise UserError(
                f"submodule {name!r} must return an array [{self._batch}, ..., channels], got {got}"
            )
        self._order.append(name)
        place, exits = len(self._order) - 1, len(self._at) + 1
        forked = self._fork(result, exit_index=place, num_exits=exits)
        if not context.module.sow(_COLLECTION, "to_head", forked.to_head):
            raise UserError(
                f"submodule {name!r} runs inside a lifted loop such as nn.scan, which hands out "
                f"nothing for an exit: name a submodule around it"
            )
        return forked.to_trunk

    @contextlib.contextmanager
    def _entered(self, name: str) -> Iterator[None]:
        self._inside.append(name)
        try:
            yield
        finally:
            self._inside.pop()

    def found(self, sown: PyTree, model: nn.Module, images: jax.Array) -> list[jax.Array]:
        """Returns what the heads read, in the order of the calls."""
        missing = [name for name in self._at if name not in self._order]
        if missing:
            raise UserError(
                f"{type(model).__name__} calls no submodule {', '.join(map(repr, missing))}: it "
                f"has {submodules(model, images)}"
            )
        found = []
        for name in self._order:
            tree = sown
            for part in name.split("/"):
                tree = tree[part]
            found.append(tree["to_head"][0])
        return found


def submodules(model: nn.Module, images: jax.Array) -> str:
    """Returns the names of the submodules that an exit can follow, with the shapes they return."""
    shapes: dict[str, str] = {}

    def record(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        name = "/".join(context.module.path)
        is_call = context.method_name == "__call__" and name
        if is_call and isinstance(result, jax.Array) and result.ndim >= 2:
            shapes[name] = f"{name} {list(result.shape[1:])}"
        return result

    def run(x: jax.Array) -> Any:
        with nn.intercept_methods(record):
            return model.clone(parent=None, name=None).init(
                jax.random.key(0), x, **_mode(model, False)
            )

    jax.eval_shape(run, jax.ShapeDtypeStruct(images.shape, images.dtype))
    listed = list(shapes.values())
    return ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "") or "none"


def _mode(module: nn.Module, train: bool) -> dict[str, Any]:
    """Returns the argument that tells a module whether it is trained, by the name it has for it."""
    accepted = inspect.signature(type(module).__call__).parameters
    values = {
        "train": train,
        "training": train,
        "deterministic": not train,
        "use_running_average": not train,
    }
    return {name: value for name, value in values.items() if name in accepted}
