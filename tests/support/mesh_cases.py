"""Cases for eight forced devices: `python -m tests.support.mesh_cases NAME...`.

Every case holds a mesh against one device. Names are those of `CASES` and `CHECKS`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import tempfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from dfs_jax.interop import save_weights
from dfs_jax.models.vgg import VGG
from dfs_jax.training import state_sharding
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.conflict import ConflictProbe
from dfs_jax.training.evaluate import ResidentSplit, evaluate
from dfs_jax.training.experiment import (
    abstract_state,
    build_experiment,
    evaluation_step,
    initial_state,
    training_step,
)
from dfs_jax.training.feed import DeviceFeed, HostFeed
from dfs_jax.training.sharding import AXES, create_mesh, put_batch
from tests.support.helpers import tiny_config

DEVICES = 8
BATCH = 16
# A step an epoch, and enough of them that the learning rate is not 0 before the last one.
TRAINING = {"epochs": 10, "optimizer.learning_rate": 0.01}
# Relative and absolute difference that is allowed after so many steps.
EXACT = {"float64": (1e-9, 5), "float32": (1e-5, 1)}
SMALL_VGG = functools.partial(VGG, stage_sizes=(1, 1), stage_multipliers=(1, 2))
# The first two compile quickly enough for every day.
MODELS = {
    "small_vgg": {"width": 4},
    "small_vit": {"width": 16, "heads": 2, "patch_size": 4, "depth": 2, "first_exit_layer": 1},
    "vgg7": {"width": 4},
    "resnet18": {"width": 4},
    "msdnet": {
        "width": None,
        "num_exits": 3,
        "base": 1,
        "step": 1,
        "step_mode": "even",
        "initial_channels": 4,
        "growth": 4,
        "scale_factors": (1, 2),
        "bottleneck_factors": (1, 2),
        "head_channels": 4,
    },
    "vit_tiny": {
        "width": 16,
        "heads": 2,
        "patch_size": 4,
        "depth": 3,
        "first_exit_layer": 1,
        "dropout": 0.2,
    },
}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 2, "fsdp": 4},
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
NAMES = {"small_vgg": "tests.support.mesh_cases:SMALL_VGG", "small_vit": "vit_tiny"}
VITS = ("small_vit", "vit_tiny")
METHODS = {
    "byot": {"loss.name": "byot", "optimizer.ema_decay": 0.9},
    "pcgrad": {"gradients.name": "pcgrad", "gradients.exits": "vmap"},
    "remembering": {"gradients.name": "tests.support.helpers:Remembering"},
    "meta_gf": {"gradients.name": "meta_gf", "gradients.exits": "vmap"},
    "channels": {"gradients.name": "meta_gf", "gradients.granularity": "channel"},
    "rounds": {"gradients.name": "meta_gf", "gradients.window": 1, "epochs": 12},
    "wpn": {"gradients.name": "wpn", "gradients.learning_rate": 0.01},
    "exchanged": {"gradients.name": "wpn", "gradients.interval": 2, "gradients.exchange": True},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A training run on a mesh that has to equal the same run on one device."""

    model: str
    method: str
    mesh: str
    dtype: str = "float64"
    changes: tuple[tuple[str, object], ...] = ()

    @property
    def config(self):
        options = {f"model.{name}": value for name, value in MODELS[self.model].items()}
        switches = {} if self.model in VITS else {"model.cpu_kernels": False}
        return tiny_config(
            **{
                "model.name": NAMES.get(self.model, self.model),
                "batch_size": BATCH,
                **TRAINING,
                **options,
                **switches,
                **METHODS[self.method],
                **dict(self.changes),
            },
        )


def _matrix() -> dict[str, Case]:
    rows = itertools.product(MODELS, ("byot", "pcgrad"), MESHES, EXACT)
    return {"-".join(row): Case(*row) for row in rows if row[0] in VITS or row[2] != "tensor"}


ACCUMULATED = (("accumulate_steps", 2), ("remat", True))
GROUPED = (("batch_norm_groups", 2),)
CASES = {
    **_matrix(),
    "accumulated": Case("vgg7", "byot", "fsdp", changes=ACCUMULATED),
    "accumulated-pcgrad": Case("vit_tiny", "pcgrad", "tensor", changes=ACCUMULATED),
    "grouped": Case("vgg7", "byot", "fsdp", changes=GROUPED),
    "grouped-accumulated": Case("vgg7", "byot", "data", changes=(*GROUPED, *ACCUMULATED)),
    "combiner-state": Case("small_vgg", "remembering", "fsdp"),
    "meta_gf-data": Case("small_vgg", "meta_gf", "data"),
    "meta_gf-fsdp": Case("resnet18", "meta_gf", "fsdp"),
    "meta_gf-accumulated": Case("small_vit", "meta_gf", "tensor", changes=ACCUMULATED),
    "meta_gf-channels": Case("small_vit", "channels", "tensor"),
    "meta_gf-rounds": Case("small_vgg", "rounds", "fsdp"),
    "wpn-data": Case("small_vgg", "wpn", "data", changes=(("batch_norm_groups", 2),)),
    "wpn-fsdp": Case("resnet18", "wpn", "fsdp"),
    "wpn-exchanged": Case("small_vit", "exchanged", "tensor"),
}


