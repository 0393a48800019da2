"""The PyTorch programs that ours are measured against: they compute the same."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.training_step.method_costs import PEERS
from benchmarks.training_step.step_timing import compile_whole_step
from benchmarks.training_step.torch_peer import COMPILED, EAGER, TorchPeer, release
from dfs_jax.forks import create_fork
from dfs_jax.interop import from_torch_state_dict
from dfs_jax.interop.golden import COMPILER_OPTIONS
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.training.experiment import build_experiment, initial_state, training_step
from dfs_jax.training.sharding import put_batch
from dfs_jax.types import ExitOutputs, UserError
from tests.support.helpers import BrierLoss, HalfFork, tiny_config

CLASSES, BATCH = 7, 3


@pytest.mark.parametrize("name", ["torch"])
def test_a_peer_that_is_not_installed_is_one_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-benchmarks\.txt$"):
        PEERS.create(name)


torch = pytest.importorskip("torch")
from benchmarks.training_step.torch_exits import Surgery, TorchOutputs  # noqa: E402 (they need torch)
from benchmarks.training_step.torch_step import TorchStep, build_network, torch_loss  # noqa: E402

SMALL_MSDNET = {"initial_channels": 3, "growth": 2, "head_channels": 5, "head_dropout": 0.0}
# Two scales of which the second layer drops one.
TINY_MSDNET = {
    **{**SMALL_MSDNET, "num_exits": 2, "base": 1, "step": 1},
    **{"scale_factors": (1, 2), "bottleneck_factors": (1, 2)},
}
NETWORKS = [
    ("vgg7", {"width": 3}, 8),
    ("resnet18", {"width": 3, "stage_sizes": (1, 2)}, 8),
    ("msdnet", TINY_MSDNET, 8),
    pytest.param("resnet18", {"width": 3}, 16, marks=pytest.mark.slow),
    pytest.param("resnet50", {"width": 2, "stage_sizes": (2, 1)}, 8, marks=pytest.mark.slow),
    pytest.param("msdnet", {**SMALL_MSDNET, "base": 2}, 16, marks=pytest.mark.slow),
]
LOSSES = (create_loss("deep_supervision"), create_loss("byot"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
@pytest.mark.parametrize(("name", "options", "side"), NETWORKS)
def test_logits_and_gradients_are_ours(name, options, side, dtype, tolerance):
    draw = np.random.default_rng(0)
    images = draw.normal(size=(BATCH, side, side, 3)).astype(dtype)
    labels = draw.integers(0, CLASSES, BATCH)
    model = create_model(name, num_classes=CLASSES, adapt_features=True, **options)
    fork = create_fork("dfs", partition_ratio=0.3)
    network = build_network(model, fork).to(getattr(torch, dtype)).train()
    with jax.enable_x64(dtype == "float64"):
        variables = from_torch_state_dict(model, network.state_dict(), image_shape=(side, side, 3))
        logits, *gradients = our_logits_and_gradients(model, fork, variables, images, labels)
    for loss, ours in zip(LOSSES, gradients, strict=True):
        outputs = network(torch.from_numpy(images).permute(0, 3, 1, 2))
        torch_loss(loss)(outputs, torch.from_numpy(labels)).backward()
        theirs = from_torch_state_dict(model, gradients_of(network), image_shape=(side, side, 3))
        compare(logits, torch.stack(outputs.logits).detach().numpy(), tolerance)
        jax.tree.map(lambda a, b: compare(a, b, tolerance), ours, theirs["params"])


def our_logits_and_gradients(model, fork, variables, images, labels):
    """The logits, and the gradients of each of `LOSSES`, from one pass."""

    def run(variables, images):
        def outputs(params):
            return model.apply(
                {**variables, "params": params}, images, fork, train=True, mutable=["batch_stats"]
            )[0]

        found, pullback = jax.vjp(outputs, variables["params"])
        cotangents = [jax.grad(lambda o, f=f: f(o, labels).sum())(found) for f in LOSSES]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cotangents)
        return found.logits, jax.lax.map(pullback, stacked)[0]

    compiled = jax.jit(run, compiler_options=COMPILER_OPTIONS)
    logits, gradients = jax.device_get(compiled(variables, images))
    return logits, *(jax.tree.map(lambda g, i=i: g[i], gradients) for i in range(len(LOSSES)))


def gradients_of(network):
    """The gradients, by the names of the network's state_dict; running statistics as they are."""
    weights = {name: parameter.data for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        unused = torch.zeros_like(parameter)  # deep supervision leaves adaptation layers alone
        parameter.data = unused if parameter.grad is None else parameter.grad
    found = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        parameter.data, parameter.grad = weights[name], None
    return found


def compare(ours, theirs, tolerance):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("referencing", ["symmetric", "trunk_only", "none"])
@pytest.mark.parametrize("exit_index", [0, 1, 2])
def test_forks_are_ours(referencing, exit_index):
    fork = create_fork("dfs", partition_ratio=(0.3, 0.8), referencing=referencing)
    draw = np.random.default_rng(1)
    x, to_head, to_trunk = draw.normal(size=(3, 2, 5, 7)).astype(np.float32)
    ours, pullback = jax.vjp(lambda x: fork(x, exit_index=exit_index, num_exits=3)[:2], x)
    leaf = torch.tensor(x.swapaxes(1, 2).copy(), requires_grad=True)
    theirs = Surgery(fork, 3)(leaf[..., None], exit_index)
    views = [torch.tensor(g.swapaxes(1, 2).copy())[..., None] for g in (to_head, to_trunk)]
    torch.autograd.backward(theirs, views)
    for our_view, their_view in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(our_view, their_view.detach()[..., 0].numpy().swapaxes(1, 2))
    np.testing.assert_allclose(
        pullback((to_head, to_trunk))[0], leaf.grad.numpy().swapaxes(1, 2), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deep_supervision", {"exit_weights": (1.0, 0.5, 3.0), "label_smoothing": 0.2}),
        ("byot", {"kd_weight": 0.4, "temperature": 2.0, "feature_weight": 0.5}),
        ("byot", {"feature_weight": 0.0, "label_smoothing": 0.1}),
    ],
)
def test_losses_are_ours(name, options):
    loss, draw = create_loss(name, **options), np.random.default_rng(2)
    logits = draw.normal(size=(3, BATCH, CLASSES)).astype(np.float32)
    features = tuple(draw.normal(size=(3, BATCH, 5)).astype(np.float32))
    labels = draw.integers(0, CLASSES, BATCH)
    ours = loss(ExitOutputs(jnp.asarray(logits), features), jnp.asarray(labels)).sum()
    outputs = TorchOutputs(list(torch.from_numpy(logits)), list(map(torch.from_numpy, features)))
    assert float(ours) == pytest.approx(torch_loss(loss)(outputs, torch.from_numpy(labels)).item())


