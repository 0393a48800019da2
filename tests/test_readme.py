"""README and docs agree with the program: code runs; commands, files, links and names exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dfs_jax import FeatureSurgery, skip_dead_gradients
from dfs_jax.costs.operations import count_operations
from dfs_jax.forks import FORKS
from dfs_jax.gradients import RULES
from dfs_jax.losses import LOSSES
from dfs_jax.models import MODELS

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{p.name}" for p in (REPOSITORY / "docs").glob("*.md")),
)
THREE_LINES = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)


class UsersModel(nn.Module):
    """A network of a user's own whose first exit is the README's three lines."""

    @nn.compact
    def __call__(self, x):
        logits = []
        x = nn.relu(nn.Conv(16, (3, 3), name="stem")(x))
        names = {"FeatureSurgery": FeatureSurgery, "nn": nn, "x": x, "logits": logits}
        exec(THREE_LINES, names)
        x = nn.Conv(16, (3, 3), name="deeper")(names["x"])
        return [*logits, nn.Dense(10, name="last")(x.mean((1, 2)))]


def test_the_three_lines_split_the_gradient():
    assert len(THREE_LINES.splitlines()) == 3
    model, x = UsersModel(), jnp.ones((2, 7, 7, 3))
    params = model.init(jax.random.key(0), x)
    # Which of the stem's 16 filters each exit trains: the first 8 the deeper one, the rest its own.
    for exit_index, trained in ((0, slice(8, 16)), (1, slice(0, 8))):
        grads = jax.grad(lambda p, i=exit_index: (model.apply(p, x)[i] ** 2).sum())(params)
        norms = jnp.linalg.norm(grads["params"]["stem"]["kernel"].reshape(-1, 16), axis=0)
        others = jnp.delete(norms, jnp.arange(16)[trained])
        assert float(others.max()) == 0.0
        assert float(norms[trained].max()) > 0.0


def test_one_more_line_makes_the_backward_pass_cheaper():
    line = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    model, x = UsersModel(), jnp.ones((2, 7, 7, 3))
    params = model.init(jax.random.key(0), x)

    def loss(params):
        return sum((logits**2).sum() for logits in model.apply(params, x))

    def as_written(params):
        names = {"jax": jax, "skip_dead_gradients": skip_dead_gradients, "params": params}
        exec(line, names | {"loss": loss}, names)
        return names["gradients"]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        as_written(params),
        jax.grad(loss)(params),
    )
    costs = [count_operations(jax.make_jaxpr(f)(params)) for f in (as_written, jax.grad(loss))]
    assert costs[0] < costs[1]


FILES = sorted(set(re.findall(r"(?:configs|docs|notebooks)/\S+?\.\w+", README)))


@pytest.mark.parametrize("path", FILES)
def test_files_that_the_readme_names_exist(path):
    assert (REPOSITORY / path).is_file()


@pytest.mark.parametrize("registry", [MODELS, FORKS, LOSSES, RULES], ids=lambda r: r.kind)
def test_every_name_of_a_registry_is_in_the_readme(registry):
    for name in registry.table:
        assert f"`{name}`" in README, f"{registry.kind} {name!r} is not in the README"


def test_make_targets_that_the_readme_names_exist():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    source = REPOSITORY / page
    for target in re.findall(r"\]\(([^)\s]+)\)", source.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = source.parent / path if path else source
        assert found.is_file(), target
        assert not anchor or anchor in headings(found), target


SECTIONS = "mesh|model|fork|loss|gradients|data|optimizer|schedule"


@pytest.mark.parametrize(
    "page", ["configuration", "your_data", "training", "reproduction", "methods"]
)
def test_fields_that_a_page_names_are_fields_of_the_config(page):
    text = (REPOSITORY / "docs" / f"{page}.md").read_text(encoding="utf-8")
    config = importlib.import_module("configs.common").get_config()
    named = set(re.findall(rf"[`.]({SECTIONS})\.(?!json)([a-z_]+)[`=]", text))
    assert named
    for section, field in named:
        assert field in config[section], f"{section}.{field}"
    if page == "configuration":
        run = text.partition("## Model")[0]
        for field in re.findall(r"^\| `([a-z_]+)`", run, re.MULTILINE):
            assert field in config, field
