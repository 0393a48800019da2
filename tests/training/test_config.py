"""A run's config: checked, recorded with the run, and compared when it resumes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import cifar100_msdnet, cifar100_resnet18, common
from dfs_jax.forks import create_fork
from dfs_jax.gradients import RULES
from dfs_jax.losses import create_loss
from dfs_jax.losses.deep_supervision import DeepSupervision
from dfs_jax.losses.distillation import BYOT
from dfs_jax.models import create_model
from dfs_jax.surgery import FeatureSurgery
from dfs_jax.training.config import (
    check_config,
    open_workdir,
    options,
    read_config,
    record_config,
)
from dfs_jax.training.methods import METHODS
from dfs_jax.training.rule_config import rule_from_config
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config

CONFIGS = sorted(path.stem for path in Path("configs").glob("*.py") if path.stem != "__init__")


def flat_names(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flat_names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_the_common_fields_and_sensible_values(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert set(flat_names(config)) == set(flat_names(common.get_config()))
    check_config(config)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_every_method_by_one_word(name, method):
    config = importlib.import_module(f"configs.{name}").get_config(method)
    fork = create_fork(config.fork.name, **options(config.fork))
    loss = create_loss(config.loss.name, **options(config.loss))
    rule = rule_from_config(config.gradients)
    assert rule.is_plain_sum == (method not in RULES.table)
    assert isinstance(fork, FeatureSurgery) == (method == "dfs")
    assert isinstance(loss, BYOT) or method != "byot"
    labels_alone = isinstance(loss, DeepSupervision)
    assert labels_alone or method in ("dfs", "byot", "distillation")
    assert create_model(config.model.name, num_classes=7, **options(config.model)).num_exits > 3


def test_a_method_that_is_unknown():
    with pytest.raises(KeyError, match=r"unknown method 'dns': choose from dfs, dsn, byot"):
        common.get_config("dns")


def test_a_plus_joins_methods_that_change_different_parts():
    def parts(config):
        return config.fork.name, config.loss.name, config.gradients.name

    assert parts(common.get_config("dfs+pcgrad")) == ("dfs", "deep_supervision", "pcgrad")
    joined = common.get_config("cagrad+ge+distillation")
    assert parts(joined) == ("gradient_equilibrium", "distillation", "cagrad")
    published = cifar100_resnet18.get_config("dfs+nash_mtl")  # DFS comes with BYOT's losses there
    assert parts(published) == ("dfs", "byot", "nash_mtl")
    assert cifar100_resnet18.get_config("dfs+distillation").loss.name == "distillation"
    assert cifar100_msdnet.get_config("dfs+upgrad").fork.referencing == "trunk_only"
    assert cifar100_msdnet.get_config("ge+upgrad").fork.referencing is None
    assert parts(common.get_config("meta_gf+dfs")) == ("dfs", "deep_supervision", "meta_gf")
    for method, message in [
        ("dfs+ge", r"of one kind \(fork\), dfs and gradient_equilibrium"),
        ("pcgrad+pcgrad", r"of one kind \(gradients\), pcgrad and pcgrad"),
        ("wpn+pcgrad", r"of one kind \(gradients\), wpn and pcgrad"),
        ("dfs+", "unknown method ''"),
    ]:
        with pytest.raises(KeyError, match=message):
            common.get_config(method)


def test_a_config_comes_back_from_its_file(tmp_path):
    config = tiny_config(**{"fork.partition_ratio": (0.3,), "optimizer.ema_decay": 0.9})
    open_workdir(tmp_path / "run", config)
    assert read_config(tmp_path / "run").to_dict() == config.to_dict()
    open_workdir(tmp_path / "run", config)  # the same again is no other run


def test_a_run_from_before_a_section_was_known_is_the_same_run(tmp_path):
    open_workdir(tmp_path, tiny_config())
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    old = json.loads((tmp_path / "config.json").read_text())
    del old["gradients"], old["mesh"], old["remat"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_config(tmp_path).gradients.to_dict() == {"name": "sum", "exits": None}
    open_workdir(tmp_path, tiny_config())
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="name \\(was 'sum', is 'pcgrad'\\)"):
        open_workdir(tmp_path, tiny_config(**{"gradients.name": "pcgrad"}))


def test_a_run_of_another_config_is_refused_by_field(tmp_path):
    open_workdir(tmp_path, tiny_config())
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    other = tiny_config(**{"optimizer.learning_rate": 0.25, "fork.partition_ratio": (0.3,)})
    with pytest.raises(UserError) as error:
        open_workdir(tmp_path, other)
    message = str(error.value)
    assert "fork.partition_ratio (was None, is [0.3])" in message
    assert "optimizer.learning_rate (was 0.05, is 0.25)" in message
    assert "seed" not in message
    assert read_config(tmp_path).optimizer.learning_rate == 0.05  # what was there stays


def test_a_start_that_failed_before_its_first_checkpoint_blocks_nothing(tmp_path):
    open_workdir(tmp_path, tiny_config())
    open_workdir(tmp_path, tiny_config(seed=7))
    assert read_config(tmp_path).seed == 7


def test_paths_and_logging_may_change(tmp_path):
    open_workdir(tmp_path, tiny_config())
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    changed = tiny_config(**{"data.data_dir": "/elsewhere", "log_every_steps": 3})
    open_workdir(tmp_path, changed)
    assert read_config(tmp_path).data.data_dir is None  # until nothing can refuse to go on
    record_config(tmp_path, changed)
    assert read_config(tmp_path).data.data_dir == "/elsewhere"
    open_workdir(tmp_path, tiny_config(conflict_every_steps=4, conflict_examples=9))


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"workdir .*file.* is a file: name "):
            open_workdir(workdir, tiny_config())


def test_a_workdir_that_cannot_be_written():
    with pytest.raises(UserError, match="workdir /proc/run cannot be written: "):
        open_workdir(Path("/proc/run"), tiny_config())


def test_a_config_file_that_is_damaged(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        read_config(tmp_path)


def test_where_there_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"there is no run in .*config.json is missing"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "field", ["batch_size", "eval_batch_size", "epochs", "eval_every_epochs", "log_every_steps"]
)
def test_counts_must_be_positive(field):
    with pytest.raises(UserError, match=f"{field} must be at least 1, got 0"):
        check_config(tiny_config(**{field: 0}))
    with pytest.raises(UserError, match="checkpoint_every_steps must be at least 0, got -1"):
        check_config(tiny_config(checkpoint_every_steps=-1))


def test_options_are_a_section_without_its_name():
    assert options(common.get_config().fork) == {"partition_ratio": None, "referencing": None}


def test_config_json_is_plain(tmp_path):
    open_workdir(tmp_path, tiny_config())
    assert json.loads((tmp_path / "config.json").read_text())["model"]["width"] == 2
