"""The page of the accuracy benchmark: its tables and figures around text by hand."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from benchmarks.accuracy import page
from benchmarks.accuracy.__main__ import REPOSITORY
from benchmarks.accuracy.cells import cell_config, config_hash
from benchmarks.accuracy.results import FINISHED
from benchmarks.accuracy.suites import create_suite
from dfs_jax.types import UserError
from tests.support.helpers import made_up_record


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The page from made-up results of the whole suite but one cell."""
    docs, directory = (tmp_path_factory.mktemp(name) for name in ("docs", "results"))
    shutil.copy(REPOSITORY / "docs" / "results.md", docs)
    suite = create_suite("small")
    cells = {
        cell.name: {
            "status": FINISHED,
            "config_hash": config_hash(cell_config(suite, cell)),
            "at": 0.0,
            **made_up_record(cell),
        }
        for cell in suite.cells[1:]
    }
    (directory / "small.json").write_text(json.dumps({"cells": cells}))
    return docs, page.render_page(docs, directory)


def test_the_page_is_rendered_around_its_text(rendered):
    docs, written = rendered
    names = {path.name for path in written}
    assert names == {"results.md", *(f"results_{name}.png" for name in page._PICTURES)}
    text, ours = (docs / "results.md").read_text(), (REPOSITORY / "docs" / "results.md").read_text()
    total = len(create_suite("small").cells)
    assert f"`small`: {total - 1} of {total} cells" in text
    assert "| DSN | 2 of 3 | " in text
    assert set(re.findall(r"\]\((results_\w+\.png)\)", text)) == names - {"results.md"}
    outside = [page._BLOCK.sub(r"\1\3", content) for content in (text, ours)]
    assert outside[0] == outside[1]


def test_rows_of_one_table_have_the_same_seeds(rendered):
    text = (rendered[0] / "results.md").read_text()
    blocks = {found[2]: found[0] for found in page._BLOCK.finditer(text)}
    row = re.compile(r"^\| (?:DSN|DFS)[^|]*\| ([^|]+) \|", re.MULTILINE)
    for name, seeds in (
        ("confirmed", {"3"}),
        ("epochs", {"1"}),
        ("byot", {"2 of 3", "3"}),
        ("published_recipe", {"3"}),
        ("beta", {"0 of 1", "1"}),
    ):
        tables = re.sub(r"(?ms)^\| less .*?\n\n", "", blocks[name])
        found = set(row.findall(tables))
        assert found, name
        assert found <= seeds, name
    betas = re.findall(r"^\| (DFS trunk_only(?:, beta \S+)?) \|", blocks["beta"], re.MULTILINE)
    swept = ["", *(f", beta {beta}" for beta in (0.1, 0.3, 0.7, 0.9))]
    assert sorted(betas) == [f"DFS trunk_only{beta}" for beta in swept]
    assert "| DFS trunk_only, two | 3 | " in blocks["confirmed"]
    assert "| DFS trunk_only, two | 1 | " in blocks["epochs"]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [("begin beta", "begin gamma", "beta"), ("end width", "end widths", "width")],
)
def test_a_page_with_other_blocks_is_refused(rendered, tmp_path, old, new, named):
    shutil.copy(rendered[0] / "results.md", tmp_path)
    path = tmp_path / "results.md"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=rf"missing, unknown or twice: .*{named}"):
        page.render_page(tmp_path, tmp_path)
