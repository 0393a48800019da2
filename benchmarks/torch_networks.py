"""VGG, ResNet and MSDNet with exits, written plainly in PyTorch.

Features fork by `torch.cat` and `detach`, as one writes it in PyTorch. Tensors have the published
names, so that `dfs_jax.interop` translates a state_dict of theirs. Sizes come from our model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs_jax.forks import Fork
from dfs_jax.forks.plain import PlainFork
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.models.msdnet import MSDNet
from dfs_jax.models.msdnet_plan import Bottleneck, Layer, ScaleGrowth, Step
from dfs_jax.models.resnet import EXPANSION, ResNet
from dfs_jax.models.vgg import VGG
from dfs_jax.surgery import FeatureSurgery, partition_channels
from dfs_jax.types import UserError

Conv3x3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
Conv1x1 = functools.partial(nn.Conv2d, kernel_size=1, bias=False)


class TorchOutputs(NamedTuple):
    """What a network returns, shallow exit first.

    Attributes:
      logits: one `[batch, classes]` an exit.
      features: one `[batch, width]` an exit: adapted where it has an adaptation layer, else pooled.
    """

    logits: list[Tensor]
    features: list[Tensor]


class Surgery:
    """Splits a feature between its exit and the next block, by `cat` and `detach`."""

    def __init__(self, fork: Fork, num_exits: int):
        if not isinstance(fork, PlainFork | FeatureSurgery):
            raise UserError(f"the torch peer has no fork like {fork}: it takes plain and dfs")
        self._fork = fork
        self._num_exits = num_exits

    def __call__(self, x: Tensor, exit_index: int) -> tuple[Tensor, Tensor]:
        """Returns the exit's and the next block's view of `x` `[batch, channels, ...]`."""
        if isinstance(self._fork, PlainFork) or exit_index == self._num_exits - 1:
            return x, x
        k = partition_channels(x.shape[1], self._fork.ratio_at(exit_index, self._num_exits))
        shared, specific = x[:, :k], x[:, k:]
        foreign = torch.zeros_like if self._fork.referencing == "none" else torch.detach
        to_trunk = torch.cat([shared, foreign(specific)], dim=1)
        if self._fork.referencing == "trunk_only":
            return x, to_trunk
        return torch.cat([foreign(shared), specific], dim=1), to_trunk


class TorchNetwork(nn.Module):
    """Base of the networks: runs the exits one after the other; subclasses say what they are."""

    def __init__(self, model: MultiExitModel, fork: Fork):
        super().__init__()
        self.num_exits = model.num_exits
        self.surgery = Surgery(fork, model.num_exits)
        self.adapts = model.adapt_features

    def block(self, i: int, carry: Any) -> Any:
        """Runs block i on what the one before returned; block 0 on images."""
        raise NotImplementedError

    def head(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns exit i's logits and pooled feature."""
        raise NotImplementedError

    def feature(self, carry: Any) -> Tensor:
        """Returns the part of a block's output that is forked."""
        return carry

    def with_feature(self, carry: Any, x: Tensor) -> Any:
        """Returns a block's output with that part replaced."""
        del carry
        return x

    def add_adaptation_layers(self, widths: list[int]) -> None:
        """Gives early exits a linear layer to the last one's width, where the loss asks for it."""
        if self.adapts:
            for i, width in enumerate(widths[:-1], start=1):
                setattr(self, f"adaptation_layer{i}", nn.Linear(width, widths[-1]))

    def forward(self, images: Tensor) -> TorchOutputs:
        carry, outputs = images, TorchOutputs([], [])
        for i in range(self.num_exits):
            carry = self.block(i, carry)
            to_head, to_trunk = self.surgery(self.feature(carry), i)
            logits, pooled = self.head(i, to_head)
            if self.adapts and i < self.num_exits - 1:
                pooled = getattr(self, f"adaptation_layer{i + 1}")(pooled)
            outputs.logits.append(logits)
            outputs.features.append(pooled)
            carry = self.with_feature(carry, to_trunk)
        return outputs


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
        self.classifers = nn.ModuleList(  # spelt so where it was published
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
    """Renames weights as published: `_p` reads one half of the channels, `_s` the other."""
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


class ResidualBlock(nn.Module):
    """A basic or a bottleneck block, the stride on its first 3x3 convolution."""

    def __init__(self, inputs: int, features: int, stride: int, bottleneck: bool):
        super().__init__()
        outputs = features * (EXPANSION if bottleneck else 1)
        first = Conv3x3(inputs, features, stride=stride)
        convs = [first, Conv3x3(features, features)]
        if bottleneck:
            strided = Conv3x3(features, features, stride=stride)
            convs = [Conv1x1(inputs, features), strided, Conv1x1(features, outputs)]
        self.depth = len(convs)
        for k, conv in enumerate(convs, start=1):
            setattr(self, f"conv{k}", conv)
            setattr(self, f"bn{k}", nn.BatchNorm2d(conv.out_channels))
        if stride != 1 or inputs != outputs:
            shortcut = Conv1x1(inputs, outputs, stride=stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))
        else:
            self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for k in range(1, self.depth + 1):
            residual = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(residual))
            residual = F.relu(residual) if k < self.depth else residual
        return F.relu(residual + (x if self.downsample is None else self.downsample(x)))


