"""Conflict between exits: against whole flat gradients, by hand, and while a run goes on."""

from __future__ import annotations

import functools
import json
import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore

from dfs_jax.forks import create_fork
from dfs_jax.gradients.conflict import (
    count_pairs,
    gram_by_tensor,
    joint_gram,
    measure_gram,
    pair_cosines,
    tensor_names,
)
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.reports.gradient_conflict import (
    check_comparable,
    describe_gram,
    measure_run,
    read_probe,
    table_for_terminal,
    write_measurements,
)
from dfs_jax.training import loop
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.conflict import ConflictProbe, conflict_line
from dfs_jax.training.experiment import abstract_state, build_experiment
from dfs_jax.training.loop import train
from dfs_jax.training.metrics import read_metrics
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config
from tests.support.networks import SMALL_MSDNET

MODELS = {"vgg7": {"width": 3}, "msdnet": SMALL_MSDNET}
LABELS = jnp.asarray([1, 0, 3, 2, 1])
TIMINGS = ("images_per_second", "data_wait")


def network(name, loss):
    adapts = getattr(loss, "adapts_features", False)
    model = create_model(name, num_classes=5, adapt_features=adapts, **MODELS[name])
    variables = init_variables(model, jax.random.key(0), (8, 8, 3))
    draw = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: np.float64(x) + draw.uniform(0, 0.2, x.shape), variables)
    return model, variables, draw.normal(size=(5, 8, 8, 3))


@functools.cache
def measured(name, fork, loss):
    """The Gram matrices in float64, by name, and each exit's own gradient from plain autodiff."""
    fork, loss = create_fork(fork), create_loss(loss)
    model, variables, images = network(name, loss)

    def exit_loss(params, i):
        outputs, _ = model.apply(
            {**variables, "params": params}, images, fork, train=True, mutable=["batch_stats"]
        )
        return loss(outputs, LABELS)[i]

    measure = functools.partial(measure_gram, model, fork, loss)
    gram = jax.jit(measure)(variables, images, LABELS)
    own_gradient = jax.jit(jax.grad(exit_loss))
    return (
        dict(zip(tensor_names(variables["params"]), np.asarray(gram), strict=True)),
        [own_gradient(variables["params"], i) for i in range(model.num_exits)],
    )


def slow_cosine(grads, name, i, j):
    flat = []
    for grad in (grads[i], grads[j]):
        for part in name.split("/"):
            grad = grad[part]
        flat.append(np.ravel(grad))
    norms = [np.linalg.norm(x) for x in flat]
    return np.dot(*flat) / np.prod(norms) if all(norms) else np.nan


@pytest.mark.parametrize(
    ("name", "fork", "loss"),
    [
        pytest.param("vgg7", "plain", "byot", marks=pytest.mark.slow),
        ("vgg7", "dfs", "deep_supervision"),
        pytest.param("msdnet", "plain", "deep_supervision", marks=pytest.mark.slow),
        pytest.param("msdnet", "dfs", "deep_supervision", marks=pytest.mark.slow),
    ],
)
def test_cosines_are_those_of_each_exits_own_gradient(name, fork, loss):
    with jax.enable_x64(True):
        gram, grads = measured(name, fork, loss)
    exits = len(grads)
    unreached = 0
    for tensor, matrix in gram.items():
        expected = [[slow_cosine(grads, tensor, i, j) for j in range(exits)] for i in range(exits)]
        np.testing.assert_allclose(pair_cosines(matrix), expected, rtol=1e-9, atol=1e-9)
        unreached += np.isnan(expected).sum()
    assert unreached > 0  # deep blocks are beyond early exits
    assert not any(tensor.startswith("head") for tensor in gram)


