"""Where a profile's time went: read from small traces with known answers."""

from __future__ import annotations

import gzip
import json

import pytest

from benchmarks.gpu.trace import find_trace, kind_of, main, read_profile
from dfs_jax.types import UserError


def named(pid, name, tid=None):
    what = "process_name" if tid is None else "thread_name"
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}


def ran(pid, tid, begin, end, name, **arguments):
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": begin,
        "dur": end - begin,
        "name": name,
        "args": arguments,
    }


# Two steps of a GPU, microseconds: 10 idle within the first one, 10 between them.
GPU = [
    named(1, "/device:GPU:0"),
    named(1, "XLA Modules", 2),
    named(1, "Stream #14(Compute)", 14),
    named(1, "Stream #15(MemcpyD2D)", 15),
    named(1, "Source code", 3),
    named(7, "/host:CPU"),
    named(7, "python", 8),
    ran(1, 2, 0, 140, "jit_step"),
    ran(1, 2, 150, 290, "jit_step"),
    ran(1, 14, 0, 100, "sm90_xmma_fprop_implicit_gemm_bf16", hlo_op="cudnn-conv.4"),
    ran(1, 15, 20, 60, "MemcpyD2D"),
    ran(1, 14, 110, 140, "loop_add_fusion_2", hlo_op="loop_add_fusion.2"),
    ran(1, 14, 150, 250, "sm90_xmma_dgrad_implicit_gemm_bf16", hlo_op="cudnn-conv.5"),
    ran(1, 14, 250, 290, "input_reduce_fusion", hlo_op="input_reduce_fusion"),
    ran(1, 3, 0, 290, "step.py:12"),
    ran(7, 8, 0, 900, "block_until_ready"),
]
# A CPU's: operations are told by their arguments, and programs by their runs.
CPU = [
    named(3, "/host:CPU"),
    named(3, "tf_XLAEigen/1", 5),
    ran(3, 5, 10, 40, "convolution", hlo_op="convolution", run_id="1"),
    ran(3, 5, 50, 60, "copy", hlo_op="copy", run_id="2"),
    ran(3, 9, 0, 99, "python"),
]


def written(tmp_path, events):
    path = tmp_path / "plugins" / "host.trace.json.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_a_gpu_by_kind_and_its_idle_time(tmp_path):
    profile = read_profile(written(tmp_path, GPU))
    assert profile.span_ms == pytest.approx(0.290)
    assert profile.busy_ms == pytest.approx(0.270)
    assert profile.idle == pytest.approx(20 / 290)
    assert profile.idle_between_steps == pytest.approx(10 / 290)
    assert profile.steps == 2
    expected = {
        "convolution": 200 / 310,
        "transpose or copy": 40 / 310,
        "reduction": 40 / 310,
        "elementwise": 30 / 310,
    }
    assert profile.kinds == pytest.approx(expected, abs=1e-4)
    assert next(iter(profile.kinds)) == "convolution"
    assert sum(profile.longest.values()) == pytest.approx(1, abs=1e-3)


def test_a_cpu(tmp_path):
    profile = read_profile(written(tmp_path, CPU))
    assert (profile.steps, profile.kinds) == (2, {"convolution": 0.75, "transpose or copy": 0.25})
    assert (profile.idle_between_steps, profile.idle) == pytest.approx((10 / 50, 10 / 50))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ("nvjet_hsh_128x256", "matrix product"),
        ("gemm_fusion_dot.3", "matrix product"),
        ("void cudnn::cnn::conv2d_grouped_direct_kernel cudnn-conv.1", "depthwise convolution"),
        ("wrapped_concatenate", "concatenation"),
        ("loop_convert_fusion.1", "elementwise"),
        ("select_and_scatter.2", "pooling"),
        ("input_transpose_fusion", "transpose or copy"),
        ("loop_gather_fusion", "gather or scatter"),
        ("MemcpyH2D", "copy between host and device"),
        ("custom-call.9", "other"),
    ],
)
def test_kinds(names, kind):
    assert kind_of(names) == kind


def test_what_is_no_trace_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"there is no trace .*: check the path"):
        read_profile(tmp_path / "x.trace.json.gz")
    with pytest.raises(UserError, match="there is no trace below"):
        find_trace(tmp_path)
    path = written(tmp_path, CPU[:2])
    with pytest.raises(UserError, match="no operation of a device is in"):
        read_profile(path)
    path.write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"is not a trace of jax.profiler"):
        read_profile(find_trace(tmp_path))
    assert main([]) == 2


def test_the_program_prints_a_profile(tmp_path, capsys):
    assert main([str(written(tmp_path, GPU))]) == 0
    assert '"convolution": 0.64' in capsys.readouterr().out
