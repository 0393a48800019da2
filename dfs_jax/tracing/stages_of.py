"""Early exit for any JAX function: its traced program, cut at the logits that it marks.

Stage i computes what logits i need and no earlier stage has computed. What later stages read of it
is its carry. Values that do not depend on the examples (weights, positions, masks) are never
carried: every stage that reads them computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxprs_in_params
from jax.tree_util import Partial, keystr

from dfs_jax.tracing.equations import bind
from dfs_jax.tracing.exit_markers import check_marks, has_marks, marked_exit, refuse
from dfs_jax.tracing.flattened import Equation, flattened, inputs_of
from dfs_jax.types import PyTree, UserError

Carry = tuple[jax.Array, ...]


def stages_of(
    fn: Callable[[PyTree, jax.Array], Any],
    params: PyTree,
    example: jax.ShapeDtypeStruct,
    *,
    exits: Sequence[int] | None = None,
) -> tuple[Partial, ...]:
    """Returns the stages of a function that marks its exits, `(carry) -> (carry, logits)`.

    The first stage reads a batch; together the stages compute the marked logits, each operation
    once. The carry is the least that later stages read of what has been computed, a tuple of arrays
    with the batch first, wherever the function has it. The function is traced again for every batch
    size.

    Args:
      fn: function `(params, batch)` that calls `exit_logits`; its result is not used. Rows of the
        batch must not read each other.
      params: pytree of the function's parameters. Those that a stage reads are its leaves, by name.
      example: shape and type of one input, without its batch.
      exits: indices of the exits to stop at, in rising order; None for all.

    Raises:
      UserError: exits that are not numbered 0, 1, ..., marks inside a loop, a condition or a custom
        derivative, or a carry none of whose axes is the batch.

    Example:
      >>> import jax.numpy as jnp
      >>> from dfs_jax.tracing.exit_markers import exit_logits
      >>> def network(params, x):
      ...     x = jnp.tanh(x @ params["a"])
      ...     exit_logits(0, x @ params["b"])
      ...     exit_logits(1, jnp.tanh(x @ params["a"]) @ params["b"])
      >>> params = {"a": jnp.ones((5, 5)), "b": jnp.ones((5, 3))}
      >>> stages = stages_of(network, params, jax.ShapeDtypeStruct((5,), jnp.float32))
      >>> carry, logits = stages[0](jnp.ones((2, 5)))
      >>> [x.shape for x in carry], logits.shape
      ([(2, 5)], (2, 3))
    """
    cut = _Cutter(fn, params, example, None if exits is None else tuple(exits))
    leaves, axes, stages = cut.named(params), (0,), []
    for i, (two, three) in enumerate(zip(cut(2).stages, cut(3).stages, strict=True)):
        following = _batch_axes(i, two, three)
        named = {name: leaves[name] for name in cut.names_read(two)}
        stages.append(Partial(_RunStage(cut, i, axes, following), named))
        axes = following
    for i, stage in enumerate(cut(2).stages[:-1]):
        _check_carried(i, stage)
    return tuple(stages)


class _Stage(NamedTuple):
    """Equations of one stage, in order, and what it reads, marks and leaves.

    `parameters` holds positions among the function's parameters.
    """

    equations: list[Equation]
    parameters: list[int]
    carried: list[Any]
    logits: Any
    carry: list[Any]


class _Program(NamedTuple):
    stages: list[_Stage]
    parameters: list[Any]
    constants: dict[Any, Any]


class _Cutter:
    """Cuts a function into stages for a batch size.

    Cutters of equal functions, parameters and examples are equal, so that compiled programs of
    their stages are shared.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        params: PyTree,
        example: jax.ShapeDtypeStruct,
        exits: tuple[int, ...] | None,
    ):
        self._fn, self._example, self._exits = fn, example, exits
        self._params = jax.eval_shape(lambda: params)
        self._names = list(self.named(self._params))
        shapes, structure = jax.tree.flatten(self._params)
        self._key = _identity(fn), example, exits, structure, tuple(shapes)
        self._known: dict[Any, _Program] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Cutter) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __call__(self, batch: Any) -> _Program:
        if batch not in self._known:
            shape = jax.ShapeDtypeStruct((batch, *self._example.shape), self._example.dtype)
            closed = jax.make_jaxpr(self._fn)(self._params, shape)
            self._known[batch] = _cut(closed, len(self._names), self._exits)
        return self._known[batch]

    def named(self, params: PyTree) -> dict[str, Any]:
        """Returns the leaves of the parameters by name, such as `params/block1/kernel`."""
        found = jax.tree_util.tree_flatten_with_path(params)[0]
        short = [keystr(path, simple=True, separator="/") for path, _ in found]
        names = short if len({*short}) == len(short) else [keystr(path) for path, _ in found]
        return dict(zip(names, (leaf for _, leaf in found), strict=True))

    def names_read(self, stage: _Stage) -> list[str]:
        """Returns the names of the parameters that a stage reads."""
        return [self._names[k] for k in stage.parameters]


def _identity(fn: Callable[..., Any]) -> Any:
    """Returns what stands for a function in comparisons: itself if it can be hashed."""
    try:
        hash(fn)
    except TypeError:
        return id(fn)
    return fn


