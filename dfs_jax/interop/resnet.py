"""Published names of ResNet."""

from __future__ import annotations

from dfs_jax.interop.entries import Entry, Family, batch_norm, conv, linear
from dfs_jax.models.resnet import ResNet


def resnet_entries(model: ResNet) -> list[Entry]:
    """Lists the tensors of a ResNet: trunk, reductions (`scala`), attention gates, classifiers.

    The trunk has torchvision's names. Exits count from 1, convolutions within them from 0.
    """
    exits, early = range(1, model.num_exits + 1), range(1, model.num_exits)
    entries = [*conv("conv1", "block1/stem/conv"), *batch_norm("bn1", "block1/stem/norm")]
    for i in exits:
        entries += _stage(model, i)
    for i in early:
        for j in range(model.num_exits - i):
            entries += _separable_conv(f"scala{i}.{j}", f"head{i}/reduction{j + 1}")
    for i in early:
        entries += _separable_conv(f"attention{i}.0", f"head{i}/gate/separable")
        entries += batch_norm(f"attention{i}.1", f"head{i}/gate/norm")
    for i in exits:
        pooled = f"head{i}/pooled" if i in early else f"head{i}"
        entries += linear(f"fc{i}", f"{pooled}/classifier", bias=True)
    if model.adapt_features:
        for i in early:
            entries += linear(f"adaptation_layer{i}", f"head{i}/pooled/adaptation", bias=True)
    return entries


def _stage(model: ResNet, i: int) -> list[Entry]:
    """Lists stage i, counted from 1."""
    entries = []
    for j in range(model.stage_sizes[i - 1]):
        name, path = f"layer{i}.{j}", f"block{i}/residual{j + 1}"
        for k in (1, 2, 3) if model.bottleneck else (1, 2):
            entries += conv(f"{name}.conv{k}", f"{path}/conv{k}")
            entries += batch_norm(f"{name}.bn{k}", f"{path}/norm{k}")
        if j == 0 and (i > 1 or model.bottleneck):  # where the shape changes
            entries += conv(f"{name}.downsample.0", f"{path}/shortcut_conv")
            entries += batch_norm(f"{name}.downsample.1", f"{path}/shortcut_norm")
    return entries


def _separable_conv(name: str, path: str) -> list[Entry]:
    """Lists a separable convolution; its ReLUs, at 3 and 7, have no tensors."""
    return [
        *conv(f"{name}.op.0", f"{path}/depthwise1"),
        *conv(f"{name}.op.1", f"{path}/pointwise1"),
        *batch_norm(f"{name}.op.2", f"{path}/norm1"),
        *conv(f"{name}.op.4", f"{path}/depthwise2"),
        *conv(f"{name}.op.5", f"{path}/pointwise2"),
        *batch_norm(f"{name}.op.6", f"{path}/norm2"),
    ]


FAMILY = Family(resnet_entries, head_prefixes=("scala", "attention", "fc", "adaptation_layer"))
