"""`python -m dfs_jax.reports.cost_report`: its numbers, its table, its file, and mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dfs_jax.costs.flops import exit_costs
from dfs_jax.costs.step_operations import theoretical_step_cost, traced_step_cost
from dfs_jax.data.shapes import known_shape
from dfs_jax.data.sources import load_dataset
from dfs_jax.forks import create_fork
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.reports.cost_report import cost_report, table_for_terminal
from dfs_jax.types import UserError
from tests.support.helpers import ThreeStageVGG, tiny_config

REPOSITORY = Path(__file__).resolve().parents[2]
RATIO = 0.3


@pytest.fixture(scope="module")
def report():
    return cost_report(tiny_config(**{"data.name": "cifar100", "fork.partition_ratio": (RATIO,)}))


def test_numbers_are_those_of_the_configs_network(report):
    model = ThreeStageVGG(num_classes=100, width=2)
    assert list(report) == ["exits", "training_step"]
    assert report["exits"] == [cost._asdict() for cost in exit_costs(model, (32, 32, 3))]
    assert list(report["exits"][0]) == [
        "exit",
        "params",
        "macs",
        "published_macs",
        "literature_flops",
        "macs_without_earlier_heads",
    ]
    loss, step = create_loss("deep_supervision"), report["training_step"]
    assert (step["fork"], step["loss"]) == ("dfs", "deep_supervision")
    forks = {"plain": create_fork("plain"), "forked": create_fork("dfs", partition_ratio=RATIO)}
    counts = {"traced": traced_step_cost, "theory": theoretical_step_cost}
    for name, fork in forks.items():
        for how, count in counts.items():
            cost = count(model, fork, loss, (32, 32, 3))
            assert step[name][how] == {**cost._asdict(), "total": sum(cost)}
    for how in counts:
        ratio = step["plain"][how]["total"] / step["forked"][how]["total"]
        assert step["speedup"][how] == ratio
    assert step["speedup"]["theory"] > 1.1


def test_table(report):
    lines = [line.split() for line in table_for_terminal(report).splitlines()]
    first, last = report["exits"][0], report["exits"][-1]
    for cost in (first, last):
        counts = list(cost)[1:]
        counts = (*counts[:3], counts[4], counts[3])
        row = [str(cost["exit"]), *(f"{cost[count] / 1e6:.3f}" for count in counts)]
        assert row in lines
    theory = report["training_step"]["forked"]["theory"]
    assert ["dfs,", "theory", *(f"{count / 1e6:.3f}" for count in theory.values())] in lines
    assert f"theory {report['training_step']['speedup']['theory']:.3f}".split() == lines[-1][-2:]
    plain = {**report, "training_step": {**report["training_step"], "fork": "plain"}}
    assert table_for_terminal(plain).splitlines()[-1].split()[:2] == ["plain,", "theory"]


def test_other_data_sets_are_read_for_their_size_and_the_loss_gets_its_layers():
    report = cost_report(tiny_config(**{"loss.name": "byot"}))
    model = ThreeStageVGG(num_classes=3, width=2)
    assert report["exits"][-1]["macs"] == exit_costs(model, (8, 8, 3))[-1].macs
    forward = report["training_step"]["plain"]["theory"]["forward"]
    assert forward > report["exits"][-1]["macs"]  # adaptation layers


def test_known_shapes():
    digits = load_dataset("digits")
    assert known_shape("digits") == (digits.num_classes, digits.image_shape)
    assert known_shape("cifar10:3.0.2") == (10, (32, 32, 3))
    assert known_shape("imagenet2012") == (1000, (224, 224, 3))
    assert known_shape("imagenet2012", 96).image_shape == (96, 96, 3)
    assert known_shape("mnist") is None
    assert known_shape("cifar10.own:load") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "vgg8"}, "unknown model 'vgg8'"),
        ({"data.name": "cifar10", "data.image_size": 4}, "4x4 are too small for 3 max-pools"),
        ({"fork.partition_ratio": (0.5, 0.2, 0.3)}, "3 exits take 1 or 2 partition ratios"),
        ({"loss.exit_weights": (1.0, 2.0)}, "3 exits take 3 exit_weights"),
        ({"fork.name": "plain", "fork.referencing": "none"}, "has no option 'referencing'"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        cost_report(tiny_config(**changes))


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "dfs_jax.reports.cost_report", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_program(tmp_path):
    output = tmp_path / "new" / "costs.json"
    config = ["--config=configs/cifar100_vgg7.py", "--config.model.width=3"]
    done = run(*config, f"--output={output}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"wrote {output}\n")
    report = json.loads(output.read_text())
    assert done.stdout.startswith(table_for_terminal(report))
    model = create_model("vgg7", num_classes=100, width=3)
    assert report["exits"][-1]["params"] == exit_costs(model, (32, 32, 3))[-1].params


def test_program_tells_mistakes_in_one_line():
    done = run("--config=configs/cifar100_vgg7.py", "--config.model.name=vgg8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown model 'vgg8': choose one of ")
    assert done.stderr.count("\n") == 1
