"""ResNet computes what others do: the network written again, golden files, PyTorch's networks."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dfs_jax.forks import create_fork
from dfs_jax.interop import (
    from_torch_state_dict,
    load_trunk,
    to_torch_gradients,
    to_torch_state_dict,
)
from dfs_jax.interop.golden import compare, compute, read_golden
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.models.resnet import ResNet


def variable_shapes(model, image_shape):
    return jax.eval_shape(lambda key: init_variables(model, key, image_shape), jax.random.key(0))


# The same network written again, on published names and in NCHW


def conv(x, kernel, stride=1, groups=1):
    pad = kernel.shape[-1] // 2
    numbers = ("NCHW", "OIHW", "NCHW")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, (1, 1), (1, 1), numbers, groups
    )


def norm(weights, name, x):
    """BatchNorm in training mode."""
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    scale, bias = (weights[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


def upsampling(n):
    """The matrix that doubles n values bilinearly with half-pixel centres."""
    matrix = np.zeros((2 * n, n))
    for i in range(2 * n):
        centre = min(max((i + 0.5) / 2 - 0.5, 0), n - 1)
        low = int(centre)
        matrix[i, low] += low + 1 - centre
        matrix[i, min(low + 1, n - 1)] += centre - low
    return matrix


def upsampled(x):
    rows, columns = upsampling(x.shape[2]), upsampling(x.shape[3])
    return jnp.einsum("ph,qw,nchw->ncpq", rows, columns, x)


def reference_block(weights, name, x, stride):
    kernels = [k for k in ("conv1", "conv2", "conv3") if f"{name}.{k}.weight" in weights]
    strided = len(kernels) - 2  # the first of two, the second of three
    y = x
    for j, kernel in enumerate(kernels):
        y = conv(y, weights[f"{name}.{kernel}.weight"], stride if j == strided else 1)
        y = norm(weights, f"{name}.bn{j + 1}", y)
        y = jax.nn.relu(y) if j < len(kernels) - 1 else y
    if f"{name}.downsample.0.weight" in weights:
        x = conv(x, weights[f"{name}.downsample.0.weight"], stride)
        x = norm(weights, f"{name}.downsample.1", x)
    return jax.nn.relu(x + y)


def reference_separable(weights, name, x):
    for j, stride in ((0, 2), (4, 1)):
        x = conv(x, weights[f"{name}.op.{j}.weight"], stride, groups=x.shape[1])
        x = conv(x, weights[f"{name}.op.{j + 1}.weight"])
        x = jax.nn.relu(norm(weights, f"{name}.op.{j + 2}", x))
    return x


def reference_head(weights, i, x, exits):
    if i < exits:
        mask = reference_separable(weights, f"attention{i}.0", x)
        mask = jax.nn.relu(norm(weights, f"attention{i}.1", mask))
        x = x / (1 + jnp.exp(-upsampled(mask)))
        for j in range(exits - i):
            x = reference_separable(weights, f"scala{i}.{j}", x)
    x = x.mean((2, 3))
    logits = x @ weights[f"fc{i}.weight"].T + weights[f"fc{i}.bias"]
    if i < exits:
        x = x @ weights[f"adaptation_layer{i}.weight"].T + weights[f"adaptation_layer{i}.bias"]
    return logits, x


def reference_outputs(weights, images, masks, blocks):
    """Logits and features of each exit, shallow first.

    `masks` holds for each early exit, and its head and the next block, two vectors over channels:
    which pass their gradient, and which of the others are still seen.
    """

    def seen_by(x, live, seen):
        live, seen = live[:, None, None], seen[:, None, None]
        return live * x + (1 - live) * seen * lax.stop_gradient(x)

    x = jax.nn.relu(norm(weights, "bn1", conv(images, weights["conv1.weight"])))
    outputs, exits = [], len(blocks)
    for i in range(1, exits + 1):
        for j in range(blocks[i - 1]):
            stride = 2 if i > 1 and j == 0 else 1
            x = reference_block(weights, f"layer{i}.{j}", x, stride)
        to_head, to_trunk = x, x
        if i < exits:
            head, trunk = masks[i - 1]
            to_head, to_trunk = seen_by(x, *head), seen_by(x, *trunk)
        outputs.append(reference_head(weights, i, to_head, exits))
        x = to_trunk
    return outputs


def reference_losses(outputs, labels):
    """Deep supervision's and BYOT's total."""
    (teacher, teacher_feature), *early = [map(lax.stop_gradient, outputs[-1]), *outputs[:-1]]
    soft = jnp.exp(teacher / 3) / jnp.exp(teacher / 3).sum(1, keepdims=True)
    entropies, byot = [], 0.0
    for logits, _ in outputs:
        chosen = logits[jnp.arange(len(labels)), labels]
        entropies.append((jnp.log(jnp.exp(logits).sum(1)) - chosen).mean())
    for entropy, (logits, feature) in zip(entropies[:-1], early, strict=True):
        log_student = logits / 3 - jnp.log(jnp.exp(logits / 3).sum(1, keepdims=True))
        byot += 0.7 * entropy - 0.3 * (soft * log_student).sum(1).mean()
        byot += 0.03 * jnp.sqrt(((feature - teacher_feature) ** 2).sum())
    return jnp.stack([sum(entropies), byot + entropies[-1]])


def hand_made_masks(channels, betas, referencing):
    masks = []
    for c, beta in zip(channels, betas, strict=True):
        shared = (np.arange(c) < round(beta * c)).astype(np.float64)
        seen = np.full(c, float(referencing != "none"))
        head = np.ones(c) if referencing == "trunk_only" else 1 - shared
        masks.append([(head, seen), (shared, seen)])
    return masks


# Options of a small model, its features' channels, and the sides of its images.
SMALL = {
    "basic": ({"width": 3, "stage_sizes": (1, 1, 1)}, (3, 6), (16, 24)),
    "bottleneck": ({"width": 2, "stage_sizes": (2, 1, 1), "bottleneck": True}, (8, 16), (8, 16)),
    "four stages": ({"width": 3, "stage_sizes": (1, 2, 1, 1)}, (3, 6, 12), (16, 24)),
}
VARIANTS = [
    pytest.param("basic", (0.3,), "symmetric", marks=pytest.mark.slow),
    ("basic", (1.0, 0.0), "trunk_only"),
    pytest.param("bottleneck", (0.0, 0.4), "symmetric", marks=pytest.mark.slow),
    pytest.param("bottleneck", (0.7,), "none", marks=pytest.mark.slow),
    pytest.param("four stages", (0.5, 0.2, 0.9), "symmetric", marks=pytest.mark.slow),
    pytest.param("four stages", (1.0, 0.6, 0.0), "none", marks=pytest.mark.slow),
    pytest.param("four stages", (0.3,), "trunk_only", marks=pytest.mark.slow),
]
LABELS = np.asarray([2, 6, 2, 0, 5])


class Case(NamedTuple):
    """A small network with random weights, and the compiled reference."""

    model: ResNet
    weights: dict[str, np.ndarray]
    images: np.ndarray
    channels: tuple[int, ...]
    reference: object


@pytest.fixture(scope="module")
def cases():
    return functools.cache(make_case)


def make_case(name):
    options, channels, sides = SMALL[name]
    model = ResNet(num_classes=7, adapt_features=True, **options)
    shapes = variable_shapes(model, (16, 16, 3))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.uniform(-0.5, 1, leaf.shape), shapes)
    weights = {
        name: x
        for name, x in to_torch_state_dict(model, variables).items()
        if "running" not in name and "batches" not in name
    }
    images = rng.normal(size=(5, 3, *sides))

    def both(weights, masks, images):
        outputs, pullback = jax.vjp(
            lambda w: reference_outputs(w, images, masks, options["stage_sizes"]), weights
        )
        losses, into_losses = jax.vjp(lambda o: reference_losses(o, LABELS), outputs)
        gradients = lax.map(lambda seed: pullback(into_losses(seed)[0])[0], jnp.eye(2))
        return jnp.stack([logits for logits, _ in outputs]), losses, gradients

    return Case(model, weights, images, channels, jax.jit(both))


@pytest.mark.parametrize(("name", "betas", "referencing"), VARIANTS)
def test_values_and_gradients_of_the_network_written_again(cases, name, betas, referencing):
    case = cases(name)
    fork = create_fork("dfs", partition_ratio=betas, referencing=referencing)
    losses = [create_loss("deep_supervision"), create_loss("byot")]
    masks = hand_made_masks(case.channels, np.broadcast_to(betas, len(case.channels)), referencing)

    @jax.jit
    def ours(variables, images):
        def apply(params):
            return case.model.apply(
                {**variables, "params": params}, images, fork, train=True, mutable=["batch_stats"]
            )[0]

        outputs, pullback = jax.vjp(apply, variables["params"])
        totals, into_losses = jax.vjp(
            lambda o: jnp.stack([loss(o, LABELS).sum() for loss in losses]), outputs
        )
        gradients = lax.map(lambda seed: pullback(into_losses(seed)[0])[0], jnp.eye(2))
        return outputs.logits, totals, gradients

    with jax.enable_x64(True):
        variables = with_statistics(case)
        logits, totals, gradients = jax.device_get(
            ours(variables, case.images.transpose(0, 2, 3, 1))
        )
        expected = jax.device_get(case.reference(case.weights, masks, case.images))
    np.testing.assert_allclose(logits, expected[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(totals, expected[1], rtol=1e-9)
    for i in range(2):
        found = to_torch_gradients(case.model, jax.tree.map(lambda g, i=i: g[i], gradients))
        assert found.keys() == expected[2].keys()
        for key, gradient in found.items():
            reference = expected[2][key][i]
            np.testing.assert_allclose(gradient, reference, rtol=1e-7, atol=1e-9, err_msg=key)
            assert gradient.any() == reference.any(), key  # zeros are exact


def with_statistics(case):
    """The case's weights as our variables; running statistics do not matter in training mode."""
    statistics = {}
    for name, weight in case.weights.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and weight.ndim == 1:
            statistics[f"{module}.running_mean"] = np.zeros_like(weight)
            statistics[f"{module}.running_var"] = np.ones_like(weight)
    return from_torch_state_dict(case.model, case.weights | statistics)


