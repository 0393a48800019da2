"""Exits on a Flax network whose code stays as it is."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export

import dfs_jax
from configs import common
from dfs_jax.costs.flops import exit_costs
from dfs_jax.forks import create_fork
from dfs_jax.gradients import Batch
from dfs_jax.gradients.exit_gradients import exit_gradients
from dfs_jax.gradients.summed import summed_loss
from dfs_jax.inference.stages import check_stages, model_stages
from dfs_jax.interop import load_trunk, save_weights
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.added_exits import LinearHead, add_exits
from dfs_jax.models.contract import init_variables, split_trunk_and_heads
from dfs_jax.surgery import FeatureSurgery
from dfs_jax.training.experiment import build_experiment, initial_state
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config
from tests.support.networks import macs

CLASSES, SIDE, WIDTH = 3, 8, 5
IMAGES = jax.random.normal(jax.random.key(0), (7, SIDE, SIDE, 3))
EXAMPLE = jax.ShapeDtypeStruct((SIDE, SIDE, 3), jnp.float32)


class Block(nn.Module):
    width: int = WIDTH

    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.Conv(self.width, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=deterministic, name="norm")(nn.relu(x))
        return nn.Dropout(0.1, deterministic=deterministic)(x)


class Net(nn.Module):
    """A user's network: blocks with statistics and dropout, some of them nested."""

    num_classes: int = CLASSES
    block: type = Block

    @nn.compact
    def __call__(self, x, train=False):
        x = self.block(name="layer1")(x, not train)
        x = Encoder(self.block, name="encoder")(x, train)
        return nn.Dense(self.num_classes, name="classifier")(x.mean((1, 2)))


class Encoder(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, x, train):
        for i in (2, 3):
            x = self.block(name=f"layer{i}")(x, not train)
        return x


AT = ("encoder/layer2", "layer1")  # in any order: exits are numbered as they are called


def network(**options):
    model = add_exits(Net(**options), AT)
    return model, init_variables(model, jax.random.key(1), EXAMPLE.shape)


def test_the_last_exit_is_the_network_itself():
    model, variables = network()
    assert dfs_jax.add_exits is add_exits
    assert sorted(variables["params"]) == ["backbone", "head1", "head2"]
    alone = {name: tree["backbone"] for name, tree in variables.items()}
    for fork in (None, FeatureSurgery(0.4)):
        outputs = model.apply(variables, IMAGES, fork)
        np.testing.assert_array_equal(outputs.logits[-1], Net().apply(alone, IMAGES))
    key = jax.random.key(3)
    outputs, updated = model.apply(
        variables, IMAGES, train=True, mutable=["batch_stats"], rngs={"dropout": key}
    )
    new = updated["batch_stats"]["backbone"]
    assert jax.tree.structure(new) == jax.tree.structure(alone["batch_stats"])
    assert not np.array_equal(new["layer1"]["norm"]["mean"], jnp.zeros(WIDTH))
    other = model.apply(
        variables, IMAGES, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(4)}
    )[0]
    assert not np.array_equal(outputs.logits, other.logits)  # dropout acts


class ByHand(nn.Module):
    """The same network with the exits written into it."""

    @nn.compact
    def __call__(self, x, fork):
        logits = []
        fork = functools.partial(fork, num_exits=3)
        for i in range(3):
            x = nn.relu(nn.Conv(WIDTH, (3, 3), name=f"conv{i}")(x))
            x = nn.BatchNorm(use_running_average=False, name=f"norm{i}")(x)
            if i < 2:
                forked = fork(x, exit_index=i)
                head = nn.Dense(CLASSES, name=f"head{i + 1}")
                logits.append(head(forked.to_head.mean((1, 2))))
                x = forked.to_trunk
        return jnp.stack([*logits, nn.Dense(CLASSES, name="classifier")(x.mean((1, 2)))])


class WithoutDropout(Block):
    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.relu(nn.Conv(self.width, (3, 3), name="conv")(x))
        return nn.BatchNorm(use_running_average=deterministic, name="norm")(x)


def by_hand(tree):
    """A tree of the wrapped network's parameters, under the names of `ByHand`."""
    blocks = [
        tree["backbone"]["layer1"],
        *(tree["backbone"]["encoder"][f"layer{i}"] for i in (2, 3)),
    ]
    named = {
        f"{part}{i}": block[part] for i, block in enumerate(blocks) for part in ("conv", "norm")
    }
    heads = {f"head{i}": tree[f"head{i}"]["classifier"] for i in (1, 2)}
    return {**named, **heads, "classifier": tree["backbone"]["classifier"]}