class SeparableConv(nn.Module):
    """Two depthwise-pointwise pairs, the first strided, the second to `outputs` channels."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        layers: list[nn.Module] = []
        for features, stride in ((inputs, 2), (outputs, 1)):
            layers += [
                Conv3x3(inputs, inputs, stride=stride, groups=inputs),
                Conv1x1(inputs, features),
                nn.BatchNorm2d(features),
                nn.ReLU(),
            ]
        self.op = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class TorchResNet(TorchNetwork):
    """See `dfs_jax.models.resnet.ResNet`; the stem is the small images'."""

    def __init__(self, model: ResNet, fork: Fork):
        super().__init__(model, fork)
        if model.stem != "cifar":
            raise UserError("the torch peer's ResNet has the cifar stem only: set model.stem=cifar")
        inputs = model.width
        widths = [model.width * 2**i for i in range(model.num_exits)]
        self.conv1, self.bn1 = Conv3x3(3, inputs), nn.BatchNorm2d(inputs)
        factor = EXPANSION if model.bottleneck else 1
        for i, (features, size) in enumerate(zip(widths, model.stage_sizes, strict=True)):
            stage = []
            for j in range(size):
                stride = 2 if i and not j else 1
                stage.append(ResidualBlock(inputs, features, stride, model.bottleneck))
                inputs = factor * features
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
            self._add_head(i, inputs, model.num_classes)
        self.add_adaptation_layers([factor * widths[-1]] * self.num_exits)

    def _add_head(self, i: int, channels: int, num_classes: int) -> None:
        if i < self.num_exits - 1:
            gate = nn.Sequential(SeparableConv(channels, channels), nn.BatchNorm2d(channels))
            setattr(self, f"attention{i + 1}", gate)
            reductions = [
                SeparableConv(channels * 2**j, channels * 2 ** (j + 1))
                for j in range(self.num_exits - 1 - i)
            ]
            setattr(self, f"scala{i + 1}", nn.Sequential(*reductions))
            channels *= 2 ** len(reductions)
        setattr(self, f"fc{i + 1}", nn.Linear(channels, num_classes))

    def block(self, i: int, carry: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(carry))) if i == 0 else carry
        return getattr(self, f"layer{i + 1}")(x)

    def head(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        if i < self.num_exits - 1:
            mask = F.relu(getattr(self, f"attention{i + 1}")(x))
            mask = F.interpolate(mask, x.shape[2:], mode="bilinear", align_corners=False)
            x = getattr(self, f"scala{i + 1}")(x * torch.sigmoid(mask))
        pooled = x.mean((2, 3))
        return getattr(self, f"fc{i + 1}")(pooled), pooled


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
    """Makes the scales, each from the finer one."""

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
    """One scale of a layer: appends what it makes of the finer scale and of this one."""

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
    """Every kept scale grows."""

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
    """See `dfs_jax.models.msdnet.MSDNet`; the stem is the small images'."""

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


def build_network(model: MultiExitModel, fork: Fork) -> TorchNetwork:
    """Returns the PyTorch network of a model's family and sizes.

    Raises:
      UserError: no network here is like it.
    """
    families: dict[type, Callable[..., TorchNetwork]] = {
        VGG: TorchVGG,
        ResNet: TorchResNet,
        MSDNet: TorchMSDNet,
    }
    for family, network in families.items():
        if isinstance(model, family):
            return network(model, fork)
    known = ", ".join(family.__name__ for family in families)
    raise UserError(f"the torch peer has no {type(model).__name__}: only models of {known}")


def _bottleneck(inputs: int, plan: Bottleneck, stride: int) -> ConvNorm:
    narrow = Conv1x1(inputs, plan.hidden)
    return ConvNorm(narrow, Conv3x3(plan.hidden, plan.features, stride=stride))


def _step(step: Step, channels: list[int]) -> nn.Module:
    if isinstance(step, Layer):
        return MSDNetLayer(step, channels)
    return MSDNetTransition([(mix.channels, mix.features) for mix in step.scales])