def test_dfs_gives_the_first_block_two_kinds_of_channels_and_leaves_a_conflict_in_one():
    """Exit 1 trains its own channels of block 1, exits 2 to 6 the others, and these together."""
    with jax.enable_x64(True):
        gram, grads = measured("vgg7", "dfs", "deep_supervision")
    kernels = [grad["block1"]["conv"]["kernel"] for grad in grads]
    shared = 2  # round(0.5 * 3)
    assert not kernels[0][..., :shared].any()
    assert all(not kernel[..., shared:].any() for kernel in kernels[1:])
    cosines = pair_cosines(gram["block1/conv/kernel"])
    np.testing.assert_array_equal(cosines[0, 1:], 0)
    deeper = cosines[1:, 1:]
    assert np.all(deeper != 0)
    counts = count_pairs(gram["block1/conv/kernel"])
    assert (counts.pairs, counts.disjoint) == (15, 5)
    assert counts.conflicting == (deeper[np.triu_indices(5, 1)] < 0).sum() > 0


# Two exits' gradients of one tensor, their cosine, and what they count as.
OPPOSITE = ([[1.0, -2.0, 0.5], [-3.0, 6.0, -1.5]], -1.0, (1, 1, 0))
ORTHOGONAL = ([[2.0, 0.0, 0.0], [0.0, 5.0, -7.0]], 0.0, (1, 0, 1))
ALIKE = ([[2.0, 1.0, 0.0], [4.0, 2.0, 0.0]], 1.0, (1, 0, 0))
SILENT = ([[0.0, 0.0, 0.0], [4.0, 2.0, 0.0]], np.nan, (0, 0, 0))


@pytest.mark.parametrize(("rows", "cosine", "counts"), [OPPOSITE, ORTHOGONAL, ALIKE, SILENT])
def test_two_exits_by_hand(rows, cosine, counts):
    gram = np.asarray(gram_by_tensor({"block1": {"kernel": jnp.array(rows)}}, 2))
    assert gram.shape == (1, 2, 2)
    np.testing.assert_allclose(pair_cosines(gram)[0, 0, 1], cosine, rtol=1e-6)
    assert count_pairs(gram) == counts


def three_exits():
    """Opposite and alike in block 1 (kernel and bias), exit 1 and 2 alone beyond."""
    grads = {
        "block1": {
            "conv": {
                "kernel": jnp.array([[[1.0, 2.0]], [[-1.0, -2.0]], [[2.0, -1.0]]]),
                "bias": jnp.array([[3.0], [4.0], [-5.0]]),
            }
        },
        "block2": {"conv": {"kernel": jnp.array([[3.0, 4.0], [4.0, 3.0]])}},
        "block10": {"conv": {"kernel": jnp.array([[7.0]])}},
    }
    return np.asarray(gram_by_tensor(grads, 3)), tensor_names(grads)


def test_a_measurement_in_plain_data():
    found = describe_gram(*three_exits())
    names = {level: [row["name"] for row in found[level]] for level in ("blocks", "layers")}
    assert names["blocks"] == ["block1", "block2", "block10"]
    assert names["layers"] == ["block1/conv", "block2/conv", "block10/conv"]
    kernel, beyond, last = found["tensors"][1:]
    assert (kernel["name"], kernel["pairs"]) == ("block1/conv/kernel", 3)
    assert kernel["conflicting_pairs"] == pytest.approx(1 / 3)  # exits 1 and 2
    assert kernel["disjoint_pairs"] == pytest.approx(2 / 3)
    # bias: 3 and 4 agree, -5 conflicts with both
    layer = found["layers"][0]
    assert (layer["pairs"], layer["conflicting_pairs"]) == (6, pytest.approx(3 / 6))
    np.testing.assert_allclose(layer["norms"], np.sqrt([5 + 9, 5 + 16, 5 + 25]), rtol=1e-6)
    assert layer["cosines"][0][1] == pytest.approx((-5 + 12) / np.sqrt(14 * 21))
    assert beyond["cosines"] == [
        [None, None, None],
        [None, pytest.approx(1), pytest.approx(0.96)],
        [None, pytest.approx(0.96), pytest.approx(1)],
    ]
    assert (last["pairs"], last["conflicting_pairs"], last["norms"]) == (0, None, [None, None, 7.0])
    trunk = found["trunk"]
    assert (trunk["pairs"], trunk["conflicting_pairs"]) == (7, pytest.approx(3 / 7))
    means = [[1, 0, -0.5], [0, 1, (0 - 1 + 0.96) / 3], [-0.5, (0 - 1 + 0.96) / 3, 1]]
    np.testing.assert_allclose(trunk["mean_cosines"], means, rtol=1e-6, atol=1e-7)
    json.dumps(found, allow_nan=False)


