"""Published names of EfficientNet-Lite."""

from __future__ import annotations

from dfs_jax.interop.entries import Entry, Family, batch_norm, conv, linear
from dfs_jax.models.efficientnet import BLOCKS, EfficientNetLite


def efficientnet_entries(model: EfficientNetLite) -> list[Entry]:
    """Lists the tensors of an EfficientNet-Lite; heads of early exits have our own names."""
    last = model.num_exits
    entries = [*conv("_conv_stem", "block1/stem/conv"), *batch_norm("_bn0", "block1/stem/norm")]
    start = 0
    for i, end in enumerate((*model.exits, len(BLOCKS)), start=1):
        for k in range(start, end):
            entries += _block(f"_blocks.{k}", f"block{i}/layer{k + 1}", BLOCKS[k][3] > 1)
        start = end
    entries += [*conv("_conv_head", f"block{last}/top/conv")]
    entries += batch_norm("_bn1", f"block{last}/top/norm")
    for i in range(1, last):
        entries += conv(f"exit_heads.{i - 1}.conv", f"head{i}/widen/conv")
        entries += batch_norm(f"exit_heads.{i - 1}.norm", f"head{i}/widen/norm")
        entries += linear(f"exit_heads.{i - 1}.fc", f"head{i}/pooled/classifier", bias=True)
        if model.adapt_features:
            entries += linear(f"adaptation_layer{i}", f"head{i}/pooled/adaptation", bias=True)
    return [*entries, *linear("_fc", f"head{last}/classifier", bias=True)]


def _block(name: str, path: str, widens: bool) -> list[Entry]:
    entries = []
    if widens:
        entries += conv(f"{name}._expand_conv", f"{path}/expand/conv")
        entries += batch_norm(f"{name}._bn0", f"{path}/expand/norm")
    return [
        *entries,
        *conv(f"{name}._depthwise_conv", f"{path}/depthwise/conv"),
        *batch_norm(f"{name}._bn1", f"{path}/depthwise/norm"),
        *conv(f"{name}._project_conv", f"{path}/project/conv"),
        *batch_norm(f"{name}._bn2", f"{path}/project/norm"),
    ]


FAMILY = Family(
    efficientnet_entries,
    head_prefixes=("exit_heads", "adaptation_layer", "_fc", "fc"),
    image_shape=(224, 224, 3),
)
