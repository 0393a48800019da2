"""Marks for rows of a test table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(names: Iterable[str], *those: str) -> list[Any]:
    """Returns the names for `parametrize`, with `those` marked slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in those)) for name in names]
