"""`python -m dfs_jax.interop check FILE...`: compares our models' results with golden files.

Prints one line for each file with the worst relative differences. Exit status: 0 if all are within
the tolerance and every gradient that must be zero is exactly zero, 1 if not, 2 if a file cannot be
checked.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax

from dfs_jax.guard import guarded, run_plain
from dfs_jax.interop.golden import Comparison, compare, compute, read_golden
from dfs_jax.output import say

TOLERANCE = 1e-6
TITLE = "worst relative difference"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m dfs_jax.interop")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="compare our models with golden files, in float64")
    check.add_argument("files", nargs="+", metavar="FILE", help="a golden file (.json.gz)")
    files = parser.parse_args(arguments).files
    jax.config.update("jax_enable_x64", True)
    return guarded(lambda: 0 if check_files(files) else 1)


def check_files(paths: Sequence[str]) -> bool:
    """Checks golden files, writes a table line for each, and returns whether all pass.

    Raises:
      UserError: a file is missing or damaged, or its model unknown; raised before slow work.
    """
    cases = [(case, case.create_model()) for case in map(read_golden, paths)]
    width = max(len(name) for name in (TITLE, *(case.case for case, _ in cases)))
    passed = True
    for i, (case, model) in enumerate(cases):
        comparison = compare(case, compute(case, model))
        if i == 0:
            titles = "".join(f"  {title:>12}" for title in comparison.differences)
            say(f"{TITLE:{width}}{titles}  zero gradients")
        say(_line(f"{case.case:{width}}", comparison))
        passed = passed and comparison.passes(TOLERANCE)
    return passed


def _line(name: str, comparison: Comparison) -> str:
    numbers = "".join(f"  {value:12.1e}" for value in comparison.differences.values())
    if comparison.nonzero:
        zeros = f"not zero: {', '.join(comparison.nonzero)}"
    else:
        zeros = f"{comparison.zeros} exact" if comparison.zeros else "none"
    verdict = "ok" if comparison.passes(TOLERANCE) else f"FAILS (above {TOLERANCE:g})"
    return f"{name}{numbers}  {zeros:14}  {verdict}"


if __name__ == "__main__":
    run_plain(main)
