"""Multi-exit backbones: `create_model(name, num_classes=..., **options)` builds any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfs_jax.models.added_exits import add_exits
from dfs_jax.options import options_of
from dfs_jax.registry import Registry
from dfs_jax.types import UserError

MODELS = Registry(
    "model",
    {
        "efficientnet_lite0": "dfs_jax.models.efficientnet:EfficientNetLite",
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


def create_model(
    name: str, *, num_classes: int, exits_at: Sequence[str] | None = None, **options: Any
):
    """Builds a backbone by its registered name, or a user's own `package.module:attribute`.

    Args:
      name: name of the backbone.
      num_classes: number of classes.
      exits_at: names of submodules to add exits at, for a module without exits (`add_exits`).
      options: options of the backbone.

    Raises:
      UserError: an unknown name, an option that the backbone lacks, or a module without exits.

    Example:
      >>> create_model("vgg7", num_classes=10, width=16).num_exits
      6
    """
    if exits_at is None:
        model = MODELS.create(name, num_classes=num_classes, **options)
        if not hasattr(model, "num_exits"):
            raise UserError(
                f"model {name!r} has no exits: name submodules to add them at in model.exits_at, "
                f"or make it a MultiExitModel"
            )
        return model
    adapts = options.pop("adapt_features", None)
    takes = options_of(MODELS.resolve(name))
    own = {"num_classes": num_classes} if "num_classes" in takes else {}
    model = add_exits(MODELS.create(name, **own, **options), exits_at, num_classes=num_classes)
    return model.clone(adapt_features=True) if adapts else model
