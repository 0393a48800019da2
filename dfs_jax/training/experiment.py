"""Builds the parts of a run from its config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from absl import logging
from jax.sharding import Mesh

from dfs_jax.data import Dataset
from dfs_jax.data.augmentation import Augmentation
from dfs_jax.data.pipeline import TrainSampler
from dfs_jax.forks import Fork, create_fork
from dfs_jax.gradients import GradientRule, Setup
from dfs_jax.interop import load_trunk
from dfs_jax.interop.files import STEP, weights_notes
from dfs_jax.interop.pretrained import weights_file
from dfs_jax.losses import Loss, create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import MultiExitModel, init_variables
from dfs_jax.training.checkpoint import Checkpoints, has_steps
from dfs_jax.training.config import options, read_config
from dfs_jax.training.dispatch import BATCH
from dfs_jax.training.input_config import augmentation_from_config, dataset_from_config
from dfs_jax.training.optimizer import create_optimizer, create_schedule
from dfs_jax.training.recorded import recorded_dataset
from dfs_jax.training.regimes import Regime, regime_from_config
from dfs_jax.training.rule_config import check_rule, rule_from_config
from dfs_jax.training.run_data import read_run_data
from dfs_jax.training.sharding import (
    batch_parts,
    check_batch_size,
    create_mesh,
    jit_for_mesh,
    on_mesh,
    put_replicated,
    put_where,
    replicated,
)
from dfs_jax.training.state import TrainState, create_state
from dfs_jax.training.state_sharding import check_split, is_split, tree_shardings
from dfs_jax.training.step import TrainStep, make_eval_step, make_train_step
from dfs_jax.types import Config, UserError, check_whole

# One key for each purpose, so that a change of one's draws does not affect the others.
_INIT, _TRAIN = 0, 1
# Model's `dtype` by `compute_dtype`; None is the parameters' type, float32.
_DTYPES = {None: None, "float32": None, "bfloat16": "bfloat16"}


class Experiment(NamedTuple):
    """The components that a config describes; they do not change during the run."""

    config: Config
    mesh: Mesh
    dataset: Dataset
    sampler: TrainSampler
    model: MultiExitModel
    fork: Fork
    loss: Loss
    rule: GradientRule
    regime: Regime
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    augment: Augmentation

    @property
    def total_steps(self) -> int:
        """Number of training steps in the whole run."""
        return self.config.epochs * self.sampler.steps_per_epoch

    @property
    def frozen_steps(self) -> int:
        """Number of steps from the start with a frozen trunk."""
        return self.regime.frozen_steps(self.total_steps, self.sampler.steps_per_epoch)

    def model_at(self, step: int) -> MultiExitModel:
        """Returns the model as it is trained after `step` steps."""
        return self.model.clone(frozen_trunk=step < self.frozen_steps)

    @property
    def score_split(self) -> str:
        """Split that choices are made on: validation, or train if nothing is held out."""
        return "train" if self.dataset.validation is None else "validation"


def build_experiment(
    config: Config,
    dataset: Dataset | None = None,
    *,
    mesh: Mesh | None = None,
    prepare: Callable[[Dataset], Dataset] = lambda dataset: dataset,
) -> Experiment:
    """Builds every component that `config` names; errors that need no data are raised first.

    Args:
      config: configuration of the run.
      dataset: data set to use instead of the config's.
      mesh: device mesh to use instead of the config's, for programs that do not train.
      prepare: function from the data set to the one to use, such as the one that a run recorded.

    Raises:
      UserError: an unknown name, an option that its component lacks, a value out of range, a
        missing data set, a mesh that does not fit the devices, or a batch that the devices cannot
        divide or the data cannot fill.
    """
    parts = 1  # where nothing trains, batches need not be divided
    if mesh is None:
        mesh = create_mesh(config.get("mesh"))
        parts = batch_parts(mesh)
        check_batch_size(config.batch_size, mesh, accumulate_steps(config))
    fork = create_fork(config.fork.name, **options(config.fork))
    loss = create_loss(config.loss.name, **options(config.loss))
    rule = rule_from_config(config.gradients)
    regime = regime_from_config(config)
    # Options are checked before the data, which takes its time, is read.
    augmentation_from_config(config.data, mean=(0.0, 0.0, 0.0))
    _configured(model_from_config(config.model, loss, num_classes=2), config)
    dataset = prepare(dataset or dataset_from_config(config.data))
    augment = augmentation_from_config(config.data, dataset.mean)
    model = model_from_config(config.model, loss, num_classes=dataset.num_classes)
    model = _configured(model, config)
    micro_batch = config.batch_size // accumulate_steps(config)
    _check_shapes(model, fork, loss, dataset, mesh, micro_batch)
    sampler = TrainSampler(dataset.train.num_examples, config.batch_size, config.seed)
    schedule = create_schedule(
        config.schedule, config.optimizer.learning_rate, config.epochs, sampler.steps_per_epoch
    )
    optimizer = create_optimizer(config.optimizer, schedule)
    components = fork, loss, rule, regime, schedule, optimizer, augment
    experiment = Experiment(config, mesh, dataset, sampler, model, *components)
    check_rule(rule, model, dataset.image_shape, _setup(experiment, parts))
    if rule.takes_exit_gradients and experiment.frozen_steps:
        raise UserError(
            f"gradients.name={config.gradients.name} works on the trunk's gradients, of which the "
            f"regime {config.regime.name} has none: choose sum, or the regime joint"
        )
    return experiment


def rebuild_experiment(workdir: Path, *, data_dir: str | None = None) -> Experiment:
    """Builds the components of the run in `workdir`, to evaluate it on the devices at hand.

    Classes, statistics and shapes are those that the run recorded; a split's images are read when
    they are first used. (The data set of a run of an earlier version, which recorded nothing, is
    read.) If the run's mesh does not fit the devices, all of them divide the batch.

    Args:
      workdir: directory of the run.
      data_dir: directory of the data, if it has moved.

    Raises:
      UserError: no run in the directory, or an error of `build_experiment`.
    """
    config = read_config(workdir)
    if data_dir is not None:
        config.data.data_dir = data_dir
    try:
        mesh = create_mesh(config.get("mesh"))
    except UserError:
        mesh = create_mesh()
    known = read_run_data(workdir)
    dataset = None if known is None else recorded_dataset(known, config.data)
    return build_experiment(config, dataset, mesh=mesh)


def initial_state(experiment: Experiment) -> TrainState:
    """Returns the state before the first step, on the devices, with the trunk of `init_from`.

    Arrays that are split over devices are created split, and are never whole on one device.
    """
    e, shape = experiment, experiment.dataset.image_shape
    create = functools.partial(init_variables, e.model, image_shape=shape)
    finish = functools.partial(_as_state, e)
    where, split = state_shardings(e), variable_shardings(e)
    if where is not None:
        create = jit_for_mesh(create, e.mesh, out_shardings=split)
        finish = jit_for_mesh(finish, e.mesh, out_shardings=where, donate_argnums=0)
    variables = create(_key(e.config.seed, _INIT))
    if e.config.init_from is not None:
        path = weights_file(e.config.init_from)
        _warn_of_old_weights(path)
        variables = load_trunk(path, e.model, variables)
        variables = variables if where is None else put_where(variables, split)
    elif e.frozen_steps:
        logging.warning(
            "regime=%s freezes a trunk of random weights: set init_from", e.config.regime.name
        )
    state = finish(variables)
    return put_replicated(state, e.mesh) if where is None else put_where(state, where)


def abstract_state(experiment: Experiment) -> Any:
    """Returns the state's shapes, types and shardings, without computing anything."""
    e = experiment

    def build() -> TrainState:
        key, shape = jax.random.key(0), e.dataset.image_shape
        return _as_state(e, init_variables(e.model, key, shape))

    shapes = jax.eval_shape(build)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        tree_shardings(shapes, e.mesh, e.model.tensor_axes),
    )


