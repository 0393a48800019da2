"""Policies and what they belong to: one checkpoint of one run, its classes and its data."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from dfs_jax.analysis.run_report import report_run
from dfs_jax.inference import EarlyExitPredictor, load_exported, read_policy
from dfs_jax.inference.choose import choose_policy
from dfs_jax.inference.export import export_run
from dfs_jax.inference.identity import weights_fingerprint
from dfs_jax.inference.policy import FILE, Policy
from dfs_jax.interop.files import weights_notes
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.experiment import build_experiment, initial_state
from dfs_jax.training.loop import train
from dfs_jax.training.run_policy import load_with_policy
from dfs_jax.training.staged import load_staged
from dfs_jax.types import UserError
from tests.helpers import tiny_config

NETWORK = {"model.name": "tests.helpers:TinyNetwork", "optimizer.learning_rate": 0.5}
QUICK = {"batch_size": 13, "shapes": (1, 13), "fall_back": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs that differ in their seeds."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train(tiny_config(seed=seed, **NETWORK), root / f"run{seed}")
    return root


@pytest.fixture
def root(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def steps_of(workdir):
    """The best step and one that is not the best."""
    checkpoints = Checkpoints(workdir, read_only=True)
    best = checkpoints.best_step()
    return best, next(step for step in checkpoints.steps() if step != best)


def choose(workdir, checkpoint="best", output=None, target="p", **options):
    """What the program `choose` writes."""
    value = 0.95 if target == "epsilon" else 0.5
    staged = load_staged(workdir, checkpoint=f"{checkpoint}")
    fitted = choose_policy(staged, target, value, **options)
    return fitted.policy.save(output or workdir / FILE)


def edit(path, **changes):
    """Changes a policy's file by hand; `fitted_on__step` names a field within another."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (content[section] if section else content)[field] = value
    path.write_text(json.dumps(content))


def test_a_policy_records_what_it_was_fitted_on(root):
    best, _ = steps_of(root / "run0")
    about = read_policy(choose(root / "run0")).fitted_on
    assert about["step"] == best
    assert about["class_names"] == ["a", "b", "c"]
    assert about["measure"] == "max_softmax"
    stages = load_staged(root / "run0").stages
    expected = {"exits": 2, "classes": 3, "weights": weights_fingerprint(stages)}
    assert about["network"] == expected
    assert about["calibration"]["examples"] == 11
    others = {weights_fingerprint(load_staged(root / f"run{i}").stages) for i in (0, 1)}
    assert len(others) == 2


def test_export_takes_the_checkpoint_that_the_policy_was_fitted_on(root, caplog):
    run = root / "run0"
    best, other = steps_of(run)
    choose(run, other)
    export_run(run, root / "exported")
    network = load_exported(root / "exported")
    assert network.manifest["about"]["step"] == network.policy.fitted_on["step"] == other
    expected = load_staged(run, checkpoint=f"{other}").stages
    assert weights_fingerprint(network.stages) == weights_fingerprint(expected)
    assert f"the checkpoint of step {other}" in caplog.text
    assert f"the best is step {best}" in caplog.text


@pytest.mark.parametrize("consumer", [export_run, load_with_policy])
def test_a_policy_of_another_step_is_refused_with_both(root, consumer):
    run = root / "run0"
    best, other = steps_of(run)
    choose(run, other)
    arguments = (run, root / "exported") if consumer is export_run else (run,)
    with pytest.raises(UserError, match=f"step {other}, this is step {best}: leave --checkpoint"):
        consumer(*arguments, checkpoint="best")
    assert not (root / "exported").exists()
    consumer(*arguments, checkpoint="best", policy="none")


def test_a_policy_whose_checkpoint_is_gone(root):
    run = root / "run0"
    best, other = steps_of(run)
    choose(run, other)
    shutil.rmtree(run / "checkpoints" / f"{other}")
    with pytest.raises(UserError, match=rf"step {other}, which is not in .* best is step {best}"):
        export_run(run, root / "exported")