def one_device() -> Mesh:
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((1, 1, 1), AXES, axis_types, devices=jax.devices()[:1])


def widened(state, dtype):
    """Returns the state with all numbers of that precision, each where it was."""

    def wide(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.device_put(leaf.astype(dtype), leaf.sharding)
        return leaf

    state = jax.tree.map(wide, state)
    # In float64 sums of booleans are int64.
    correct = state.totals.correct.astype(jnp.sum(jnp.zeros(1, bool)).dtype)
    return state.replace(totals=state.totals.replace(correct=correct))


def batches(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        labels = rng.integers(0, 3, BATCH).astype(np.int32)
        noise = rng.integers(0, 64, (BATCH, 8, 8, 3))
        yield (noise + 90 * labels[:, None, None, None]).astype(np.uint8), labels


def trained(experiment, start, dtype, steps):
    """Returns the state after some steps, from `start`, which may lie anywhere."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(experiment))
    state = widened(jax.device_put(jax.device_get(start), placed), dtype)
    step = training_step(experiment)
    for batch in batches(steps):
        state = step(state, *put_batch(batch, experiment.mesh))
    assert step._cache_size() == 1
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == placed
    return state


def run_case(case: Case) -> None:
    tolerance, steps = EXACT[case.dtype]
    with jax.enable_x64(case.dtype == "float64"):
        config = case.config
        config.mesh.update(MESHES[case.mesh])
        experiment = build_experiment(config)
        alone = build_experiment(case.config, mesh=one_device())
        start = initial_state(alone)
        many = trained(experiment, start, case.dtype, steps)
        check_placement(many, experiment)
        one = trained(alone, start, case.dtype, steps)
        chex.assert_trees_all_close(
            jax.device_get(many), jax.device_get(one), rtol=tolerance, atol=tolerance
        )
        moved = jax.tree.map(lambda a, b: np.any(a != np.asarray(b)), one.params, start.params)
        assert np.mean(jax.tree.leaves(moved)) > 0.7  # what does not move is equal anyhow


def check_placement(state, experiment) -> None:
    """Optimizer, average and combiner hold arrays as parameters are held; large ones are split."""
    parts = experiment.mesh.shape["fsdp"]
    for leaf in jax.tree.leaves(state):
        shard = leaf.addressable_shards[0].data
        if leaf.size >= state_sharding.LEAST_SPLIT and any(n % parts == 0 for n in leaf.shape):
            assert shard.size <= leaf.size // parts, (leaf.shape, leaf.sharding)
    of_params = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    (momentum,) = [x for x in jax.tree.leaves(state.opt_state, is_leaf=_is_params) if _is_params(x)]
    assert jax.tree.map(lambda leaf: leaf.sharding, momentum) == of_params
    if state.averaged is not None:
        averaged = state.averaged["params"]
        assert jax.tree.map(lambda leaf: leaf.sharding, averaged) == of_params
    if isinstance(state.rule_state, dict):
        last = jax.tree.map(lambda leaf: leaf.sharding, state.rule_state["last"])
        assert last == {name: of_params[name] for name in last}


def _is_params(tree) -> bool:
    return isinstance(tree, dict) and "block1" in tree


def check_checkpoints() -> None:
    """A state that was saved on one mesh comes back on others, to the bit and where it belongs."""
    case = Case("small_vgg", "byot", "fsdp")
    saved_on = build_experiment(on(case.config, "fsdp"))
    state = initial_state(saved_on)
    with tempfile.TemporaryDirectory() as directory:
        Checkpoints(Path(directory)).save(state, 1, 0.0)
        for experiment in (
            build_experiment(on(case.config, "data")),
            build_experiment(case.config, mesh=one_device()),
            saved_on,
        ):
            target = abstract_state(experiment)
            restored, _ = Checkpoints(Path(directory), read_only=True).restore("latest", target)
            chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))
            jax.tree.map(
                lambda leaf, want: chex.assert_equal(leaf.sharding, want.sharding), restored, target
            )


def check_evaluation() -> None:
    """Eleven examples in batches of seven, which eight devices take eight at a time."""
    config = Case("small_vgg", "pcgrad", "fsdp").config
    found = []
    for experiment in on_both(config):
        variables = initial_state(experiment).eval_variables
        split = experiment.dataset.validation
        step = evaluation_step(experiment)
        found.append(evaluate(step, variables, split, batch_size=7, mesh=experiment.mesh))
    one, many = found
    assert one.num_examples == 11
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def check_conflict() -> None:
    """The exits' conflict is measured on a mesh as on one device."""
    config = Case("small_vgg", "pcgrad", "fsdp").config
    grams = []
    for experiment in on_both(config):
        state = initial_state(experiment)
        grams.append(ConflictProbe(experiment, 8)(state.params, state.batch_stats))
    np.testing.assert_allclose(*grams, rtol=2e-3, atol=1e-5)


def check_dispatch() -> None:
    """Three steps at once, of images on the devices, are three steps of batches that are sent."""
    config = on(Case("small_vgg", "byot", "fsdp").config, "fsdp")
    experiment = build_experiment(config)
    states = []
    for feed, sizes in (
        (HostFeed(experiment, 0, is_stacked=False), (1, 1, 1)),
        (HostFeed(experiment, 0, is_stacked=True), (3,)),
        (DeviceFeed(experiment, 0), (3,)),
    ):
        state, step = initial_state(experiment), training_step(experiment, feed.takes)
        for steps in sizes:
            state = step(state, *feed.next(steps))
        check_placement(state, experiment)
        states.append(jax.device_get(state))
    single, *others = states
    for other in others:
        chex.assert_trees_all_close(other, single, rtol=1e-5, atol=1e-6)
    split = experiment.dataset.validation
    variables = initial_state(experiment).eval_variables
    resident = ResidentSplit(experiment, split).start(variables)()
    step = evaluation_step(experiment)
    expected = evaluate(step, variables, split, batch_size=7, mesh=experiment.mesh)
    assert resident.num_examples == 11
    for found, wanted in zip(resident, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def check_initial_state() -> None:
    """Split over devices as it is made, the state holds the numbers that it holds on one."""
    config = Case("vit_tiny", "byot", "tensor").config
    experiment = build_experiment(on(config, "tensor"))
    many, one = (
        initial_state(experiment),
        initial_state(build_experiment(config, mesh=one_device())),
    )
    chex.assert_trees_all_close(jax.device_get(many), jax.device_get(one), rtol=1e-6, atol=1e-7)
    check_placement(many, experiment)
    layer = many.params["block1"]["layer1"]
    specs = {
        "/".join(path): str(tuple(value.sharding.spec))
        for path, value in (
            (("qkv",), layer["attention"]["qkv"]["kernel"]),
            (("output",), layer["attention"]["output"]["kernel"]),
            (("mlp1",), layer["mlp1"]["kernel"]),
            (("mlp1", "bias"), layer["mlp1"]["bias"]),
            (("mlp2",), layer["mlp2"]["kernel"]),
        )
    }
    assert specs == {
        "qkv": "('tensor', 'fsdp')",
        "output": "('tensor', 'fsdp')",
        "mlp1": "('fsdp', 'tensor')",
        "mlp1/bias": "('tensor',)",
        "mlp2": "('tensor', 'fsdp')",
    }, specs


def check_initial_trunk() -> None:
    """A trunk that is read from a file is split as one that is made."""
    config = Case("small_vgg", "byot", "fsdp").config
    other = initial_state(build_experiment(config, mesh=one_device()))
    config.seed = 5
    with tempfile.TemporaryDirectory() as directory:
        config.init_from = f"{directory}/weights.npz"
        save_weights(config.init_from, other.eval_variables)
        one, many = (initial_state(experiment) for experiment in on_both(config))
    check_placement(many, build_experiment(on(config, "fsdp")))
    chex.assert_trees_all_equal(one.params["block1"], other.params["block1"])
    many, one = jax.device_get((many, one))
    chex.assert_trees_all_close(many, one, rtol=1e-6, atol=1e-7)


def on_both(config):
    """Returns the experiment on one device and the one on the mesh with parameters split."""
    return build_experiment(config, mesh=one_device()), build_experiment(on(config, "fsdp"))


def on(config, mesh):
    """Returns a copy of the config for one of `MESHES`."""
    config = config.copy_and_resolve_references()
    config.mesh.update(MESHES[mesh])
    return config


CHECKS = {
    "checkpoints": check_checkpoints,
    "conflict": check_conflict,
    "dispatch": check_dispatch,
    "evaluation": check_evaluation,
    "initial-state": check_initial_state,
    "initial-trunk": check_initial_trunk,
}


def main(names: list[str]) -> None:
    assert len(jax.devices()) == DEVICES
    state_sharding.LEAST_SPLIT = 64  # of narrow networks too something is split
    assert create_mesh().shape == {"data": DEVICES, "fsdp": 1, "tensor": 1}
    for name in names:
        if name in CHECKS:
            CHECKS[name]()
        else:
            run_case(CASES[name])
        sys.stdout.write(f"ok {name}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