def state_shardings(experiment: Experiment) -> Any:
    """Returns the shardings of the state's arrays; None if all are replicated."""
    if not is_split(experiment.mesh):
        return None
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(experiment))


def variable_shardings(experiment: Experiment) -> Any:
    """Returns the shardings of `{"params": ..., "batch_stats": ...}`; None if replicated."""
    where = state_shardings(experiment)
    return None if where is None else {"params": where.params, "batch_stats": where.batch_stats}


def accumulate_steps(config: Config) -> int:
    """Returns the number of micro batches of a step."""
    steps = config.get("accumulate_steps")
    return 1 if steps is None else steps


def training_step(
    experiment: Experiment, takes: str = BATCH, *, step: int | None = None
) -> TrainStep:
    """Returns the compiled training step of an experiment, or a loop of steps; see `dispatch`.

    Args:
      experiment: experiment that is trained.
      takes: what a dispatch takes.
      step: number of steps taken before, which tells whether the trunk is frozen; None for the
        last steps of the run.
    """
    e = experiment
    step = e.total_steps - 1 if step is None else step
    return make_train_step(
        e.model_at(step),
        e.fork,
        e.loss,
        e.rule,
        e.optimizer,
        e.augment,
        mean=e.dataset.mean,
        std=e.dataset.std,
        mesh=e.mesh,
        ema_decay=e.config.optimizer.ema_decay,
        exits=e.config.gradients.exits,
        accumulate_steps=accumulate_steps(e.config),
        trunk_rate=e.regime.trunk_rate,
        state_shardings=state_shardings(e),
        takes=takes,
    )


