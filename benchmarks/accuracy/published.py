"""Published tables for comparison with the suite `paper`; accuracies in percent.

Gong et al., "Deep Feature Surgery: Towards Accurate and Efficient Multi-Exit Networks", ECCV 2024,
whose authors chose the best epoch on the test set.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A row of a published table.

    Attributes:
      exits: accuracies of the exits, shallow first; None if not published.
      ensemble: accuracy of the ensemble of all exits, if published.
    """

    exits: tuple[float | None, ...]
    ensemble: float | None = None


_BETWEEN = (None,) * 4
# Rows by the suite's config and method.
PUBLISHED: dict[str, dict[str, Published]] = {
    "cifar100_vgg7": {
        "dfs_beta0.1": Published((22.8, *_BETWEEN, 65.5)),
        "dfs_beta0.5": Published((20.8, *_BETWEEN, 70.6)),
        "dfs_beta0.9": Published((17.9, *_BETWEEN, 73.1)),
    },
    "cifar100_resnet18": {
        "dsn": Published((67.23, 73.80, 77.75, 78.38), 79.27),
        "byot": Published((67.85, 74.57, 78.23, 78.64), 79.67),
        "dfs": Published((74.17, 77.43, 78.82, 79.93), 80.89),
    },
    "cifar100_msdnet": {
        "dsn": Published((64.10, 67.46, 70.34, 72.38, 73.06, 73.81, 73.89)),
        "ge": Published((64.00, 68.41, 71.86, 73.50, 74.46, 75.39, 75.96)),
        "cagrad": Published((68.78, 72.55, 74.23, 74.97, 75.35, 75.82, 76.08)),
        "pcgrad": Published((67.06, 71.37, 74.86, 75.78, 76.25, 76.95, 76.71)),
        "nash_mtl": Published((64.14, 69.23, 72.64, 74.89, 75.32, 75.88, 76.75)),
        "dfs": Published((72.46, 75.64, 77.50, 78.54, 79.20, 79.45, 79.56)),
    },
    "imagenet_msdnet": {
        "dsn": Published((56.64, 65.14, 68.42, 69.77, 71.34)),
        "ge": Published((57.28, 66.22, 70.24, 71.71, 72.43)),
        "cagrad": Published((58.37, 64.21, 66.88, 68.22, 69.42)),
        "pcgrad": Published((57.62, 64.87, 68.93, 71.05, 72.45)),
        "dfs": Published((61.80, 68.03, 70.75, 71.79, 72.88)),
    },
}