def test_gradients_are_those_of_exits_written_by_hand_and_cost_less():
    model, variables = network(block=WithoutDropout)
    fork, labels = FeatureSurgery(0.4), jnp.arange(7) % CLASSES
    loss = create_loss("deep_supervision")

    def step(model, params):
        batch = Batch(IMAGES, labels, jax.random.key(0), jax.random.key(0))
        return summed_loss(model, fork)(params, variables["batch_stats"], batch, loss)[0]

    def written(params):
        logits = ByHand().apply({"params": params}, IMAGES, fork, mutable=["batch_stats"])[0]
        log_p = jax.nn.log_softmax(logits)
        return -log_p[:, jnp.arange(7), labels].mean(axis=1).sum()

    params = variables["params"]
    ours = jax.jit(jax.grad(functools.partial(step, model)))
    found, expected = by_hand(ours(params)), jax.jit(jax.grad(written))(by_hand(params))
    for name, tree in expected.items():
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found[name], tree
        )
    naive = functools.partial(step, model.clone(partitioned_backward=False))
    dead = 2 * 7 * SIDE**2 * 9 * WIDTH * (WIDTH - 2)  # input gradients of two convolutions
    dead += 2 * 7 * CLASSES * 2  # and of two heads
    assert macs(jax.grad(naive), params) - macs(ours, params) == dead


@pytest.mark.slow
def test_gradients_by_exit_are_one_backward_pass_each():
    model, variables = network(block=WithoutDropout)
    loss, labels, key = create_loss("deep_supervision"), jnp.arange(7) % CLASSES, jax.random.key(2)
    fork = FeatureSurgery(0.4)

    def of_exit(params, i):
        outputs, _ = model.apply(
            {**variables, "params": params}, IMAGES, fork, train=True, mutable=["batch_stats"]
        )
        return loss(outputs, labels)[i]

    each = [jax.jit(jax.grad(of_exit), static_argnums=1)(variables["params"], i) for i in range(3)]
    trunk = jax.tree.map(lambda *g: jnp.stack(g), *(split_trunk_and_heads(g)[0] for g in each))
    heads = jax.tree.map(lambda *g: sum(g), *(split_trunk_and_heads(g)[1] for g in each))
    for way in ("vmap", "unroll", "scan"):
        run = functools.partial(exit_gradients, model, fork, loss, key=key, exits=way)
        found = jax.jit(run)(variables, IMAGES, labels)
        for a, e in ((found.trunk, trunk), (found.heads, heads)):
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), a, e)


def test_stages_and_costs():
    model, variables = network()
    stages = model_stages(model, variables, create_fork("dfs"), EXAMPLE)
    assert check_stages(stages, EXAMPLE) == CLASSES
    carry, expected = IMAGES, model.apply(variables, IMAGES).logits
    for stage, of_exit in zip(stages, expected, strict=True):
        carry, logits = jax.jit(stage)(carry)
        np.testing.assert_allclose(logits, of_exit, rtol=1e-5, atol=1e-5)
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *EXAMPLE.shape), jnp.float32)
    exported = export.export(jax.jit(stages[0]))(images)
    np.testing.assert_allclose(exported.call(IMAGES)[1], expected[0], rtol=1e-5, atol=1e-5)
    head, block = WIDTH * CLASSES, SIDE**2 * 9 * WIDTH * WIDTH
    first = SIDE**2 * 9 * 3 * WIDTH
    costs = exit_costs(model, EXAMPLE.shape)
    assert [cost.macs for cost in costs] == [
        first + head,
        first + block + 2 * head,
        first + 2 * block + 3 * head,
    ]
    assert costs[-1].macs_without_earlier_heads == first + 2 * block + head
    sizes = jax.tree.map(jnp.size, variables["params"])
    assert costs[-1].params == sum(jax.tree.leaves(sizes))
    first_layer = sum(jax.tree.leaves((sizes["backbone"]["layer1"], sizes["head1"])))
    assert costs[0].params == first_layer


class Transformed(nn.Module):
    """Submodules inside `nn.remat`, `nn.jit` and, if asked, `nn.scan`."""

    scanned: bool = False
    num_classes: int = CLASSES

    @nn.compact
    def __call__(self, x):
        x = nn.remat(Plain)(name="again")(x)
        x = nn.jit(Plain)(name="compiled")(x)
        if self.scanned:
            loop = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = loop(name="loop")(x, None)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(WIDTH, (1, 1), name="inner")(x))


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Plain(name="layer")(x), None


