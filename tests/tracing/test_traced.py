"""Traced programs as flat lists: calls inlined, values followed across them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dfs_jax.tracing.traced import Kind, TracedProgram, multiply_adds, multiply_adds_by_input


def trace(function, *shapes, kinds=None):
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    kinds = kinds or [Kind.ACTIVATION] * len(shapes)
    return TracedProgram(jax.make_jaxpr(function)(*inputs), kinds)


def names(program):
    return [operation.name for operation in program.operations]


@jax.custom_vjp
def negated(x):
    return -x


negated.defvjp(lambda x: (-x, None), lambda _, g: (-g,))


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, lambda f: jax.jit(jax.jit(f)), jax.checkpoint]
)
def test_calls_are_inlined_and_values_stay_themselves(wrap):
    program = trace(wrap(lambda x: negated(jnp.sin(x))), (3,))
    assert names(program) == ["sin", "neg"]
    sine, negative = program.operations
    assert sine.inputs == tuple(program.inputs)
    assert negative.inputs == sine.outputs
    assert list(negative.outputs) == program.outputs
    assert program.producer(negative.outputs[0]) is negative
    assert program.producer(program.inputs[0]) is None


def test_kinds_are_the_last_among_those_depended_on():
    def function(weight, image, seed):
        return weight * 2, weight * image, jax.jit(jnp.multiply)(image, seed), jnp.zeros(3) + 1

    kinds = [Kind.WEIGHT, Kind.ACTIVATION, Kind.GRADIENT]
    program = trace(function, (3,), (3,), (3,), kinds=kinds)
    assert [program.kind(v) for v in program.outputs] == [*kinds, Kind.CONSTANT]


def test_a_loops_outputs_depend_on_all_that_goes_in():
    def function(weight, image):
        return lax.scan(lambda carry, _: (carry + image, carry), weight, length=5)

    program = trace(function, (3,), (3,), kinds=[Kind.WEIGHT, Kind.ACTIVATION])
    assert [program.kind(v) for v in program.outputs] == [Kind.ACTIVATION] * 2


def test_how_often_operations_run():
    def function(x):
        inner = lambda c, _: (jnp.cos(c), None)  # noqa: E731
        outer = lambda c, _: (lax.scan(inner, jnp.sin(c), length=3)[0], None)  # noqa: E731
        x = lax.scan(outer, x, length=5)[0]
        return lax.while_loop(lambda c: c.sum() < 1, jnp.exp, jnp.tan(x))

    times = {op.name: op.times for op in trace(function, (3,)).operations}
    found = {name: times[name] for name in ("sin", "cos", "tan", "exp")}
    assert found == {"sin": 5, "cos": 15, "tan": 1, "exp": None}


def test_of_a_conditional_the_dearest_branch_is_kept():
    def function(x):
        return lax.cond(x[0, 0] > 0, lambda y: jnp.sin(y) @ y, lambda y: jnp.cos(y), x)

    found = names(trace(function, (3, 3)))
    assert "sin" in found
    assert "dot_general" in found
    assert "cos" not in found


def test_of_platforms_the_default_is_kept():
    def function(x, weight):
        return lax.platform_dependent(
            x, weight, cpu=lambda x, w: jnp.sin(x @ w @ w), default=lambda x, w: jnp.cos(x @ w)
        )

    program = trace(function, (3, 3), (3, 3), kinds=[Kind.ACTIVATION, Kind.WEIGHT])
    assert names(program)[-2:] == ["dot_general", "cos"]
    assert "sin" not in names(program)
    product = program.operations[-2]
    assert [program.kind(v) for v in product.inputs] == [Kind.ACTIVATION, Kind.WEIGHT]


def test_before_reshaping():
    def function(x):
        return jnp.broadcast_to(x.sum(0).reshape(1, 7, 1).astype(jnp.bfloat16), (2, 7, 3)).T

    program = trace(function, (5, 7))
    source = program.producer(program.before_reshaping(program.outputs[0]))
    assert source is not None
    assert source.name == "reduce_sum"


def test_an_input_gradient_counted_from_its_input_costs_what_the_convolution_does():
    def forward(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (2, 3), [(1, 2), (0, 0)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = (1, 11, 13, 5), (3, 4, 5, 7)
    (convolution,) = trace(forward, *shapes).operations
    assert multiply_adds(convolution) == 6 * 4 * 7 * (3 * 4 * 5)
    backward = trace(lambda x, k, y: jax.vjp(forward, x, k)[1](y)[0], *shapes, (1, 6, 4, 7))
    gradient = backward.producer(backward.outputs[0])
    assert multiply_adds_by_input(gradient) == multiply_adds(convolution)
