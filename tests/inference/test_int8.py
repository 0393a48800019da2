"""Exports in int8: the policy fitted again, the table of accuracies; runtimes of the benchmark."""

import json

import numpy as np
import pytest

from benchmarks.inference.runtimes import check_runtimes
from dfs_jax.inference import (
    EarlyExitPredictor,
    load_exported,
    onnx_models,
    onnx_stages,
    quantize,
)
from dfs_jax.inference.choose import choose_policy, fit_again
from dfs_jax.inference.export import export_int8
from dfs_jax.inference.policy import FILE, Policy
from dfs_jax.types import UserError
from tests.inference.test_inference_programs import run_program

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def refitted(policy):
    return {key: policy.fitted_on.get(key) for key in ("target", "risk", "split", "examples")}


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ({"speedup": 1.2}, {"measure": "margin", "risk": "disagreement"}),
        ({"p": 0.5}, {"scale_temperatures": False}),
        ({"epsilon": 0.95}, {"delta": 0.2, "calibration_share": 0.4, "seed": 3}),
    ],
)
def test_the_policy_is_fitted_again_to_its_target(
    tiny_run, staged, tmp_path, capsys, target, options
):
    ((name, value),) = target.items()
    before = choose_policy(staged, name, value, **options).policy
    before.save(tiny_run / FILE)
    export_int8(tiny_run, tmp_path, examples=20)
    network = load_exported(tmp_path)
    policy = network.policy
    assert refitted(policy) == refitted(before)
    assert policy.measure == before.measure
    assert policy.fitted_on["guarantee"] == before.fitted_on["guarantee"]
    assert (policy.temperatures == (1.0, 1.0)) == (before.temperatures == (1.0, 1.0))
    form = network.manifest["formats"]["onnx"]
    assert form["precision"] == "int8"
    assert policy.fitted_on["network"]["weights"] == form["fingerprint"]
    assert form["fingerprint"] != before.fitted_on["network"]["weights"]
    # A policy of the network in float is none of this one's.
    with pytest.raises(UserError, match="fitted on a network with other weights"):
        EarlyExitPredictor(network.stages, network.example, before)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["exit", "float32", "int8", "points"]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert "policy fitted again; test split: accuracy" in lines[3]
    # The table is what the files say.
    _, labels = staged.logits("test")
    images = staged.images("test", len(labels))
    last = EarlyExitPredictor(network.stages, network.example, batch_size=len(labels))(images)
    assert lines[2].split()[3] == f"{100 * np.mean(last.predicted == labels):.2f}"


def test_without_a_policy_the_last_exit_answers(tiny_run, tmp_path):
    export_int8(tiny_run, tmp_path, examples=7, policy="none")
    assert load_exported(tmp_path).policy.thresholds == (None,)


@pytest.mark.parametrize(("bits", "largest"), [(7, 64), (8, 127)])
def test_bits_of_the_weights(staged, bits, largest):
    files = onnx_models.written(staged.stages, staged.example)
    images = staged.images("validation", 7)
    contents, about = quantize.quantized(*files, images, weight_bits=bits)
    assert about["weight_bits"] == bits
    weights = [
        np.abs(onnx.numpy_helper.to_array(x).astype(int)).max()
        for x in onnx.load_from_string(contents["stage1.onnx"]).graph.initializer
        if x.data_type == onnx.TensorProto.INT8 and len(x.dims) > 1
    ]
    assert weights
    assert max(weights) == largest


@pytest.mark.parametrize("bits", [6, 16])
def test_other_numbers_of_bits(tiny_run, tmp_path, bits):
    with pytest.raises(UserError, match=f"weight_bits must be 7 or 8, got {bits}"):
        export_int8(tiny_run, tmp_path, weight_bits=bits)
    assert not list(tmp_path.iterdir())


def test_a_policy_without_a_target_cannot_be_fitted_again(staged):
    with pytest.raises(UserError, match="does not say what it was chosen for"):
        fit_again(staged, Policy((0.5,)))


def test_calibration_beside_shared_threads_is_refused(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_stages, "is_shared", lambda: True)
    with pytest.raises(UserError, match="export in a process of its own"):
        export_int8(tiny_run, tmp_path, policy="none")


@pytest.mark.parametrize("names", [[], ["tflite"], ["jax", "ONNX"]])
def test_unknown_runtimes(names):
    with pytest.raises(
        UserError, match="--runtimes must be some of jax, onnx, onnx_int8, torch, got"
    ):
        check_runtimes(names)
    assert check_runtimes(["onnx", "jax", "onnx"]) == ("onnx", "jax")


@pytest.mark.slow
def test_programs(tiny_run, tmp_path):
    status, _, err = run_program(
        "export", f"--workdir={tiny_run}", f"--output={tmp_path / 'e'}", "--quantize=int8"
    )
    assert (status, err) == (2, "error: --quantize=int8 takes --format=onnx\n")
    status, _, err = run_program(
        "export", f"--workdir={tiny_run}", f"--output={tmp_path / 'e'}", "--weight_bits=8"
    )
    assert (status, err) == (2, "error: --weight_bits takes --quantize=int8\n")
    where = (f"--workdir={tiny_run}", f"--output={tmp_path / 'rows.json'}")
    runtimes = "--runtimes=jax,onnx,onnx_int8"
    status, _, err = run_program(
        "benchmarks.inference", *where, runtimes, "--batch=4", "--examples=13", "--rounds=1"
    )
    assert (status, err) == (0, "")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["runtime"] for row in rows} == {"jax", "onnx", "onnx_int8"}
    full = [row for row in rows if row["policy"] == "full"]
    assert len(full) == 3
    assert full[0] == rows[0]
    assert not any(row["policy"].startswith("exit") for row in rows)
    status, _, err = run_program("benchmarks.inference", *where, "--runtimes=tflite")
    assert status == 2
    assert err.startswith(
        "error: --runtimes must be some of jax, onnx, onnx_int8, torch, got ['tflite']"
    )
