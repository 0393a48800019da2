"""Reading a compiled module's text."""

import jax
import jax.numpy as jnp
import pytest

from dfs_jax.costs.hlo import Array, Module

# Two kinds of calls, a loop of known length, a tuple with a comment and with layouts in brackets.
TEXT = """\
HloModule jit_f, is_scheduled=true

FileNames
1 "/home/me/f.py"

%sum (x.3: f32[], y.1: f32[]) -> f32[] {
  %x.3 = f32[]{:T(128)} parameter(0)
  %y.1 = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%x.3, %y.1)
}

%body (s: (f32[4,3])) -> (f32[4,3]) {
  %s = (f32[4,3]{1,0:T(8,128)S(1)}) parameter(0)
  %one = f32[4,3]{1,0} get-tuple-element(%s), index=0
  %all-reduce = f32[4,3]{1,0} all-reduce(%one), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %t = (f32[4,3]{1,0}) tuple(%all-reduce)
}

%condition (s: (f32[4,3])) -> pred[] {
  ROOT %no = pred[] constant(false)
}

ENTRY %main.0_spmd (p: f32[4,3], q: bf16[2,5]) -> (f32[4,3], /*index=1*/bf16[2,5]) {
  %p = f32[4,3]{1,0:T(8,128)} parameter(0), metadata={op_name="a (b) = c(d)"}
  %q = bf16[2,5]{1,0} parameter(1)
  %t.1 = (f32[4,3]{1,0}) tuple(%p)
  %loop = (f32[4,3]{1,0}) while(%t.1), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"6"}}
  ROOT %out = (f32[4,3]{1,0:T(8,128)}, /*index=1*/bf16[2,5]{1,0}) tuple(%loop, /*index=1*/%q)
}
"""


@pytest.fixture(scope="module")
def rows():
    return list(Module(TEXT).executed())


def test_every_instruction_with_what_it_reads(rows):
    by_name = {instruction.name: (instruction, read) for instruction, read, _ in rows}
    p, nothing = by_name["p"]
    assert (p.opcode, p.results, nothing) == ("parameter", (Array(32, (4, 3)),), [])
    out, read = by_name["out"]
    assert out.operands == ("loop", "q")
    assert read == [Array(32, (4, 3)), Array(16, (2, 5))] == list(out.results)
    reduce, read = by_name["all-reduce"]
    assert (read, reduce.attribute("to_apply")) == ([Array(32, (4, 3))], "%sum")
    assert reduce.attribute("dimensions") is None


def test_loops_run_their_body_as_often_as_they_say(rows):
    times = {instruction.name: times for instruction, _, times in rows}
    assert (times["loop"], times["all-reduce"], times["add.1"], times["out"]) == (1, 6, 6, 1)


@pytest.mark.parametrize(
    ("array", "size", "count"),
    [
        (Array(32, (4, 3)), 12, 48),
        (Array(16, ()), 1, 2),
        (Array(4, (3,)), 3, 2),
        (Array(32, (0, 3)), 0, 0),
    ],
)
def test_arrays(array, size, count):
    assert (array.size, array.bytes) == (size, count)


def test_types_of_arrays():
    text = TEXT.replace("bf16[2,5]", "f8e4m3fn[2,5]").replace("f32[4,3]", "pred[4,3]")
    found = {array for i, _, _ in Module(text).executed() for array in i.results}
    assert {Array(8, (2, 5)), Array(8, (4, 3))} <= found


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="no entry computation"):
        Module("HloModule empty\n")


def test_what_this_xla_writes_of_a_loop():
    def twice_five(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, length=5)[0]

    text = jax.jit(twice_five).lower(jnp.ones((3, 3))).compile().as_text()
    dots = [times for i, _, times in Module(text).executed() if i.opcode == "dot"]
    assert dots == [5]
