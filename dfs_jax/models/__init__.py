"""Multi-exit backbones: `create_model(name, num_classes=..., **options)` builds any of them."""

from __future__ import annotations

from typing import Any

from dfs_jax.registry import Registry

MODELS = Registry(
    "model",
    {
        "vgg7": "dfs_jax.models.vgg:VGG7",
    },
)


def create_model(name: str, *, num_classes: int, **options: Any):
    """Builds a backbone by its registered name, or a user's own `package.module:attribute`.

    >>> create_model("vgg7", num_classes=10, width=16).num_exits
    6
    """
    return MODELS.create(name, num_classes=num_classes, **options)