def evaluation_step(experiment: Experiment, takes: str = BATCH):
    """Returns the compiled evaluation step of an experiment; see `make_eval_step`."""
    e = experiment
    return make_eval_step(
        e.model,
        e.fork,
        mean=e.dataset.mean,
        std=e.dataset.std,
        mesh=e.mesh,
        variable_shardings=variable_shardings(e),
        takes=takes,
    )


def state_copier(experiment: Experiment) -> Callable[[TrainState], TrainState]:
    """Returns a function that copies a state, since the next step donates the original."""
    where = state_shardings(experiment) or replicated(experiment.mesh)

    def copied(state: TrainState) -> TrainState:
        return jax.tree.map(jax.numpy.copy, state)

    return jit_for_mesh(copied, experiment.mesh, out_shardings=where)


def model_from_config(section: Config, loss: Loss, *, num_classes: int) -> MultiExitModel:
    """Returns the model of a section `model`, with adaptation layers if the loss needs them."""
    # Left unset where not needed: a user's model may not have adaptation layers.
    adapt = True if loss.adapts_features else None
    return create_model(
        section.name, num_classes=num_classes, adapt_features=adapt, **options(section)
    )


def _warn_of_old_weights(path: Path) -> None:
    """Logs a warning if a run has a better checkpoint than the weights in its directory."""
    step = weights_notes(path).get(STEP)
    # Several processes may have the file in different places, and open checkpoints together only.
    if step is None or not has_steps(path.parent) or jax.process_count() > 1:
        return
    best = Checkpoints(path.parent, read_only=True).best_step()
    if best is not None and str(best) != step:
        logging.warning(
            "%s holds step %s, the best checkpoint there is now step %d: "
            "python eval.py --workdir=%s writes its weights",
            path,
            step,
            best,
            path.parent,
        )


def _configured(model: MultiExitModel, config: Config) -> MultiExitModel:
    """Returns the model with `compute_dtype`, `batch_norm_groups` and `remat` of the config.

    Raises:
      UserError: an attribute that the model lacks, or a batch that the groups do not divide.
    """
    dtype, groups = config.get("compute_dtype"), config.get("batch_norm_groups")
    if dtype not in _DTYPES:
        raise UserError(
            f"compute_dtype must be float32 or bfloat16, got {dtype!r} (parameters, statistics and "
            f"losses are float32 either way)"
        )
    if groups is not None:
        check_whole("batch_norm_groups", groups)
        micro = config.batch_size // accumulate_steps(config)
        if micro % groups:
            raise UserError(
                f"batch_norm_groups={groups} cannot divide a batch of {micro}: choose a divisor"
            )
    asked = {
        "compute_dtype": ("dtype", _DTYPES[dtype]),
        "batch_norm_groups": ("batch_norm_groups", groups),
        "remat": ("remat", config.get("remat")),
    }
    for field, (attribute, value) in asked.items():
        if value is not None and attribute not in {field.name for field in fields(model)}:
            raise UserError(
                f"{field}={value} needs a model with the attribute {attribute!r}, which "
                f"{type(model).__name__} lacks: leave {field} unset"
            )
    return model.clone(**{name: value for name, value in asked.values() if value is not None})


def _check_shapes(
    model: MultiExitModel,
    fork: Fork,
    loss: Loss,
    dataset: Dataset,
    mesh: Mesh,
    micro_batch: int,
) -> None:
    """Traces one training pass, which raises for options that do not fit the model."""

    def trace(key: jax.Array):
        images = jax.numpy.zeros((micro_batch, *dataset.image_shape))
        rngs = {"params": key, "dropout": key}
        outputs, variables = model.init_with_output(rngs, images, fork, train=True)
        return loss(outputs, jax.numpy.zeros(micro_batch, int)), variables["params"]

    try:
        _, params = jax.eval_shape(on_mesh(trace, mesh), jax.random.key(0))
        check_split(params, mesh, model)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _setup(experiment: Experiment, parts: int) -> Setup:
    groups = experiment.config.get("batch_norm_groups")
    return Setup(
        loss=experiment.loss,
        num_exits=experiment.model.num_exits,
        total_steps=experiment.total_steps,
        batch_size=experiment.config.batch_size,
        batch_parts=parts,
        accumulate_steps=accumulate_steps(experiment.config),
        batch_norm_groups=1 if groups is None else groups,
    )


def _as_state(experiment: Experiment, variables: dict[str, Any]) -> TrainState:
    return create_state(
        variables,
        experiment.optimizer,
        _key(experiment.config.seed, _TRAIN),
        num_exits=experiment.model.num_exits,
        keep_average=experiment.config.optimizer.ema_decay is not None,
        rule=experiment.rule,
    )


def _key(seed: int, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), purpose)
