"""Multi-exit backbones: `create_model(name, num_classes=..., **options)` builds any of them."""

from __future__ import annotations

from typing import Any

from dfs_jax.registry import Registry

MODELS = Registry(
    "model",
    {
        "msdnet": "dfs_jax.models.msdnet:MSDNet",
        "msdnet_cifar100": "dfs_jax.models.msdnet:MSDNet",
        "msdnet_cifar_anytime": "dfs_jax.models.msdnet:AnytimeMSDNet",
        "msdnet_cifar_budgeted": "dfs_jax.models.msdnet:BudgetedMSDNet",
        "msdnet_imagenet": "dfs_jax.models.msdnet:ImageNetMSDNet",
        "resnet18": "dfs_jax.models.resnet:ResNet18",
        "resnet34": "dfs_jax.models.resnet:ResNet34",
        "resnet50": "dfs_jax.models.resnet:ResNet50",
        "resnet101": "dfs_jax.models.resnet:ResNet101",
        "resnet152": "dfs_jax.models.resnet:ResNet152",
        "vgg16": "dfs_jax.models.vgg:VGG16",
        "vgg7": "dfs_jax.models.vgg:VGG7",
        "vit_base": "dfs_jax.models.vit:ViTBase",
        "vit_small": "dfs_jax.models.vit:ViTSmall",
        "vit_tiny": "dfs_jax.models.vit:ViTTiny",
    },
)


def create_model(name: str, *, num_classes: int, **options: Any):
    """Builds a backbone by its registered name, or a user's own `package.module:attribute`.

    >>> create_model("vgg7", num_classes=10, width=16).num_exits
    6
    """
    return MODELS.create(name, num_classes=num_classes, **options)
