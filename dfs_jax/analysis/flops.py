"""What each exit costs, counted from the traced program; nothing is executed.

The model's blocks and heads are traced to jaxprs and every convolution and matrix product in them
is counted, inner jaxprs included, so any backbone that keeps the model contract is counted alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from dfs_jax.models.contract import MultiExitModel, init_variables
from dfs_jax.types import PyTree

# Operations of one equation, given which of its inputs depend on the program's inputs.
Rule = Callable[[JaxprEqn, Sequence[bool]], int]


class ExitCost(NamedTuple):
    """What the network costs up to and including one exit, the heads passed on the way included.

    Attributes:
      exit: 1-based label, shallow first.
      params: trainable parameters.
      macs: multiply-adds of one image; 1 MAC = 2 FLOPs.
    """

    exit: int
    params: int
    macs: int


class PartCount(NamedTuple):
    """One number for every block and one for every head, shallow first."""

    blocks: tuple[int, ...]
    heads: tuple[int, ...]

    def up_to_exit(self, i: int) -> int:
        """Returns the sum over blocks and heads up to exit i (0-based), itself included."""
        return sum(self.blocks[: i + 1]) + sum(self.heads[: i + 1])


def exit_costs(model: MultiExitModel, image_shape: tuple[int, int, int]) -> tuple[ExitCost, ...]:
    """Counts what each exit costs on one image, in evaluation mode.

    Adaptation layers serve a loss in training and are left out, whether or not the model has them.

    Args:
      model: a backbone, not bound to variables.
      image_shape: `(height, width, channels)`.

    Returns:
      One `ExitCost` an exit, shallow first.

    Raises:
      UserError: the model refuses images of this shape.
      ValueError: the model has parameters outside its blocks and heads, or loops an unknown
        number of times over what is to be counted.

    Example: two 3x3 convolutions with 2 channels on 8x8 pixels, heads of 2 x 5.
      >>> from dfs_jax.models import create_model
      >>> vgg = create_model("vgg7", num_classes=5, width=2)
      >>> exit_costs(vgg, (8, 8, 3))[0]
      ExitCost(exit=1, params=70, macs=3466)
    """
    parts = _Parts(model, image_shape)
    params, macs = parts.parameters(), parts.operations(MULTIPLY_ADDS)
    return tuple(
        ExitCost(i + 1, params.up_to_exit(i), macs.up_to_exit(i)) for i in range(model.num_exits)
    )


class _Parts:
    """A model cut at the seams of its contract: abstract variables, a jaxpr for every part."""

    def __init__(self, model: MultiExitModel, image_shape: tuple[int, int, int]):
        # `clone` in every case: it also detaches the model from a parent.
        self.model = model.clone(adapt_features=False)
        self.variables = jax.eval_shape(
            lambda: init_variables(self.model, jax.random.key(0), image_shape)
        )
        self.blocks, self.heads = [], []
        carry = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        for i in range(model.num_exits):
            block, carry = self._trace(_run_block, i, carry)
            head, _ = self._trace(_run_head, i, carry)
            self.blocks.append(block)
            self.heads.append(head)

    def operations(self, rules: Mapping[str, Rule]) -> PartCount:
        """Counts each part's operations by the rules."""
        return PartCount(
            tuple(count_operations(block, rules) for block in self.blocks),
            tuple(count_operations(head, rules) for head in self.heads),
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

    def _trace(self, part: Callable, i: int, carry: PyTree) -> tuple[ClosedJaxpr, PyTree]:
        def run(variables, carry):
            return self.model.apply(variables, i, carry, method=part)

        return jax.make_jaxpr(run, return_shape=True)(self.variables, carry)


def _run_block(model: MultiExitModel, i: int, carry: PyTree) -> PyTree:
    return model.block(i, carry, None, train=False)


def _run_head(model: MultiExitModel, i: int, carry: PyTree) -> jax.Array:
    return model.head(i, model.feature(carry), None, train=False).logits


def _size(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def conv_multiply_adds(eqn: JaxprEqn, varying: Sequence[bool]) -> int:
    """Counts a convolution: output elements x kernel positions x input channels of one group.

    Products with padding count, as everywhere in the literature; the zeros that an input dilation
    puts between the inputs do not.
    """
    if not all(varying):
        return 0
    kernel, spec = _shape(eqn.invars[1]), eqn.params["dimension_numbers"].rhs_spec
    positions = math.prod(kernel[axis] for axis in spec[2:])
    output = math.prod(_shape(eqn.outvars[0]))
    return output * positions * kernel[spec[1]] // math.prod(eqn.params["lhs_dilation"])


def dot_multiply_adds(eqn: JaxprEqn, varying: Sequence[bool]) -> int:
    """Counts a matrix product: output elements x contracted elements."""
    if not all(varying):
        return 0
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = _shape(eqn.invars[0])
    return math.prod(_shape(eqn.outvars[0])) * math.prod(shape[axis] for axis in contracted)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


# A product with a constant (the matrices that resize an image, the kernel that cuts patches) is no
# layer of the network: both operands must depend on the program's inputs, weights or image.
MULTIPLY_ADDS: Mapping[str, Rule] = {
    "conv_general_dilated": conv_multiply_adds,
    "dot_general": dot_multiply_adds,
}


def count_operations(program: ClosedJaxpr, rules: Mapping[str, Rule] = MULTIPLY_ADDS) -> int:
    """Counts the operations of a program that `jax.make_jaxpr` traced.

    A scan counts as often as it runs, a conditional as its dearest branch; code that JAX keeps in
    inner jaxprs (jit, remat, custom derivatives) counts where it is called.

    Args:
      program: the traced program; all its inputs are taken to vary.
      rules: for each primitive's name, what one equation of it counts.

    Raises:
      ValueError: a `while` loop, which runs an unknown number of times, holds counted operations.

    Example:
      >>> program = jax.make_jaxpr(lambda a, b: jnp.tanh(a @ b))(jnp.ones((2, 3)), jnp.ones((3, 5)))
      >>> count_operations(program)
      30
    """
    return _count(program.jaxpr, [True] * len(program.jaxpr.invars), rules)[0]


def _count(
    jaxpr: Jaxpr, varying_inputs: Sequence[bool], rules: Mapping[str, Rule]
) -> tuple[int, list[bool]]:
    """Returns a jaxpr's operations, and which of its outputs vary with the inputs that do."""
    total = 0
    varying = {v for v, varies in zip(jaxpr.invars, varying_inputs, strict=True) if varies}

    def varies(atom) -> bool:
        return not isinstance(atom, Literal) and atom in varying

    for eqn in jaxpr.eqns:
        counted, outputs = _count_equation(eqn, [varies(atom) for atom in eqn.invars], rules)
        total += counted
        varying.update(v for v, out in zip(eqn.outvars, outputs, strict=True) if out)
    return total, [varies(atom) for atom in jaxpr.outvars]


def _count_equation(
    eqn: JaxprEqn, varying: list[bool], rules: Mapping[str, Rule]
) -> tuple[int, list[bool]]:
    name = eqn.primitive.name
    anything = [any(varying)] * len(eqn.outvars)
    if name in rules:
        return rules[name](eqn, varying), anything
    if name == "cond":
        results = [_count(b.jaxpr, varying[1:], rules) for b in eqn.params["branches"]]
        return max(counted for counted, _ in results), anything
    inner = [jaxpr for value in eqn.params.values() for jaxpr in _jaxprs_in(value)]
    # What varies is followed through a call one to one; what a loop carries may come to vary.
    one_to_one = name not in ("scan", "while") and len(inner) == 1
    if one_to_one and len(inner[0].invars) == len(varying):
        counted, outputs = _count(inner[0], varying, rules)
        return counted, outputs if len(outputs) == len(anything) else anything
    counted = sum(_count(j, [any(varying)] * len(j.invars), rules)[0] for j in inner)
    if name == "while" and counted:
        raise ValueError("operations inside a while loop cannot be counted: it has no fixed length")
    return counted * eqn.params["length"] if name == "scan" else counted, anything


def _jaxprs_in(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    if isinstance(value, (tuple, list)):
        return [jaxpr for item in value for jaxpr in _jaxprs_in(item)]
    return []