def test_a_policy_of_another_run_is_refused_by_its_weights(root):
    step = "latest"
    theirs = choose(root / "run1", step, root / "theirs.json")
    with pytest.raises(UserError, match=r"theirs.json: .* network with other weights \(checksum"):
        export_run(root / "run0", root / "exported", policy=theirs)
    own = load_staged(root / "run0", checkpoint=step)
    with pytest.raises(UserError, match="network with other weights"):
        EarlyExitPredictor(own.stages, own.example, read_policy(theirs), **QUICK)
    choose(root / "run0", step)
    export_run(root / "run0", root / "exported")
    network = load_exported(root / "exported")
    with pytest.raises(UserError, match="network with other weights"):
        network.predictor(read_policy(theirs), **QUICK)
    with pytest.raises(UserError, match="network with other weights"):
        network.predictor(**QUICK).with_policy(read_policy(theirs))
    images = own.images("test", 13)
    np.testing.assert_array_equal(
        network.predictor(**QUICK)(images).exit_index,
        EarlyExitPredictor(own.stages, own.example, network.policy, **QUICK)(images).exit_index,
    )


def test_a_run_that_was_trained_again_does_not_take_the_old_policy(root):
    choose(root / "run0", "latest")
    shutil.rmtree(root / "run0" / "checkpoints")
    shutil.copytree(root / "run1" / "checkpoints", root / "run0" / "checkpoints")
    with pytest.raises(UserError, match="network with other weights"):
        export_run(root / "run0", root / "exported", checkpoint="latest")


def test_an_export_does_not_take_another_exports_policy(root):
    for i in (0, 1):
        choose(root / f"run{i}")
        export_run(root / f"run{i}", root / f"exported{i}")
    shutil.copy(root / "exported1" / FILE, root / "exported0" / FILE)
    with pytest.raises(UserError, match=r"policy.json is damaged or of another export"):
        load_exported(root / "exported0")


EDITS = {
    "classes": ({"fitted_on__class_names": ["a", "b", "d"]}, r"class_names \(a, b, d\), this run"),
    "data": ({"fitted_on__data": "cifar10"}, "data 'cifar10', this run has 'tests.helpers"),
    "model": ({"fitted_on__model": "vgg7"}, "model 'vgg7', this run has"),
    "mean": ({"fitted_on__mean": [0.5, 0.5, 0.5]}, r"mean \(0.5, 0.5, 0.5\), this run"),
    "calibration data": (
        {"fitted_on__calibration": {"examples": 11, "fingerprint": "labels:0"}},
        "other validation data than the run holds out now",
    ),
    "measure": ({"measure": "margin"}, "its measure were 'max_softmax' when it was fitted"),
    "temperatures": ({"temperatures": [2.0, 3.0]}, r"its temperatures were .* are \[2.0, 3.0\]"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_policy_that_belongs_to_something_else(root, name):
    changes, message = EDITS[name]
    edit(choose(root / "run0"), **changes)
    with pytest.raises(UserError, match=message) as told:
        export_run(root / "run0", root / "exported")
    assert "\n" not in str(told.value)
    assert "policy.json" in str(told.value)


def test_thresholds_are_moved_by_hand_only_without_a_guarantee(root):
    path = choose(root / "run0")
    edit(path, thresholds=[0.25])
    export_run(root / "run0", root / "exported")
    assert load_exported(root / "exported").policy.thresholds == (0.25,)
    path = choose(root / "run0", target="epsilon")
    read_policy(path)
    edit(path, thresholds=[0.25])
    with pytest.raises(UserError, match=r"its thresholds were .* choose again"):
        read_policy(path)


def test_a_policy_that_does_not_say_is_taken_with_a_warning(root, caplog):
    Policy((0.5,)).save(root / "run0" / FILE)
    export_run(root / "run0", root / "exported")
    assert "does not say which network it was fitted on" in caplog.text
    assert load_exported(root / "exported").policy.thresholds == (0.5,)


def test_reports_and_weights_beside_a_run_are_the_best_checkpoints(root, caplog):
    run = root / "run0"
    best, other = steps_of(run)
    report_run(run)
    kept = {name: (run / name).read_bytes() for name in ("report.json", "weights.safetensors")}
    assert weights_notes(run / "weights.safetensors") == {"step": f"{best}"}
    report_run(run, checkpoint=f"{other}")
    assert kept == {name: (run / name).read_bytes() for name in kept}
    assert json.loads((run / f"report_step{other}.json").read_text())["run"]["step"] == other
    config = tiny_config(init_from=str(run / "weights.safetensors"), **NETWORK)
    initial_state(build_experiment(config))
    assert "is now step" not in caplog.text
    shutil.rmtree(run / "checkpoints" / f"{best}")
    initial_state(build_experiment(config))
    assert f"holds step {best}, the best checkpoint there is now step" in caplog.text
