"""VGG in PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training_step.torch_exits import Conv3x3, TorchNetwork
from dfs_jax.forks import Fork
from dfs_jax.models.vgg import VGG
from dfs_jax.surgery import partition_channels


class VGGBlock(nn.Module):
    """Convolution, ReLU, BatchNorm."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = Conv3x3(inputs, outputs)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.relu(self.conv(x)))


class VGGHead(nn.Module):
    """Global average pool, linear without bias."""

    def __init__(self, inputs: int, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(inputs, num_classes, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = x.mean((2, 3))
        return self.fc(pooled), pooled


class TorchVGG(TorchNetwork):
    """See `dfs_jax.models.vgg.VGG`."""

    def __init__(self, model: VGG, fork: Fork):
        super().__init__(model, fork)
        sizes = zip(model.stage_sizes, model.stage_multipliers, strict=True)
        widths = [multiplier * model.width for size, multiplier in sizes for _ in range(size)]
        self.ends = {sum(model.stage_sizes[: s + 1]) - 1 for s in range(len(model.stage_sizes))}
        stem = nn.Conv2d(3, widths[0], 3, padding=1)
        blocks: list[nn.Module] = [nn.Sequential(stem, nn.ReLU(), nn.BatchNorm2d(widths[0]))]
        blocks += [VGGBlock(*pair) for pair in itertools.pairwise(widths)]
        self.feature_extractors = nn.ModuleList(blocks)
        self.classifers = nn.ModuleList(  # spelt as published
            VGGHead(width, model.num_classes) for width in widths
        )
        self.add_adaptation_layers(widths)
        self.register_state_dict_post_hook(_cut_in_halves)
        self.register_load_state_dict_pre_hook(_join_halves)

    def block(self, i: int, carry: Tensor) -> Tensor:
        x = self.feature_extractors[i](carry)
        return F.max_pool2d(x, 2) if i in self.ends else x

    def head(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.classifers[i](x)


def _cut_in_halves(module: nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
    """Renames weights as published: `_p` for one half of the channels, `_s` for the other."""
    for name in [name for name in state_dict if name.endswith((".conv.weight", ".fc.weight"))]:
        weight, layer = state_dict.pop(name), name.removesuffix(".weight")
        cut = partition_channels(weight.shape[1], 0.5)
        state_dict[f"{layer}_p.weight"] = weight[:, :cut]
        state_dict[f"{layer}_s.weight"] = weight[:, cut:]


def _join_halves(module: nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
    for name in [name for name in state_dict if name.endswith("_p.weight")]:
        layer = name.removesuffix("_p.weight")
        halves = [state_dict.pop(f"{layer}_{half}.weight") for half in "ps"]
        state_dict[f"{layer}.weight"] = torch.cat(halves, dim=1)
