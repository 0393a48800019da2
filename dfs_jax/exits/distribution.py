"""Distribution of examples over the exits."""

from __future__ import annotations

import numpy as np


def exit_distribution(p: float, num_exits: int) -> np.ndarray:
    """Returns the fraction of examples that each exit should answer, `[exits]` float64, sum 1.

        q_k = p^k / sum_j p^j,   k = 1 .. exits

    Raises:
      ValueError: a p that is not positive and finite, or no exit.

    Example:
      >>> exit_distribution(0.5, 2).round(4).tolist()
      [0.6667, 0.3333]
    """
    if not 0 < p < float("inf"):
        raise ValueError(f"the budget parameter p must be above 0 and finite, got {p!r}")
    if num_exits < 1:
        raise ValueError(f"a network has at least 1 exit, got {num_exits}")
    weights = float(p) ** np.arange(1, num_exits + 1)
    return weights / weights.sum()
