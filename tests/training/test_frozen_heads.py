"""New heads on a frozen trunk: what is trained, what is not, and that heads do not mix."""

import jax
import numpy as np
import pytest

from dfs_jax.models.contract import init_variables, split_trunk_and_heads
from dfs_jax.training.experiment import build_experiment
from dfs_jax.training.frozen_heads import train_heads
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config


def experiment_of(**changes):
    return build_experiment(tiny_config(**changes))


def variables_of(experiment, seed=1):
    return init_variables(experiment.model, jax.random.key(seed), experiment.dataset.image_shape)


def cross_entropies(experiment, variables):
    images, labels = experiment.dataset.train.images, experiment.dataset.train.labels
    pixels = (images / 255.0 - experiment.dataset.mean) / experiment.dataset.std
    logits = experiment.model.apply(variables, pixels.astype(np.float32), experiment.fork).logits
    logs = jax.nn.log_softmax(logits)
    return -np.asarray(logs)[:, np.arange(len(labels)), labels].mean(axis=1)


def test_heads_are_trained_and_the_trunk_is_untouched():
    """ResNet's heads have statistics of their own, which training updates."""
    experiment = experiment_of(**{"model.name": "resnet18", "model.stage_sizes": (1, 1)})
    before = variables_of(experiment)
    after = train_heads(experiment, before, epochs=1)
    for name in ("params", "batch_stats"):
        trunk, heads = split_trunk_and_heads(before[name])
        new_trunk, new_heads = split_trunk_and_heads(after[name])
        jax.tree.map(np.testing.assert_array_equal, trunk, new_trunk)
        assert jax.tree.structure(heads) == jax.tree.structure(new_heads)
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), heads, new_heads)
        assert all(jax.tree.leaves(changed["head1"]))


@pytest.mark.slow
def test_every_exit_learns():
    experiment = experiment_of()
    trunk = variables_of(experiment)
    short, long = (train_heads(experiment, trunk, epochs=epochs) for epochs in (1, 8))
    assert (cross_entropies(experiment, long) < cross_entropies(experiment, short)).all()
    assert (cross_entropies(experiment, long) < np.log(3)).all()


def test_the_heads_that_a_run_had_do_not_matter():
    experiment = experiment_of()
    variables = variables_of(experiment)
    other = variables_of(experiment, seed=2)
    _, heads = split_trunk_and_heads(other["params"])
    mixed = {**variables, "params": {**variables["params"], **heads}}
    found = [train_heads(experiment, v, epochs=1) for v in (variables, mixed)]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_mistakes():
    experiment = experiment_of()
    with pytest.raises(UserError, match="at least 1 epoch, got 0"):
        train_heads(experiment, variables_of(experiment), epochs=0)
