"""Published names of the vision transformer: those of PyTorch Image Models (timm)."""

from __future__ import annotations

from dfs_jax.interop.entries import VECTOR, Entry, Family, Layout, conv, linear
from dfs_jax.models.vit import ViT

_UNCHANGED = Layout((0, 1, 2))  # one, tokens, width


def vit_entries(model: ViT) -> list[Entry]:
    """Lists the tensors of a ViT: embedding, encoder layers, the last classifier, the early ones.

    All except the early classifiers (`exit_norms`, `exit_heads` and adaptation layers, which are
    not published) have the names of timm's `vit_*_patch*`, whose checkpoints can initialise a
    trunk. A position embedding for images of another size is refused like any tensor of another
    shape, not interpolated.
    """
    last = model.num_exits
    entries = [
        Entry(("cls_token",), ("params", "block1", "embedding", "class_token"), _UNCHANGED),
        Entry(("pos_embed",), ("params", "block1", "embedding", "position"), _UNCHANGED),
        *conv("patch_embed.proj", "block1/embedding/patches", bias=True),
    ]
    for i in range(last):
        for label in model.layers_of_block(i):
            entries += _encoder_layer(f"blocks.{label - 1}", f"block{i + 1}/layer{label}")
    entries += _head("norm", "head", f"head{last}")
    for i in range(1, last):
        entries += _head(f"exit_norms.{i - 1}", f"exit_heads.{i - 1}", f"head{i}")
    if model.adapt_features:
        for i in range(1, last):
            entries += linear(f"adaptation_layer{i}", f"head{i}/adaptation", bias=True)
    return entries


def _encoder_layer(name: str, path: str) -> list[Entry]:
    return [
        *_layer_norm(f"{name}.norm1", f"{path}/norm1"),
        *linear(f"{name}.attn.qkv", f"{path}/attention/qkv", bias=True),
        *linear(f"{name}.attn.proj", f"{path}/attention/output", bias=True),
        *_layer_norm(f"{name}.norm2", f"{path}/norm2"),
        *linear(f"{name}.mlp.fc1", f"{path}/mlp1", bias=True),
        *linear(f"{name}.mlp.fc2", f"{path}/mlp2", bias=True),
    ]


def _head(norm: str, classifier: str, path: str) -> list[Entry]:
    return [
        *_layer_norm(norm, f"{path}/norm"),
        *linear(classifier, f"{path}/classifier", bias=True),
    ]


def _layer_norm(name: str, path: str) -> list[Entry]:
    return [
        Entry((f"{name}.{theirs}",), ("params", *path.split("/"), ours), VECTOR)
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ]


FAMILY = Family(
    vit_entries,
    head_prefixes=("norm", "fc", "head", "exit_", "adaptation_layer"),
    image_shape=(224, 224, 3),
)