UNAUGMENTED = {"data.augmentation": "none", "data.crop_padding": None}


def test_steps_are_ours():
    """Images, normalisation, losses, momentum, weight decay and accuracies, for three steps."""
    options = {"weight_decay": 0.01, "nesterov": True}
    changes = {f"optimizer.{key}": value for key, value in options.items()}
    changes["schedule.name"] = "constant"
    experiment = build_experiment(tiny_config(**UNAUGMENTED, **changes))
    others = [TorchStep(experiment, layout) for layout in EAGER]
    state, step = initial_state(experiment), training_step(experiment)
    dataset, sampler = experiment.dataset, experiment.sampler
    for number in range(3):
        batch = dataset.train.take(sampler.indices(number))
        state = step(state, *put_batch(tuple(batch), experiment.mesh))
        for other in others:
            other.step()
            other.make_batch()
    for other in others:
        shape = dataset.image_shape
        theirs = from_torch_state_dict(
            experiment.model, other.network.state_dict(), image_shape=shape
        )
        jax.tree.map(lambda a, b: compare(a, b, 1e-4), state.eval_variables, theirs)
        assert other.correct.tolist() == state.totals.correct.tolist()
        assert other.total.item() == pytest.approx(float(state.totals.loss), rel=1e-4)
    assert (
        others[1]
        .network.feature_extractors[1]
        .conv.weight.is_contiguous(memory_format=torch.channels_last)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "does not augment, got 'crop'"),
        ({**UNAUGMENTED, "optimizer.name": "adamw"}, "no optimizer 'adamw': only sgd"),
        ({**UNAUGMENTED, "optimizer.gradient_clip": 1.0}, r"no optimizer\.gradient_clip"),
        (
            {**UNAUGMENTED, "model.name": "tests.support.helpers:TinyNetwork"},
            "no TinyNetwork: only models",
        ),
    ],
)
def test_what_the_peer_lacks(changes, message):
    with pytest.raises(UserError, match=message):
        TorchStep(build_experiment(tiny_config(**changes)), "channels_last")


def test_parts_that_the_peer_lacks():
    with pytest.raises(UserError, match=r"no loss like .*BrierLoss"):
        torch_loss(BrierLoss())
    with pytest.raises(UserError, match="no fork like HalfFork"):
        Surgery(HalfFork(0.5), 2)
    for name in ("resnet18", "msdnet"):
        model = create_model(name, num_classes=CLASSES, stem="imagenet")
        with pytest.raises(UserError, match="cifar stem only"):
            build_network(model, create_fork("plain"))


def test_the_peer_runs_where_jax_does(monkeypatch):
    assert PEERS.create("torch").layouts == EAGER
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(UserError, match="no tpu here, on which JAX runs: set JAX_PLATFORMS=cpu"):
        PEERS.create("torch")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no gpu here"):
        PEERS.create("torch")


def test_blocks_compute_in_the_type_that_the_config_names():
    """As ours: parameters and losses stay float32."""
    changes = {**UNAUGMENTED, "schedule.name": "constant"}
    plain, mixed = (
        TorchStep(build_experiment(tiny_config(**changes, compute_dtype=dtype)), "channels_last")
        for dtype in (None, "bfloat16")
    )
    (total, outputs), (exact, _) = mixed.forward(), plain.forward()
    assert outputs.logits[0].dtype == torch.bfloat16
    assert total.dtype == next(mixed.network.parameters()).dtype == torch.float32
    assert total.item() != exact.item()
    assert total.item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of its own parts
@pytest.mark.parametrize("fork", ["plain", "dfs"])
def test_compiled_steps_are_the_eager_ones(fork):
    changes = {**UNAUGMENTED, "schedule.name": "constant", "fork.name": fork}
    experiment = build_experiment(tiny_config(**changes))
    peer = TorchPeer(compiles=True)
    assert peer.layouts == COMPILED
    programs = peer.compile_step(experiment, COMPILED[0])
    eager = TorchStep(experiment, "channels_last")
    for _ in range(3):  # as many as warm up
        eager.step()
    total, _ = eager.forward()
    assert programs.forward()[0].item() == pytest.approx(total.item(), rel=1e-4)
    programs.step(2)
    assert programs.compile_s > 0
    release()


def test_a_number_of_steps_is_taken():
    experiment = build_experiment(tiny_config(**UNAUGMENTED))
    programs = PEERS.create("torch").compile_step(experiment, EAGER[0])
    programs.step(3)
    assert int(compile_whole_step(experiment).run(3).step) == 3