def test_the_line_of_a_measurement():
    line = conflict_line(*three_exits(), step=7, epoch=2)
    assert (line["step"], line["epoch"], line["split"]) == (7, 2, "probe")
    assert line["trunk/conflicting_pairs"] == pytest.approx(3 / 7)
    assert line["block1/conflicting_pairs"] == pytest.approx(3 / 6)
    assert line["block2/conflicting_pairs"] == 0
    assert np.isnan(line["block10/conflicting_pairs"])
    assert line["exit1/exit3/cosine"] == pytest.approx(-0.5)
    norms = [line[f"exit{i}/gradient_norm"] for i in (1, 2, 3)]
    np.testing.assert_allclose(norms, np.sqrt([14, 21 + 25, 30 + 25 + 49]), rtol=1e-6)


def test_an_exit_that_reaches_nothing_has_no_direction():
    gram = np.full((2, 2, 2), np.nan)
    gram[:, 1, 1] = 4, 5
    np.testing.assert_array_equal(joint_gram(gram), [[np.nan, np.nan], [np.nan, 9]])
    line = conflict_line(gram, ("block1/kernel", "block2/kernel"), step=1, epoch=0)
    assert (line["exit1/gradient_norm"], line["exit2/gradient_norm"]) == (0, 3)
    assert np.isnan(line["exit1/exit2/cosine"])


# 30 training examples in batches of 5: 6 steps an epoch, 12 in all; measured after 4, 8 and 12.
CONFIG = tiny_config(
    epochs=2, conflict_every_steps=4, conflict_examples=7, checkpoint_every_steps=4
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(CONFIG, workdir)
    return workdir


def final_state(workdir, config=CONFIG):
    experiment = build_experiment(config)
    return Checkpoints(workdir, read_only=True).restore("latest", abstract_state(experiment))[0]


def untimed(workdir, splits):
    return [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in read_metrics(workdir)
        if line["split"] in splits
    ]


def test_training_is_bit_for_bit_as_without_measuring(run, tmp_path):
    config = CONFIG.copy_and_resolve_references()
    config.conflict_every_steps = 0
    train(config, tmp_path)
    chex.assert_trees_all_equal(final_state(run), final_state(tmp_path))
    splits = ("train", "validation")
    assert untimed(run, splits) == untimed(tmp_path, splits)
    assert not read_probe(tmp_path)


@pytest.mark.slow
def test_a_run_may_be_continued_with_other_measurements(run, tmp_path, monkeypatch):
    config = CONFIG.copy_and_resolve_references()
    config.conflict_every_steps = 0
    with monkeypatch.context() as patch:
        stop_after(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(config, tmp_path).step == 5
    config.update({"conflict_every_steps": 6, "conflict_examples": 5})
    train(config, tmp_path)
    chex.assert_trees_all_equal(final_state(run), final_state(tmp_path))
    assert [line["step"] for line in read_probe(tmp_path)] == [6, 12]


def test_every_line_is_what_the_checkpoint_of_its_step_gives(run):
    experiment = build_experiment(CONFIG)
    assert [line["step"] for line in read_probe(run)] == [4, 8, 12]
    probe = ConflictProbe(experiment, 7)
    assert (probe.split, probe.examples) == ("validation", 7)
    state = final_state(run)
    gram = probe(state.params, state.batch_stats)
    expected = conflict_line(gram, probe.tensor_names, step=12, epoch=2)
    line = read_probe(run)[-1]
    numbers = {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in expected.items()}
    assert line == numbers
    assert 0 < line["trunk/conflicting_pairs"] < 1
    assert line["block3/conflicting_pairs"] is None  # one exit alone
    assert all(line[f"exit{i}/gradient_norm"] > 0 for i in range(1, 4))


def test_tensorboard_has_the_same_numbers(run):
    written = {
        value.tag: value.simple_value
        for path in (run / "tensorboard").iterdir()
        for event in events(path)
        for value in event.summary.value
        if event.step == 12
    }
    line = read_probe(run)[-1]
    numbers = {k: v for k, v in line.items() if k not in ("step", "epoch", "split")}
    for name, number in numbers.items():
        if number is None:
            assert f"probe/{name}" not in written
        else:
            assert written[f"probe/{name}"] == pytest.approx(number, rel=1e-6)


# 4: measured, not saved; 7: within an epoch; 8: measured and saved.
@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 7])
def test_a_killed_run_ends_with_the_same_metrics(run, tmp_path, monkeypatch, step):
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        if step == 4:
            patch.setattr(loop._Run, "_save", kill)  # after its line was written
        else:
            stop_after(patch, step, kill)
        with pytest.raises(Killed):
            train(CONFIG, tmp_path)
    train(CONFIG, tmp_path)
    splits = ("train", "validation", "probe")
    assert untimed(tmp_path, splits) == untimed(run, splits)
    chex.assert_trees_all_equal(final_state(tmp_path), final_state(run))


