"""Published names of VGG."""

from __future__ import annotations

from dfs_jax.interop.entries import Entry, Family, batch_norm, conv, linear
from dfs_jax.models.vgg import VGG
from dfs_jax.types import UserError


def vgg_entries(model: VGG) -> list[Entry]:
    """Lists the tensors of a VGG: trunk first, then classifiers (spelt `classifers`), 0-based.

    Every convolution except the first, and every classifier, is published in two halves, `_p` for
    the shared channels and `_s` for the exit-specific ones, also in the plain network and at the
    last exit. VGG has no published adaptation layers; their names here are like ResNet's.

    Raises:
      UserError: not every convolution has an exit.
    """
    if model.num_exits < sum(model.stage_sizes):
        raise UserError(
            f"published VGGs have an exit after every convolution, and exits are {model.exits}: "
            f"leave exits out"
        )
    entries = [
        *conv("feature_extractors.0.0", "block1/conv", bias=True),
        *batch_norm("feature_extractors.0.2", "block1/norm"),
    ]
    for i in range(1, model.num_exits):
        name = f"feature_extractors.{i}"
        entries += conv((f"{name}.conv_p", f"{name}.conv_s"), f"block{i + 1}/conv")
        entries += batch_norm(f"{name}.bn", f"block{i + 1}/norm")
    for i in range(model.num_exits):
        name = f"classifers.{i}"
        entries += linear((f"{name}.fc_p", f"{name}.fc_s"), f"head{i + 1}/classifier")
    if model.adapt_features:
        for i in range(1, model.num_exits):
            entries += linear(f"adaptation_layer{i}", f"head{i}/adaptation", bias=True)
    return entries


FAMILY = Family(vgg_entries, head_prefixes=("classifer", "classifier", "adaptation_layer", "fc"))