# Golden files


@pytest.mark.slow
@pytest.mark.parametrize("case", ["resnet18_deep_supervision", "resnet18_dfs_beta0.5"])
def test_published_numbers(shared_dir, case):
    golden = read_golden(shared_dir / "golden" / f"{case}.json.gz")
    with jax.enable_x64(True):
        comparison = compare(golden, compute(golden, golden.create_model()))
    assert max(comparison.differences.values()) < 1e-9
    assert comparison.zeros == (6 if "dfs" in case else 0)
    assert not comparison.nonzero


# Other programs' networks

# Blocks of each stage, and whether they are bottlenecks.
BLOCKS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


def torch_resnet(blocks, bottleneck):
    """He et al.'s ImageNet network under torchvision's names, in plain PyTorch."""
    from torch import nn

    def norm_after(conv):
        return conv, nn.BatchNorm2d(conv.out_channels)

    class Block(nn.Module):
        def __init__(self, c_in, c, stride):
            super().__init__()
            c_out = 4 * c if bottleneck else c
            sizes = [(c_in, c, 1), (c, c, 3), (c, c_out, 1)]
            sizes = sizes if bottleneck else [(c_in, c, 3), (c, c, 3)]
            strides = [1, stride, 1] if bottleneck else [stride, 1]
            for j, ((a, b, k), s) in enumerate(zip(sizes, strides, strict=True), start=1):
                conv, norm = norm_after(nn.Conv2d(a, b, k, s, k // 2, bias=False))
                setattr(self, f"conv{j}", conv)
                setattr(self, f"bn{j}", norm)
            self.last = len(sizes)
            self.downsample = None
            if stride != 1 or c_in != c_out:
                self.downsample = nn.Sequential(
                    *norm_after(nn.Conv2d(c_in, c_out, 1, stride, bias=False))
                )

        def forward(self, x):
            y = x
            for j in range(1, self.last + 1):
                y = getattr(self, f"bn{j}")(getattr(self, f"conv{j}")(y))
                y = y.relu() if j < self.last else y
            return (y + (x if self.downsample is None else self.downsample(x))).relu()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = norm_after(nn.Conv2d(3, 64, 7, 2, 3, bias=False))
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            c_in = 64
            for s, size in enumerate(blocks):
                stage, c = [], 64 * 2**s
                for j in range(size):
                    stage.append(Block(c_in, c, 2 if s and not j else 1))
                    c_in = 4 * c if bottleneck else c
                setattr(self, f"layer{s + 1}", nn.Sequential(*stage))
            self.fc = nn.Linear(c_in, 11)

        def forward(self, x):
            x = self.maxpool(self.bn1(self.conv1(x)).relu())
            for s in range(len(blocks)):
                x = getattr(self, f"layer{s + 1}")(x)
            return self.fc(x.mean((2, 3)))

    return Network()


def torchvision_resnet(name):
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    return getattr(models, name)(num_classes=11)


def check_single_exit(name, network, path):
    """Our trunk and last classifier compute what `network`, with random weights, does."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for key, x in network.state_dict().items():
        if key.endswith("running_var") or ("bn" in key and key.endswith("weight")):
            x.uniform_(0.5, 1.5, generator=generator)
        elif key.endswith(("running_mean", "bias")):
            x.normal_(0, 0.1, generator=generator)
    torch.save(network.state_dict(), path)
    model = create_model(name, num_classes=11, stem="imagenet")
    blank = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), variable_shapes(model, (64, 96, 3))
    )
    variables = load_trunk(path, model, blank)
    weight, bias = (x.detach().numpy() for x in network.fc.parameters())
    variables["params"]["head4"]["classifier"] = {"kernel": weight.T, "bias": bias}
    images = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)
    ours = jax.jit(lambda v, x: model.apply(v, x).logits[-1])(variables, images)
    with torch.no_grad():
        theirs = network.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_single_exit_network_equals_pytorchs(name, tmp_path):
    pytest.importorskip("torch")
    check_single_exit(name, torch_resnet(*BLOCKS[name]), tmp_path / "weights.pth")


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_single_exit_network_equals_torchvisions(name, tmp_path):
    check_single_exit(name, torchvision_resnet(name), tmp_path / "weights.pth")