def stop_after(patch, step, action):
    original = loop.training_step

    def wrapped(experiment, takes):
        inner = original(experiment, takes)

        def step_fn(state, *batch):
            if int(state.step) == step:
                action()
            return inner(state, *batch)

        return step_fn

    patch.setattr(loop, "training_step", wrapped)


def events(path):
    """Reads an events file: records of a length, its checksum, an event, its checksum."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conflict_every_steps": -1}, "conflict_every_steps must be at least 0, got -1"),
        ({"conflict_every_steps": 1, "conflict_examples": 0}, "at least 1 example.*0 were asked"),
    ],
)
def test_mistakes(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(tiny_config(**changes), tmp_path)


def test_a_finished_run_is_measured_and_compared(run, tmp_path):
    found = measure_run(run, examples=7)
    assert found["run"]["step"] == 12
    assert found["run"]["split"] == "validation"
    assert found["trunk"]["conflicting_pairs"] == read_probe(run)[-1]["trunk/conflicting_pairs"]
    other = json.loads(json.dumps(found))
    other["run"]["workdir"] = "another"
    written = write_measurements([found, other], [read_probe(run)] * 2, tmp_path / "both.json")
    assert [path.name for path in written] == ["both.json", "both.png", "both_over_time.png"]
    data = json.loads(written[0].read_text(), parse_constant=lambda name: pytest.fail(name))
    assert data == {"runs": [found, other]}
    for path in written[1:]:
        with Image.open(path) as image:
            assert min(image.size) > 500
    table = table_for_terminal([found, other])
    share = f"{100 * found['trunk']['conflicting_pairs']:.1f} %"
    assert table.splitlines()[-1].split("trunk")[1].count(share) >= 2


def test_runs_of_different_networks_are_not_compared():
    gram, names = three_exits()
    one, other = describe_gram(gram, names), describe_gram(gram[:2], names[:2])
    one["run"], other["run"] = {"workdir": "wide"}, {"workdir": "narrow"}
    check_comparable([one, one])
    with pytest.raises(UserError, match="narrow has other tensors than that of wide"):
        check_comparable([one, other])
