"""Policies and what they belong to: one checkpoint of one run, its classes and its data."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from dfs_jax.inference import EarlyExitPredictor, load_exported, read_policy
from dfs_jax.inference.choose import choose_policy
from dfs_jax.inference.export import export_run
from dfs_jax.inference.export_network import export_network
from dfs_jax.inference.policy import FILE, Policy
from dfs_jax.inference.run_policy import check_belongs, load_with_policy
from dfs_jax.inference.trained import load_staged
from dfs_jax.inference.weights import weights_fingerprint
from dfs_jax.interop.files import weights_notes
from dfs_jax.reports.run_report import report_run
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.experiment import build_experiment, initial_state
from dfs_jax.training.loop import train
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config

NETWORK = {"model.name": "tests.support.helpers:TinyNetwork", "optimizer.learning_rate": 0.5}
QUICK = {"batch_size": 13, "shapes": (1, 13), "fall_back": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs, and so with two checkpoints."""
    workdir = tmp_path_factory.mktemp("trained")
    train(tiny_config(epochs=2, **NETWORK), workdir)
    return workdir


@pytest.fixture(scope="module")
def fitted(trained):
    """Each checkpoint and a policy that was fitted on it, the best first."""
    staged = [load_staged(trained, checkpoint=f"{step}") for step in steps_of(trained)]
    return [(one, choose_policy(one, "p", 0.5).policy) for one in staged]


@pytest.fixture
def run(trained, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(trained, tmp_path / "run")


def steps_of(workdir):
    """The best step and one that is not the best."""
    checkpoints = Checkpoints(workdir, read_only=True)
    best = checkpoints.best_step()
    return best, next(step for step in checkpoints.steps() if step != best)


def edit(path, **changes):
    """Changes a policy's file by hand; `fitted_on__step` names a field within another."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (content[section] if section else content)[field] = value
    path.write_text(json.dumps(content))


def test_a_policy_records_what_it_was_fitted_on(fitted):
    (best, policy), (other, _) = fitted
    about = policy.fitted_on
    assert about["step"] == best.step
    assert about["class_names"] == ["a", "b", "c"]
    assert about["measure"] == "max_softmax"
    weights = weights_fingerprint(best.stages)
    assert about["network"] == {"exits": 2, "classes": 3, "weights": weights}
    assert about["calibration"]["examples"] == 11
    assert weights != weights_fingerprint(other.stages)


def test_export_takes_the_checkpoint_that_the_policy_was_fitted_on(run, fitted, caplog):
    (best, _), (other, policy) = fitted
    policy.save(run / FILE)
    export_run(run, run / "exported")
    network = load_exported(run / "exported")
    assert network.manifest["about"]["step"] == network.policy.fitted_on["step"] == other.step
    assert weights_fingerprint(network.stages) == weights_fingerprint(other.stages)
    assert f"the checkpoint of step {other.step}" in caplog.text
    assert f"the best is step {best.step}" in caplog.text
    images = other.images("test", 13)
    np.testing.assert_array_equal(
        network.predictor(**QUICK)(images).exit_index,
        EarlyExitPredictor(other.stages, other.example, policy, **QUICK)(images).exit_index,
    )


def test_a_policy_of_another_step_is_refused_with_both(run, fitted):
    (best, _), (other, policy) = fitted
    policy.save(run / FILE)
    message = f"step {other.step}, this is step {best.step}: leave --checkpoint out"
    with pytest.raises(UserError, match=message):
        export_run(run, run / "exported", checkpoint="best")
    assert not (run / "exported").exists()
    staged, none = load_with_policy(run, checkpoint="best", policy="none")
    assert (staged.step, none) == (best.step, None)


def test_a_policy_whose_checkpoint_is_gone(run, fitted):
    (best, _), (other, policy) = fitted
    policy.save(run / FILE)
    shutil.rmtree(run / "checkpoints" / f"{other.step}")
    message = rf"step {other.step}, which is not in .* best is step {best.step}"
    with pytest.raises(UserError, match=message):
        export_run(run, run / "exported")


def test_a_policy_of_another_run_with_the_same_steps_is_refused_by_its_weights(run, fitted):
    """So is one from before a run was trained again in the same directory."""
    (best, own), (_, theirs) = fitted
    theirs.save(run / "theirs.json")
    edit(run / "theirs.json", fitted_on__step=best.step)
    with pytest.raises(UserError, match=r"theirs.json: .* network with other weights \(checksum"):
        export_run(run, run / "exported", policy=run / "theirs.json")
    theirs = read_policy(run / "theirs.json")
    with pytest.raises(UserError, match="network with other weights"):
        EarlyExitPredictor(best.stages, best.example, theirs, **QUICK)
    predictor = EarlyExitPredictor(best.stages, best.example, own, **QUICK)
    with pytest.raises(UserError, match="network with other weights"):
        predictor.with_policy(theirs)
    with pytest.raises(UserError, match="network with other weights"):
        export_network(
            run / "exported", best.stages, best.example, labels=("a", "b", "c"), policy=theirs
        )


@pytest.mark.slow
def test_an_export_does_not_take_another_exports_policy(run, fitted):
    for name, (one, policy) in zip("ab", fitted, strict=True):
        export_network(run / name, one.stages, one.example, labels=("a", "b", "c"), policy=policy)
    with pytest.raises(UserError, match="network with other weights"):
        load_exported(run / "a").predictor(fitted[1][1], **QUICK)
    shutil.copy(run / "b" / FILE, run / "a" / FILE)
    with pytest.raises(UserError, match=r"policy.json is damaged or of another export"):
        load_exported(run / "a")


EDITS = {
    "classes": ({"fitted_on__class_names": ["a", "b", "d"]}, r"class_names \(a, b, d\), this run"),
    "data": ({"fitted_on__data": "cifar10"}, "data 'cifar10', this run has 'tests.support.helpers"),
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
def test_a_policy_that_belongs_to_something_else(tmp_path, fitted, name):
    changes, message = EDITS[name]
    staged, policy = fitted[0]
    path = policy.save(tmp_path / FILE)
    check_belongs(read_policy(path), staged, path)
    edit(path, **changes)
    with pytest.raises(UserError, match=message) as told:
        check_belongs(read_policy(path), staged, path)
    assert "\n" not in str(told.value)
    assert "policy.json" in str(told.value)


def test_thresholds_are_moved_by_hand_only_without_a_guarantee(tmp_path, fitted):
    staged, policy = fitted[0]
    path = policy.save(tmp_path / FILE)
    edit(path, thresholds=[0.25])
    check_belongs(read_policy(path), staged, path)
    certified = choose_policy(staged, "epsilon", 0.95).policy
    path = certified.save(path)
    assert read_policy(path) == certified
    edit(path, thresholds=[0.25])
    with pytest.raises(UserError, match=r"its thresholds were .* choose again"):
        read_policy(path)


def test_a_policy_that_does_not_say_is_taken_with_a_warning(run, fitted, caplog):
    Policy((0.5,)).save(run / FILE)
    staged, policy = load_with_policy(run)
    assert (staged.step, policy) == (fitted[0][0].step, Policy((0.5,)))
    assert "does not say which network it was fitted on" in caplog.text


def test_reports_and_weights_beside_a_run_are_the_best_checkpoints(run, caplog):
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
    assert f"holds step {best}, the best checkpoint there is now step {other}" in caplog.text