class _RunStage(NamedTuple):
    """A stage as a function of the parameters that it reads and of a carry.

    Attributes:
      cut: the function, cut into stages.
      index: index of the stage.
      axes_before: axis of the batch in each value that the stage reads.
      axes_after: axis of the batch in each value that it hands on.
    """

    cut: _Cutter
    index: int
    axes_before: tuple[int, ...]
    axes_after: tuple[int, ...]

    def __call__(self, params: dict[str, jax.Array], carry: Any) -> tuple[Carry, jax.Array]:
        arrays = (carry,) if self.index == 0 else tuple(carry)
        program = self.cut(arrays[0].shape[0])
        arrays = [_moved(x, 0, axis) for x, axis in zip(arrays, self.axes_before, strict=True)]
        stage = program.stages[self.index]
        names = self.cut.names_read(stage)
        read_here = [program.parameters[k] for k in stage.parameters]
        known = {
            **program.constants,
            **dict(zip(read_here, map(params.__getitem__, names), strict=True)),
            **dict(zip(stage.carried, arrays, strict=True)),
        }

        def read(variable: Any) -> Any:
            return variable.val if isinstance(variable, Literal) else known[variable]

        for equation, inputs, outputs in stage.equations:
            with jax.named_scope(str(equation.source_info.name_stack)):
                known.update(zip(outputs, bind(equation, list(map(read, inputs))), strict=True))
        following = zip(map(read, stage.carry), self.axes_after, strict=True)
        return tuple(_moved(x, axis, 0) for x, axis in following), read(stage.logits)


def _moved(x: jax.Array, source: int, target: int) -> jax.Array:
    return x if source == target else jnp.moveaxis(x, source, target)


def _cut(closed: ClosedJaxpr, num_parameters: int, exits: tuple[int, ...] | None) -> _Program:
    jaxpr, constants = closed.jaxpr, dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    parameters, inputs = jaxpr.invars[:num_parameters], jaxpr.invars[num_parameters:]
    equations = flattened(jaxpr, constants, check=_check)
    maker = {v: k for k, equation in enumerate(equations) for v in equation.outputs}
    marks = _marks(equations, exits)
    of_examples = _dependent(equations, inputs)
    stages, computed, done, carried = [], list(inputs), set(), list(inputs)
    for i, mark in enumerate(marks):
        new = sorted(_needed(equations, maker, [mark], done))
        done |= {k for k in new if not of_examples.isdisjoint(equations[k].outputs)}
        computed += [v for k in new for v in equations[k].outputs if v in of_examples]
        later = inputs_of(equations[k] for k in _needed(equations, maker, marks[i + 1 :], done))
        carry = [v for v in computed if v in later]
        here, logits = [equations[k] for k in new], equations[mark].outputs[0]
        read_here = inputs_of(here)
        read = [k for k, v in enumerate(parameters) if v in read_here]
        stages.append(_Stage(here, read, carried, logits, carry))
        carried = carry
    return _Program(stages, parameters, constants)


def _check(equation: JaxprEqn) -> None:
    """Raises UserError if an equation that is not a call has marks inside."""
    if any(map(has_marks, jaxprs_in_params(equation.params))):
        raise refuse(equation)


def _marks(equations: Sequence[Equation], exits: tuple[int, ...] | None) -> list[int]:
    """Returns the positions of the marks of the chosen exits, or of all if None."""
    found = {k: marked_exit(e.equation) for k, e in enumerate(equations)}
    marks = {exit_index: k for k, exit_index in found.items() if exit_index is not None}
    check_marks([exit_index for exit_index in found.values() if exit_index is not None])
    chosen = tuple(range(len(marks))) if exits is None else exits
    if not chosen or list(chosen) != sorted({*chosen} & {*marks}):
        raise UserError(
            f"exits must be some of 0 to {len(marks) - 1} in rising order, got {list(chosen)}"
        )
    return [marks[i] for i in chosen]


def _needed(
    equations: Sequence[Equation], maker: dict[Any, int], ends: Sequence[int], done: set[int]
) -> set[int]:
    """Returns the positions of the equations, not yet done, that `ends` need, with themselves."""
    needed, left = set(), list(ends)
    while left:
        k = left.pop()
        if k not in needed and k not in done:
            needed.add(k)
            left += [maker[v] for v in inputs_of([equations[k]]) if v in maker]
    return needed


def _dependent(equations: Sequence[Equation], inputs: Sequence[Any]) -> set[Any]:
    """Returns the variables that depend on the examples."""
    found = set(inputs)
    for equation in equations:
        if any(not isinstance(v, Literal) and v in found for v in equation.inputs):
            found.update(equation.outputs)
    return found


def _check_carried(i: int, stage: _Stage) -> None:
    """Raises UserError if a stage leaves nothing that the next one reads."""
    if not stage.carry:
        raise UserError(
            f"exit {i + 1} reads nothing that depends on the examples: mark logits of theirs"
        )


def _batch_axes(i: int, two: _Stage, three: _Stage) -> tuple[int, ...]:
    """Returns the axis of the batch in each value that a stage hands on.

    Args:
      i: index of the stage.
      two: stage for a batch of 2.
      three: stage for a batch of 3.

    Raises:
      UserError: a value without such an axis, or with several.
    """
    axes = []
    for variable, other in zip(two.carry, three.carry, strict=True):
        shape, larger = variable.aval.shape, other.aval.shape
        differing = [
            k for k, sizes in enumerate(zip(shape, larger, strict=True)) if sizes == (2, 3)
        ]
        if len(differing) != 1 or larger != (*shape[: differing[0]], 3, *shape[differing[0] + 1 :]):
            equation = variable.equation
            where = f"{equation.primitive.name} of {equation.source_info.name_stack}".rstrip(" of")
            raise UserError(
                f"stage {i + 1} would hand {where}, {list(shape)} for a batch of 2, to later "
                f"stages: they need values one of whose axes is the batch"
            )
        axes += differing
    return tuple(axes)
