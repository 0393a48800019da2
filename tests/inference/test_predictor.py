"""The predictor against the simulated policy, example by example, and what it does on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.inference import compiled
from dfs_jax.inference.device_buffer import DeviceBuffer
from dfs_jax.inference.policy import Policy, last_exit_only
from dfs_jax.inference.predictor import EarlyExitPredictor
from dfs_jax.inference.stages import model_stages
from dfs_jax.inference.timing import StageTimes
from dfs_jax.models.contract import init_variables
from dfs_jax.surgery import FeatureSurgery
from dfs_jax.types import UserError
from tests.support.helpers import TinyNetwork
from tests.support.stage_examples import (
    CLASSES,
    EXAMPLE,
    EXITS,
    STAGES,
    images,
    make_predictor,
    simulated,
)

POLICIES = {
    "max_softmax": Policy((0.83, 0.79)),
    "entropy": Policy((0.61, 0.52), "entropy"),
    "margin": Policy((0.71, 0.63), "margin", (1.5, 0.7, 2.0)),
    "patience": Policy((1.5, 1.5), "patience"),
    "nobody at the second": Policy((0.8, None)),
    "nobody": last_exit_only(EXITS),
    "all at the first": Policy((-1e8, None)),
}


def assert_equals_simulation(policy, batch, got):
    taken, predicted, probabilities, confidence = simulated(policy, batch)
    np.testing.assert_array_equal(got.exit_index, taken)
    np.testing.assert_array_equal(got.predicted, predicted)
    np.testing.assert_allclose(got.probabilities, probabilities, atol=1e-6)
    np.testing.assert_allclose(got.confidence, confidence, atol=1e-6)
    assert got.errors == {}


@pytest.fixture(scope="module", params=POLICIES)
def policy_and_predictor(request):
    policy = POLICIES[request.param]
    return policy, make_predictor(policy)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 11, 50])
def test_equals_the_simulated_policy(policy_and_predictor, n):
    policy, predictor = policy_and_predictor
    batch = images(n, seed=n)
    before = list(predictor.counts.exits)
    got = predictor(batch)
    assert_equals_simulation(policy, batch, got)
    assert (got.latency > 0).all()
    counted = np.bincount(got.exit_index, minlength=EXITS)
    np.testing.assert_array_equal(np.subtract(predictor.counts.exits, before), counted)
    assert predictor.counts.whole == 0


def test_the_policies_differ_and_use_every_exit():
    exits = {name: tuple(simulated(p, images(50, 50))[0]) for name, p in POLICIES.items()}
    assert len(set(exits.values())) == len(POLICIES)
    assert set(exits["max_softmax"]) == set(exits["entropy"]) == set(range(EXITS))


def test_another_policy_takes_the_same_programs():
    first = make_predictor(POLICIES["max_softmax"])
    first(images(5))
    other = Policy((0.6, 0.9), "max_softmax", (2.0, 0.5, 1.0))
    predictor = first.with_policy(other)
    assert_equals_simulation(other, images(50, 50), predictor(images(50, 50)))
    assert_equals_simulation(first.policy, images(50, 50), first(images(50, 50)))
    assert (sum(first.counts.exits), sum(predictor.counts.exits)) == (55, 50)
    assert predictor.times is first.times
    with pytest.raises(UserError, match="compiled for the measure 'max_softmax', not 'margin'"):
        first.with_policy(POLICIES["margin"])
    with pytest.raises(UserError, match="for 2 exits, the network has 3"):
        first.with_policy(Policy((0.5,)))


def test_compaction_on_the_device_is_the_same(monkeypatch):
    made = []

    def make(*arguments):
        made.append(DeviceBuffer(*arguments))
        return made[-1]

    monkeypatch.setattr(compiled, "HostBuffer", make)
    policy, batch = POLICIES["margin"], images(50, 50)
    assert_equals_simulation(policy, batch, make_predictor(policy)(batch))
    assert made


REFERENCINGS = ("symmetric", "none")


@pytest.mark.parametrize("referencing", REFERENCINGS)
def test_a_model_equals_its_whole_network(referencing):
    model = TinyNetwork(num_classes=CLASSES)
    variables = init_variables(model, jax.random.key(0), (8, 8, 3))
    fork = FeatureSurgery(0.5, referencing)
    batch = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3)).astype(np.uint8)
    whole = model.apply(variables, jnp.asarray(batch) / 127.5 - 1, fork).logits
    confidence = jax.nn.softmax(whole[0]).max(-1)
    threshold = float(np.sort(confidence)[5:7].mean())
    predictor = EarlyExitPredictor.from_model(
        model,
        variables,
        fork,
        jax.ShapeDtypeStruct((8, 8, 3), np.uint8),
        Policy((threshold,)),
        prepare=lambda x: x / 127.5 - 1,
        batch_size=11,
        shapes=(1, 11),
        fall_back=False,
    )
    got = predictor(batch)
    np.testing.assert_array_equal(got.exit_index, confidence < threshold)
    expected = jax.nn.softmax(whole)[got.exit_index, np.arange(11)]
    np.testing.assert_allclose(got.probabilities, expected, atol=1e-6)
    # The fork counts: without it the second exit says something else where it cuts channels.
    plain = model.apply(variables, jnp.asarray(batch) / 127.5 - 1).logits
    assert np.allclose(plain, whole, atol=1e-6) == (referencing == "symmetric")


def times_of(whole):
    return {batch: StageTimes(batch, (1.0, 1.0, 1.0), whole) for batch in (1, 7)}


FAST, SLOW = 1.5, 3.0  # of the whole network, where each stage takes 1
HALF_LEAVES = {
    # policy, seconds of the whole network, does it run
    "expected": (Policy((0.83, 0.79), exit_shares=(0.2, 0.3, 0.5)), FAST, True),
    "expected, slow": (Policy((0.83, 0.79), exit_shares=(0.2, 0.3, 0.5)), SLOW, False),
    "no early exit": (last_exit_only(EXITS), FAST, True),
    "not known yet": (Policy((0.83, 0.79)), FAST, False),
    "not allowed": (Policy((0.8, 0.7), exit_shares=(0, 0, 1), falls_back=False), FAST, False),
}


@pytest.mark.parametrize("case", HALF_LEAVES)
@pytest.mark.parametrize("n", [1, 11])
def test_falls_back_where_the_whole_network_is_faster(case, n):
    policy, whole, runs_whole = HALF_LEAVES[case]
    predictor = make_predictor(policy, fall_back=True)
    predictor.warm_up()
    predictor.times = times_of(whole)
    batch = images(n, seed=n)
    got = predictor(batch)
    if runs_whole:
        assert predictor.counts.whole == n
        assert_equals_simulation(last_exit_only(EXITS), batch, got)
    else:
        assert predictor.counts.whole == 0
        assert_equals_simulation(policy, batch, got)


def test_what_exits_are_taken_in_the_end_decides():
    """Expected to leave early, they do not: after 1,024 examples the whole network runs."""
    policy = Policy((0.9999, 0.9999), exit_shares=(1.0, 0.0, 0.0))
    predictor = make_predictor(policy, fall_back=True)
    predictor.warm_up()
    predictor.times = times_of(FAST)
    predictor(images(1020))
    assert predictor.counts.whole == 0
    predictor(images(20))
    assert predictor.counts.whole == 20 - 7  # by batches of 7: the first one made it 1,027


def test_close_decisions_are_counted():
    confidence = make_predictor(last_exit_only(EXITS))(images(11)).confidence
    assert len(set(confidence.tolist())) == 11
    first = make_predictor(Policy((-1e8, None)))(images(11)).confidence
    predictor = make_predictor(Policy((float(first[4]) + 5e-7, None)))
    predictor(images(11))
    predictor(images(11)[4:5])
    assert predictor.counts.close == 2


def test_poison_is_reported_by_its_place_and_the_others_are_answered():
    batch = list(images(11))
    batch[2] = np.full_like(batch[2], np.nan)
    batch[5] = np.zeros((2, 2, 3), np.float32)
    batch[7] = np.zeros((2, 1, 3), np.uint8)
    batch[8] = "cat"
    good = [0, 1, 3, 4, 6, 9, 10]
    policy = POLICIES["max_softmax"]
    predictor = make_predictor(policy)
    got = predictor(batch)
    assert got.errors == {
        2: "a pixel is not a finite number",
        5: "its shape is [2, 2, 3], not [2, 1, 3]",
        7: "its type is uint8, not float32",
        8: "its shape is [], not [2, 1, 3]",
    }
    expected = predictor(images(11)[good])
    for field in ("predicted", "probabilities", "exit_index", "confidence"):
        np.testing.assert_allclose(getattr(got, field)[good], getattr(expected, field), atol=1e-6)
    for place in got.errors:
        assert got.predicted[place] == got.exit_index[place] == -1
        assert np.isnan(got.probabilities[place]).all()
        assert np.isnan([got.confidence[place], got.latency[place]]).all()
    assert predictor(np.zeros((0, 2, 1, 3), np.float32)).predicted.shape == (0,)
    assert list(predictor([batch[2]]).errors) == [0]
    assert list(predictor(np.full((3, 2, 1, 3), np.inf, np.float32)).errors) == [0, 1, 2]


def test_an_answer_that_is_no_number_is_an_error():
    def broken(carry):
        return carry, jnp.where(carry[:, 0, 0, :1] > 0, jnp.nan, carry[:, 0, 0])

    predictor = EarlyExitPredictor([broken], EXAMPLE, batch_size=3, fall_back=False)
    batch = images(11)
    bad = np.flatnonzero(batch[:, 0, 0, 0] > 0)
    assert 0 < len(bad) < 11
    got = predictor(batch)
    assert sorted(got.errors) == bad.tolist()
    assert set(got.errors.values()) == {"the network's answer is not a finite number"}
    assert predictor(batch[bad[:1]]).errors.keys() == {0}


def test_float64_images_are_taken_as_float32():
    predictor = make_predictor(POLICIES["max_softmax"])
    batch = images(11)
    np.testing.assert_array_equal(
        predictor(batch.astype(np.float64)).probabilities, predictor(batch).probabilities
    )


def test_warming_up_measures_and_compiles_everything():
    predictor = make_predictor(POLICIES["margin"])
    times = predictor.warm_up()
    assert sorted(times) == [1, 7]
    assert all(t > 0 for time in times.values() for t in (*time.stages, time.whole))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    for n in (1, 2, 5, 7, 20):
        predictor(images(n))
        list(predictor.stream([images(n)]))
    assert not compiled
    EarlyExitPredictor(STAGES, EXAMPLE, batch_size=1).warm_up()
    assert compiled
    assert predictor.warm_up() is times


MISTAKES = {
    "for 2 exits, the network has 3": {"policy": Policy((0.5,))},
    "for 1 exits, the network has 3": {"policy": Policy(())},
    "batch_size must be a whole number of at least 1, got 0": {"batch_size": 0},
    r"shapes must ascend from 1 to batch_size 7, got \[1, 3\]": {"shapes": (1, 3)},
    r"from 1 to batch_size 7, got \[3, 7\]": {"shapes": (3, 7)},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message):
    with pytest.raises(UserError, match=message):
        EarlyExitPredictor(STAGES, EXAMPLE, **{"batch_size": 7, **MISTAKES[message]})


def test_the_default_shapes():
    make = lambda n: EarlyExitPredictor(STAGES, EXAMPLE, batch_size=n).shapes  # noqa: E731
    assert make(256) == (1, 4, 16, 32, 64, 128, 256)
    assert make(100) == (1, 4, 16, 32, 64, 100)
    assert make(1) == (1,)


def test_stages_of_a_model_hold_their_own_variables_alone():
    model = TinyNetwork(num_classes=CLASSES)
    variables = init_variables(model, jax.random.key(0), (8, 8, 3))
    example = jax.ShapeDtypeStruct((8, 8, 3), np.float32)
    stages = model_stages(model, variables, FeatureSurgery(0.5), example)
    names = [{name.split("/")[1] for name in stage.args[0]} for stage in stages]
    assert names == [{"block1", "head1"}, {"block2", "head2"}]


@pytest.mark.parametrize("buffer", ["HostBuffer", "DeviceBuffer"])
def test_nothing_is_compiled_once_it_is_warm(buffer, monkeypatch):
    """Weights as a run restores them lie on a mesh; what the host puts together never does."""
    if buffer == "DeviceBuffer":
        monkeypatch.setattr(compiled, "HostBuffer", DeviceBuffer)
    traced = []

    def stage(weights, carry):
        traced.append(jnp.shape(carry))
        x = jnp.tanh(jnp.reshape(carry, (len(carry), 6)) @ weights)
        return x, 3 * x[:, :CLASSES]

    mesh = jax.make_mesh((1,), ("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    draw = np.random.default_rng(3)
    weights = [draw.standard_normal((6, 6)).astype(np.float32) for _ in range(EXITS)]
    stages = [jax.tree_util.Partial(stage, jax.device_put(w, whole)) for w in weights]
    predictor = EarlyExitPredictor(
        stages, EXAMPLE, Policy((0.6, 0.6)), batch_size=7, shapes=(1, 3, 7), fall_back=False
    )
    predictor.warm_up()
    traced.clear()
    predictor(images(50))
    for n in (1, 3, 20):
        predictor(images(n, seed=n))
    assert min(predictor.counts.exits) > 0
    assert traced == []
