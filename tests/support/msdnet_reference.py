"""A small MSDNet, and MSDNet again, slow and plain, to test the fast one against."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables

CLASSES = 7
# 2 + 2 + 2 + 2 layers; scales are dropped after layer 4, at a block's end, and 7, within a block.
SMALL = {
    "num_exits": 4,
    "base": 2,
    "initial_channels": 3,
    "growth": 2,
    "head_channels": 5,
    "head_dropout": 0.0,
}


def small(**options):
    return create_model("msdnet", num_classes=CLASSES, **{**SMALL, **options})


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_like(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([normal((seed, i), leaf.shape) for i, leaf in enumerate(leaves)])


def variable_shapes(model, image_shape):
    return jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))


class Count:
    """Parameters and operations, layer by layer: a slow reference that knows nothing of the plan.

    `literature` counts a multiply-add once, a linear's bias, ReLUs, and k * k for each pooled one.
    """

    def __init__(self):
        self.params = self.macs = self.literature = 0

    def conv(self, kernel, inputs, outputs, side, *, bias=False):
        """A convolution to a map of side x side, BatchNorm and ReLU."""
        self.params += kernel**2 * inputs * outputs + 2 * outputs + bias * outputs
        self.macs += kernel**2 * inputs * outputs * side**2
        self.literature += kernel**2 * inputs * outputs * side**2 + outputs * side**2

    def bottleneck(self, factor, inputs, outputs, side_in, side_out):
        hidden = min(inputs, factor * outputs)
        self.conv(1, inputs, hidden, side_in)
        self.conv(3, hidden, outputs, side_out)

    def head(self, inputs, width, classes, side):
        half = math.ceil(side / 2)
        quarter = math.ceil(half / 2)
        self.conv(3, inputs, width, half)
        self.conv(3, width, width, quarter)
        self.params += width * classes + classes
        self.macs += width * classes
        self.literature += 4 * width * (quarter // 2) ** 2 + width * classes + classes


def counts_by_hand(model, classes, size):
    """Parameters, MACs and literature's operations, a list of cumulative counts at the exits each.

    Walks through the network as the paper describes it.
    """
    f, b, scales = model.scale_factors, model.bottleneck_factors, len(model.scale_factors)
    sizes = [model.base]
    for k in range(2, model.num_exits + 1):
        sizes.append(model.step if model.step_mode == "even" else model.step * (k - 1) + 1)
    layers, total, found = sum(sizes), Count(), []
    if model.stem == "imagenet":  # even sides
        total.conv(7, 3, model.initial_channels * f[0], size // 2, bias=True)
        size //= 4
        total.literature += 9 * model.initial_channels * f[0] * size**2
    else:
        total.conv(3, 3, model.initial_channels * f[0], size)
    sides = [size // 2**s for s in range(scales)]
    channels = [model.initial_channels * factor for factor in f]
    for s in range(1, scales):
        total.conv(3, channels[s - 1], channels[s], sides[s])
    width, kept, n = model.initial_channels, scales, 0
    for block_size in sizes:
        for _ in range(block_size):
            n, before = n + 1, kept
            if model.prune == "max":
                kept = scales - (n - 1) // math.ceil(layers / scales)
            else:
                kept = min(scales, layers - n + 1)
            for s in range(scales - kept, scales):
                if s == scales - before:
                    total.bottleneck(b[s], channels[s], model.growth * f[s], sides[s], sides[s])
                else:
                    half = model.growth * f[s] // 2
                    total.bottleneck(b[s - 1], channels[s - 1], half, sides[s - 1], sides[s])
                    total.bottleneck(b[s], channels[s], half, sides[s], sides[s])
            width += model.growth
            drops = kept < before
            thirds = n in (layers // 3, 2 * layers // 3)
            if drops if model.prune == "max" else thirds:
                narrow = int(model.reduction * width)
                for s in range(scales - kept, scales):
                    total.conv(1, width * f[s], narrow * f[s], sides[s])
                width = narrow
            channels = [width * factor for factor in f]
        total.head(channels[-1], model.head_channels or channels[-1], classes, sides[-1])
        found.append((total.params, total.macs, total.literature))
    return [list(counts) for counts in zip(*found, strict=True)]


def reference_logits(weights, images, views):
    """Every exit's logits, from `weights` by published names; `views(i, x)` forks naively."""

    def has(name):
        return any(key.startswith(f"{name}.") for key in weights)

    def children(name):
        return [f"{name}.{i}" for i in itertools.takewhile(lambda i: has(f"{name}.{i}"), range(99))]

    def conv_norm(net, x, stride=1, first=0):
        kernel = weights[f"{net}.{first}.weight"]
        pads = [(kernel.shape[-1] // 2,) * 2] * 2
        x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads)
        x = x + weights.get(f"{net}.{first}.bias", np.zeros(kernel.shape[0]))[:, None, None]
        x = x - x.mean((0, 2, 3), keepdims=True)
        x = x / jnp.sqrt((x**2).mean((0, 2, 3), keepdims=True) + 1e-5)
        scale, bias = (weights[f"{net}.{first + 1}.{part}"] for part in ("weight", "bias"))
        return jnp.maximum(x * scale[:, None, None] + bias[:, None, None], 0)

    def bottleneck(name, x, stride):
        return conv_norm(f"{name}.net", conv_norm(f"{name}.net", x), stride, first=3)

    def first_layer(name):
        scales, x = [], images
        for s, layer in enumerate(children(f"{name}.layers")):
            if has(f"{layer}.net"):
                x = conv_norm(f"{layer}.net", x, 2 if s else 1)
            else:
                pads = ((0, 0), (0, 0), (1, 1), (1, 1))
                x = conv_norm(layer, x, 2)
                x = jax.lax.reduce_window(
                    x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), pads
                )
            scales.append(x)
        return scales

    def layer(name, scales):
        kept = children(f"{name}.layers")
        for j, at in enumerate(kept, start=len(scales) - len(kept)):
            down = (
                [bottleneck(f"{at}.conv_down", scales[j - 1], 2)] if has(f"{at}.conv_down") else []
            )
            same = bottleneck(f"{at}.conv_normal", scales[j], 1)
            yield jnp.concatenate([scales[j], *down, same], axis=1)

    def head(name, x):
        x = conv_norm(f"{name}.m.1.net", conv_norm(f"{name}.m.0.net", x, 2), 2).mean((2, 3))
        return x @ weights[f"{name}.linear.1.weight"].T + weights[f"{name}.linear.1.bias"]

    scales, logits = None, []
    for i, block in enumerate(children("blocks")):
        for name in children(block):
            if scales is None:
                scales = first_layer(name)
            elif has(f"{name}.m"):
                scales = [conv_norm(f"{name}.m.{j}.net", x) for j, x in enumerate(scales)]
            else:
                scales = list(layer(name, scales))
        to_head, scales[-1] = views(i, scales[-1])
        logits.append(head(f"classifier.{i}", to_head))
    return jnp.stack(logits)


def naive_views(betas, referencing):
    """Channel masks and stop_gradient; no fork at the last exit."""

    def views(i, x):
        if i == len(betas):
            return x, x
        shared = (np.arange(x.shape[1]) < round(betas[i] * x.shape[1]))[:, None, None]
        foreign = jnp.zeros_like(x) if referencing == "none" else jax.lax.stop_gradient(x)
        to_head = x if referencing == "trunk_only" else jnp.where(shared, foreign, x)
        return to_head, jnp.where(shared, x, foreign)

    return views
