"""MSDNet in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training_step.torch_exits import Conv1x1, Conv3x3, TorchNetwork
from dfs_jax.forks import Fork
from dfs_jax.models.msdnet import MSDNet
from dfs_jax.models.msdnet_plan import Bottleneck, Layer, ScaleGrowth, Step
from dfs_jax.types import UserError


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, ReLU; or two of them in a row, as `net`."""

    def __init__(self, *convs: nn.Conv2d):
        super().__init__()
        layers: list[nn.Module] = []
        for conv in convs:
            layers += [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class MSDNetFirstLayer(nn.Module):
    """Creates the scales, each from the finer one."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        inputs, layers = 3, []
        for s, outputs in enumerate(channels):
            layers.append(ConvNorm(Conv3x3(inputs, outputs, stride=2 if s else 1)))
            inputs = outputs
        self.layers = nn.ModuleList(layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        scales = [images]
        for layer in self.layers:
            scales.append(layer(scales[-1]))
        return scales[1:]


class MSDNetScale(nn.Module):
    """One scale of a layer: appends features computed from the finer scale and from this one."""

    def __init__(self, growth: ScaleGrowth, finer_channels: int | None):
        super().__init__()
        self.conv_down = None
        if growth.down is not None and finer_channels is not None:
            self.conv_down = _bottleneck(finer_channels, growth.down, stride=2)
        self.conv_normal = _bottleneck(growth.channels, growth.same, stride=1)

    def forward(self, x: Tensor, finer: Tensor | None) -> Tensor:
        down = [] if self.conv_down is None else [self.conv_down(finer)]
        return torch.cat([x, *down, self.conv_normal(x)], dim=1)


class MSDNetLayer(nn.Module):
    """Adds features to every kept scale."""

    def __init__(self, layer: Layer, channels: list[int]):
        super().__init__()
        self.dropped = len(channels) - len(layer.scales)
        scales = []
        for j, growth in enumerate(layer.scales, start=self.dropped):
            scales.append(MSDNetScale(growth, channels[j - 1] if j else None))
        self.layers = nn.ModuleList(scales)

    def forward(self, scales: list[Tensor]) -> list[Tensor]:
        kept = enumerate(self.layers, start=self.dropped)
        return [layer(scales[j], scales[j - 1] if j else None) for j, layer in kept]


class MSDNetTransition(nn.Module):
    """A 1x1 convolution at every scale."""

    def __init__(self, widths: list[tuple[int, int]]):
        super().__init__()
        self.m = nn.ModuleList(ConvNorm(Conv1x1(*width)) for width in widths)

    def forward(self, scales: list[Tensor]) -> list[Tensor]:
        return [mix(x) for mix, x in zip(self.m, scales, strict=True)]


class MSDNetHead(nn.Module):
    """Two strided convolutions, average pool, dropout, linear."""

    def __init__(self, inputs: int, width: int, num_classes: int, dropout: float):
        super().__init__()
        self.m = nn.Sequential(
            ConvNorm(Conv3x3(inputs, width, stride=2)), ConvNorm(Conv3x3(width, width, stride=2))
        )
        self.linear = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.m(x).mean((2, 3))
        return self.linear(pooled), pooled


class TorchMSDNet(TorchNetwork):
    """See `dfs_jax.models.msdnet.MSDNet`; only the stem for small images."""

    def __init__(self, model: MSDNet, fork: Fork):
        super().__init__(model, fork)
        if model.stem != "cifar":
            raise UserError("the torch peer's MSDNet has the cifar stem only: set model.stem=cifar")
        channels, blocks, heads, widths = [], [], [], []
        for plan in model.plan:
            modules: list[nn.Module] = []
            if plan.first:
                modules.append(MSDNetFirstLayer(plan.first))
                channels = list(plan.first)
            for step in plan.steps:
                modules.append(_step(step, channels))
                channels = [scale.features for scale in step.scales]
            blocks.append(nn.Sequential(*modules))
            widths.append(model.head_channels or plan.features)
            head = MSDNetHead(plan.features, widths[-1], model.num_classes, model.head_dropout)
            heads.append(head)
        self.blocks, self.classifier = nn.ModuleList(blocks), nn.ModuleList(heads)
        self.add_adaptation_layers(widths)

    def block(self, i: int, carry: Any) -> list[Tensor]:
        return self.blocks[i](carry)

    def head(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.classifier[i](x)

    def feature(self, carry: list[Tensor]) -> Tensor:
        return carry[-1]

    def with_feature(self, carry: list[Tensor], x: Tensor) -> list[Tensor]:
        return [*carry[:-1], x]


def _bottleneck(inputs: int, plan: Bottleneck, stride: int) -> ConvNorm:
    narrow = Conv1x1(inputs, plan.hidden)
    return ConvNorm(narrow, Conv3x3(plan.hidden, plan.features, stride=stride))


def _step(step: Step, channels: list[int]) -> nn.Module:
    if isinstance(step, Layer):
        return MSDNetLayer(step, channels)
    return MSDNetTransition([(mix.channels, mix.features) for mix in step.scales])