def test_submodules_in_transformed_ones():
    for at in (("again", "compiled"), ("again/inner", "compiled/inner")):
        model = add_exits(Transformed(), at)
        variables = init_variables(model, jax.random.key(1), EXAMPLE.shape)
        logits = jax.jit(model.apply)(variables, IMAGES).logits
        alone = Transformed().apply({"params": variables["params"]["backbone"]}, IMAGES)
        np.testing.assert_allclose(logits[-1], alone, rtol=1e-6, atol=1e-6)
        loss = lambda p: model.apply({"params": p}, IMAGES, FeatureSurgery(0.5)).logits.sum()  # noqa: B023, E731
        grads = jax.jit(jax.grad(loss))(variables["params"])
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


class Twice(nn.Module):
    num_classes: int = CLASSES

    def setup(self):
        self.layer, self.pair = nn.Conv(3, (1, 1)), Pair()
        self.last = nn.Dense(self.num_classes)

    def __call__(self, x):
        x, _ = self.pair(self.layer(self.layer(x)))
        return self.last(x.mean((1, 2)))


class Pair(nn.Module):
    def __call__(self, x):
        return x, x


@pytest.mark.parametrize(
    ("module", "at", "message"),
    [
        (Net(), ("layer9",), r"calls no submodule 'layer9': it has .*layer1 \[8, 8, 5\]"),
        (Net(), ("layer1", "layer2"), "calls no submodule 'layer2'.*encoder/layer2"),
        (Net(), ("layer1", "layer1"), "one or more different submodules"),
        (Net(), (), "one or more different submodules"),
        (Twice(), ("layer",), "submodule 'layer' is called twice"),
        (Twice(), ("pair",), r"'pair' must return an array \[.*got tuple"),
        (Transformed(scanned=True), ("loop/layer",), "runs inside a lifted loop such as nn.scan"),
        (Transformed(scanned=True), ("loop",), "'loop' must return an array"),
        (create_model("vgg7", num_classes=3, width=2), ("block1",), "exits of its own"),
        (nn.Dense, ("a",), "flax.linen module"),
    ],
)
def test_mistakes(module, at, message):
    with pytest.raises(UserError, match=message):
        init_variables(add_exits(module, at), jax.random.key(1), EXAMPLE.shape)


def test_heads_of_ones_own():
    model = add_exits(Net(), "layer1", head=lambda classes: nn.Dense(classes + 1), num_classes=3)
    with pytest.raises(UserError, match=r"head 1 must return logits \[1, 3\], got \[1, 8, 8, 4\]"):
        init_variables(model, jax.random.key(1), EXAMPLE.shape)
    assert LinearHead(3).num_classes == 3


def own_config(**changes):
    own = {"model.name": "tests.models.test_added_exits:Net", "model.exits_at": ("layer1",)}
    return tiny_config(**{**own, "model.width": None, **changes})


def test_a_run_names_the_module_and_where_its_exits_are():
    experiment = build_experiment(own_config())
    assert experiment.model.num_exits == 2
    assert sorted(initial_state(experiment).params) == ["backbone", "head1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.exits_at": None}, "has no exits: name submodules to add them at"),
        ({"model.exits_at": ("layer7",)}, "calls no submodule 'layer7'"),
        ({"loss.name": "byot"}, "choose another, such as distillation"),
        ({"remat": True}, "no blocks to recompute"),
        ({"gradients.name": "meta_gf"}, "needs a model that runs in blocks"),
    ],
)
def test_a_run_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        build_experiment(own_config(**changes))


@pytest.mark.parametrize("whole", [False, True])
def test_the_weights_of_the_network_alone_are_its_trunk(tmp_path, whole):
    """Those of a run with added exits too, whose heads stay behind."""
    model, variables = network()
    alone = {name: tree["backbone"] for name, tree in variables.items()}
    save_weights(tmp_path / "net.safetensors", variables if whole else alone)
    fresh = init_variables(model, jax.random.key(9), EXAMPLE.shape)
    loaded = load_trunk(tmp_path / "net.safetensors", model, fresh)
    for name, expected in alone.items():
        jax.tree.map(np.testing.assert_array_equal, loaded[name]["backbone"], expected)
    jax.tree.map(np.testing.assert_array_equal, loaded["params"]["head1"], fresh["params"]["head1"])


def test_methods_by_exit_train_it():
    config = own_config()
    common.set_method(config, "dfs+pcgrad")
    assert build_experiment(config).rule.takes_exit_gradients
