"""Published names of MSDNet."""

from __future__ import annotations

from dfs_jax.interop.entries import Entry, Family, batch_norm, conv, linear
from dfs_jax.models.msdnet import MSDNet
from dfs_jax.models.msdnet_plan import Layer, Step

# Indices of a `ConvNorm` and of the second of two in a PyTorch sequence (ReLUs have no tensors).
_FIRST, _SECOND = (0, 1), (3, 4)


def msdnet_entries(model: MSDNet) -> list[Entry]:
    """Lists the tensors of an MSDNet: blocks, then classifiers, all counted from 0.

    Within a block, modules are counted one by one: first layer, layers, transitions; within a
    module, scales are counted from the finest that is kept. The linear layer follows a dropout, as
    in the published Deep Feature Surgery. MSDNet has no published adaptation layers; their names
    here are like ResNet's.
    """
    entries = []
    for b, block in enumerate(model.plan):
        path = f"block{b + 1}"
        offset = 0
        if block.first:
            entries += _first_layer(model, f"blocks.{b}.0", f"{path}/first")
            offset = 1
        for i, step in enumerate(block.steps, start=offset):
            entries += _step(step, f"blocks.{b}.{i}", f"{path}/{step.name}")
    for k in range(model.num_exits):
        name, path = f"classifier.{k}", f"head{k + 1}"
        entries += _conv_norm(f"{name}.m.0.net", f"{path}/conv1")
        entries += _conv_norm(f"{name}.m.1.net", f"{path}/conv2")
        entries += linear(f"{name}.linear.1", f"{path}/pooled/classifier", bias=True)
    if model.adapt_features:
        for k in range(1, model.num_exits):
            entries += linear(f"adaptation_layer{k}", f"head{k}/pooled/adaptation", bias=True)
    return entries


def _first_layer(model: MSDNet, name: str, path: str) -> list[Entry]:
    entries = []
    for s in range(len(model.scale_factors)):
        # The large stem is a separate sequence, without the name that other convolutions have.
        if s == 0 and model.stem == "imagenet":
            entries += _conv_norm(f"{name}.layers.0", f"{path}/scale1", bias=True)
        else:
            entries += _conv_norm(f"{name}.layers.{s}.net", f"{path}/scale{s + 1}")
    return entries


def _step(step: Step, name: str, path: str) -> list[Entry]:
    entries = []
    for j, scale in enumerate(step.scales):
        where = f"{path}/scale{scale.scale}"
        if not isinstance(step, Layer):
            entries += _conv_norm(f"{name}.m.{j}.net", where)
            continue
        for theirs, ours in (("conv_down", "down"), ("conv_normal", "same")):
            if getattr(scale, ours) is not None:
                net = f"{name}.layers.{j}.{theirs}.net"
                entries += _conv_norm(net, f"{where}/{ours}/narrow")
                entries += _conv_norm(net, f"{where}/{ours}/wide", _SECOND)
    return entries


def _conv_norm(
    name: str, path: str, places: tuple[int, int] = _FIRST, *, bias: bool = False
) -> list[Entry]:
    """Lists a convolution and the BatchNorm after it, at two indices of the sequence `name`."""
    first, second = places
    return [
        *conv(f"{name}.{first}", f"{path}/conv", bias=bias),
        *batch_norm(f"{name}.{second}", f"{path}/norm"),
    ]


# Shapes do not depend on the images' size, which must only be large enough for all scales.
FAMILY = Family(
    msdnet_entries,
    head_prefixes=("classifier", "adaptation_layer", "fc"),
    image_shape=(224, 224, 3),
)
