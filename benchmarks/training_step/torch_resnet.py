"""ResNet in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training_step.torch_exits import Conv1x1, Conv3x3, TorchNetwork
from dfs_jax.forks import Fork
from dfs_jax.models.resnet import EXPANSION, ResNet
from dfs_jax.types import UserError


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
    """See `dfs_jax.models.resnet.ResNet`; only the stem for small images."""

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
