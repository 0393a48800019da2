"""From a config to the parts of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from dfs_jax.combiners import Combiner
from dfs_jax.data import Dataset
from dfs_jax.data.augmentation import Augmentation
from dfs_jax.data.pipeline import TrainSampler
from dfs_jax.forks import Fork, create_fork
from dfs_jax.interop import load_trunk
from dfs_jax.losses import Loss, create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import ConvolutionalModel, MultiExitModel, init_variables
from dfs_jax.training.combiner_config import check_combiner, combiner_from_config
from dfs_jax.training.config import options
from dfs_jax.training.input_config import augmentation_from_config, dataset_from_config
from dfs_jax.training.optimizer import create_optimizer, create_schedule
from dfs_jax.training.sharding import check_batch_size, create_mesh, replicated
from dfs_jax.training.state import TrainState, create_state
from dfs_jax.training.step import TrainStep, make_eval_step, make_train_step
from dfs_jax.types import Config, UserError

# One key a purpose, so that changing what one of them draws leaves the others alone.
_INIT, _TRAIN = 0, 1


class Experiment(NamedTuple):
    """Everything a config describes, built; nothing here changes while the run goes on."""

    config: Config
    mesh: Mesh
    dataset: Dataset
    sampler: TrainSampler
    model: MultiExitModel
    fork: Fork
    loss: Loss
    combiner: Combiner
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    augment: Augmentation

    @property
    def total_steps(self) -> int:
        """Training steps in the whole run."""
        return self.config.epochs * self.sampler.steps_per_epoch

    @property
    def score_split(self) -> str:
        """The split on which choices are made: validation, or train where nothing is held out."""
        return "train" if self.dataset.validation is None else "validation"


def build_experiment(config: Config, dataset: Dataset | None = None) -> Experiment:
    """Builds every part that `config` names; what can fail without the data set fails first.

    Args:
      config: of a run.
      dataset: to use instead of the one that the config names.

    Raises:
      UserError: an unknown name, an option that its component lacks, a value out of range, a
        missing data set, a batch that the devices cannot divide or that the data cannot fill.
    """
    mesh = create_mesh()
    check_batch_size(config.batch_size, mesh)
    fork = create_fork(config.fork.name, **options(config.fork))
    loss = create_loss(config.loss.name, **options(config.loss))
    combiner = combiner_from_config(config.combiner)
    # Options are checked before the data, which takes its time, is read.
    augmentation_from_config(config.data, mean=(0.0, 0.0, 0.0))
    model_from_config(config.model, loss, num_classes=2)
    dataset = dataset or dataset_from_config(config.data)
    augment = augmentation_from_config(config.data, dataset.mean)
    model = model_from_config(config.model, loss, num_classes=dataset.num_classes)
    model = model_for_mesh(model, mesh)
    _check_shapes(model, fork, loss, dataset)
    check_combiner(combiner, model, dataset.image_shape)
    sampler = TrainSampler(dataset.train.num_examples, config.batch_size, config.seed)
    schedule = create_schedule(
        config.schedule, config.optimizer.learning_rate, config.epochs, sampler.steps_per_epoch
    )
    optimizer = create_optimizer(config.optimizer, schedule)
    return Experiment(
        config, mesh, dataset, sampler, model, fork, loss, combiner, schedule, optimizer, augment
    )


def initial_state(experiment: Experiment) -> TrainState:
    """Returns the state before the first step, on the devices; `init_from` fills its trunk."""
    config, model = experiment.config, experiment.model
    variables = init_variables(model, _key(config.seed, _INIT), experiment.dataset.image_shape)
    if config.init_from is not None:
        variables = load_trunk(Path(config.init_from), model, variables)
    return jax.device_put(_as_state(experiment, variables), replicated(experiment.mesh))


def abstract_state(experiment: Experiment) -> Any:
    """Returns the state's shapes, types and shardings, without computing anything."""

    def build() -> TrainState:
        key, shape = jax.random.key(0), experiment.dataset.image_shape
        return _as_state(experiment, init_variables(experiment.model, key, shape))

    sharding = replicated(experiment.mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(build),
    )


def training_step(experiment: Experiment) -> TrainStep:
    """Returns the compiled training step of an experiment."""
    e = experiment
    return make_train_step(
        e.model,
        e.fork,
        e.loss,
        e.optimizer,
        e.augment,
        mean=e.dataset.mean,
        std=e.dataset.std,
        mesh=e.mesh,
        ema_decay=e.config.optimizer.ema_decay,
        combiner=e.combiner,
        exits=e.config.combiner.exits,
    )


def evaluation_step(experiment: Experiment):
    """Returns the compiled evaluation step of an experiment."""
    e = experiment
    return make_eval_step(e.model, e.fork, mean=e.dataset.mean, std=e.dataset.std, mesh=e.mesh)


def model_from_config(section: Config, loss: Loss, *, num_classes: int) -> MultiExitModel:
    """Returns the model of a section `model`, with the adaptation layers that the loss asks for."""
    # Left unset where not needed: a user's model may not have adaptation layers.
    adapt = True if getattr(loss, "adapts_features", False) else None
    return create_model(
        section.name, num_classes=num_classes, adapt_features=adapt, **options(section)
    )


def model_for_mesh(model: MultiExitModel, mesh: Mesh) -> MultiExitModel:
    """Returns the model as it runs on these devices: the CPU's kernels are for one of them.

    They go through a batch chunk by chunk, for which several devices would gather all of it.
    """
    alone = mesh.size == 1 or not isinstance(model, ConvolutionalModel)
    return model if alone else model.clone(cpu_kernels=False)


def _check_shapes(model: MultiExitModel, fork: Fork, loss: Loss, dataset: Dataset) -> None:
    """Traces one small pass, so that options that do not fit the model are named at once."""

    def trace(key: jax.Array):
        images = jax.numpy.zeros((2, *dataset.image_shape))
        outputs, _ = model.init_with_output({"params": key}, images, fork)
        return loss(outputs, jax.numpy.zeros(2, int))

    try:
        jax.eval_shape(trace, jax.random.key(0))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _as_state(experiment: Experiment, variables: dict[str, Any]) -> TrainState:
    return create_state(
        variables,
        experiment.optimizer,
        _key(experiment.config.seed, _TRAIN),
        num_exits=experiment.model.num_exits,
        keep_average=experiment.config.optimizer.ema_decay is not None,
        combiner=experiment.combiner,
    )


def _key(seed: int, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), purpose)
