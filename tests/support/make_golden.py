"""Writes tests/fixtures/*.json.gz: golden numbers of narrow VGGs, by plain NumPy in float64.

An independent, slow and obvious implementation: channels first, a convolution as a sum over its
nine taps, every derivative written by hand. It shares no code with the package that it tests.

    python tests/support/make_golden.py
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parents[1] / "fixtures"
WIDTH, MULTIPLIERS, POOLED = 5, (1, 1, 2, 2, 4, 4), (1, 3, 5)
BATCH, SIDE, CLASSES, LABELS = 3, 8, 7, [2, 5, 2]
EPSILON, MOMENTUM = 1e-5, 0.1
KD_WEIGHT, TEMPERATURE, FD_WEIGHT = 0.3, 3.0, 0.03

# case: (partition, reference, exit_gradient, beta, adaptation layers, losses)
CASES = {
    "vgg7_narrow_plain": (False, False, "full", 0.5, False, ("deep_supervision",)),
    "vgg7_narrow_dfs": (True, True, "exclusive", 0.3, True, ("deep_supervision", "byot")),
    "vgg7_narrow_trunk_only": (True, True, "full", 0.5, False, ("deep_supervision",)),
    "vgg7_narrow_partition_only": (True, False, "exclusive", 0.5, False, ("deep_supervision",)),
}


def main() -> None:
    FIXTURES.mkdir(exist_ok=True)
    for case in CASES:
        text = json.dumps(golden(case), separators=(",", ":"))
        (FIXTURES / f"{case}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def golden(case: str) -> dict:
    """Computes one golden file."""
    partition, reference, exit_gradient, beta, adapts, losses = CASES[case]
    shapes = tensor_shapes(beta, adapts)
    weights = {name: draw(name, shape) for name, shape in shapes}
    rng = np.random.Generator(np.random.PCG64(1234))
    images = rng.standard_normal((BATCH, 3, SIDE, SIDE))
    network = Network(weights, view_masks(partition, reference, exit_gradient, beta), adapts)
    eval_logits, _ = network.forward(images, train=False)
    train_logits, features = network.forward(images, train=True)
    results = {}
    for name in losses:
        loss, d_logits, d_features = LOSSES[name](train_logits, features)
        grads = network.backward(d_logits, d_features)
        parameters = [n for n, _ in shapes if "running" not in n and "num_batches" not in n]
        results[name] = {"loss": loss, "grads": {n: digest(grads[n], True) for n in parameters}}
    return {
        "case": case,
        "model": "vgg7",
        "options": {"width": WIDTH},
        "partition": partition,
        "reference": reference,
        "beta": beta,
        "exit_gradient": exit_gradient,
        "batch": BATCH,
        "image_size": SIDE,
        "num_classes": CLASSES,
        "labels": LABELS,
        "state_dict": shapes,
        "eval_logits": rounded(eval_logits),
        "train_logits": rounded(train_logits),
        "batch_stats_after": {n: digest(x, False) for n, x in network.running.items()},
        "losses": results,
    }


def tensor_shapes(beta: float, adapts: bool) -> list[tuple[str, list[int]]]:
    shapes, before = [], 3
    for i, multiplier in enumerate(MULTIPLIERS):
        name, width = f"feature_extractors.{i}", multiplier * WIDTH
        shared = round(beta * before)
        if i == 0:
            shapes += [(f"{name}.0.weight", [width, 3, 3, 3]), (f"{name}.0.bias", [width])]
        else:
            shapes += [(f"{name}.conv_p.weight", [width, shared, 3, 3])]
            shapes += [(f"{name}.conv_s.weight", [width, before - shared, 3, 3])]
        norm = norm_name(i)
        vectors = ("weight", "bias", "running_mean", "running_var")
        shapes += [(f"{norm}.{vector}", [width]) for vector in vectors]
        shapes += [(f"{norm}.num_batches_tracked", [])]
        before = width
    for i, multiplier in enumerate(MULTIPLIERS):
        width = multiplier * WIDTH
        shared = round(beta * width)
        shapes += [(f"classifers.{i}.fc_s.weight", [CLASSES, width - shared])]
        shapes += [(f"classifers.{i}.fc_p.weight", [CLASSES, shared])]
    if adapts:
        last = MULTIPLIERS[-1] * WIDTH
        for i, multiplier in enumerate(MULTIPLIERS[:-1]):
            shapes += [(f"adaptation_layer{i + 1}.weight", [last, multiplier * WIDTH])]
            shapes += [(f"adaptation_layer{i + 1}.bias", [last])]
    return shapes


def norm_name(i: int) -> str:
    return f"feature_extractors.{i}.{'bn' if i else '2'}"


def draw(name: str, shape: list[int]) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape)
    if name.endswith("running_var"):
        return 0.5 + rng.random(shape)
    if name.endswith("running_mean"):
        return 0.1 * rng.standard_normal(shape)
    if len(shape) > 1:
        return rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    return name.endswith("weight") + 0.1 * rng.standard_normal(shape)


def view_masks(partition: bool, reference: bool, exit_gradient: str, beta: float) -> list[dict]:
    """For each exit: which channels its head and the next block see, and which they train."""
    masks = []
    for i, multiplier in enumerate(MULTIPLIERS):
        channels = multiplier * WIDTH
        shared = np.arange(channels) < round(beta * channels)
        every = np.ones(channels, bool)
        mask = {"head sees": every, "head trains": every}
        mask |= {"trunk sees": every, "trunk trains": every}
        if partition and i < len(MULTIPLIERS) - 1:
            mask["trunk trains"] = shared
            if not reference:
                mask |= {"trunk sees": shared, "head sees": ~shared, "head trains": ~shared}
            elif exit_gradient == "exclusive":
                mask["head trains"] = ~shared
        masks.append({key: value[:, None, None] for key, value in mask.items()})
    return masks


class Network:
    """VGG7, channels first; `forward` remembers what `backward` needs."""

    def __init__(self, weights: dict, masks: list[dict], adapts: bool):
        self.weights, self.masks, self.adapts = weights, masks, adapts
        self.running: dict[str, np.ndarray] = {}
        self.memory: list[dict] = []

    def forward(self, x: np.ndarray, train: bool) -> tuple[list, list]:
        """Returns the exits' logits and the features that distillation compares."""
        self.memory, logits, features = [], [], []
        for i, mask in enumerate(self.masks):
            bias = self.weights["feature_extractors.0.0.bias"] if i == 0 else 0.0
            before = convolve(x, self.conv_weight(i)) + np.reshape(bias, (1, -1, 1, 1))
            active = np.maximum(before, 0)
            normal, spread = self.normalise(i, active, train)
            scale, shift = (self.weights[f"{norm_name(i)}.{v}"] for v in ("weight", "bias"))
            out = scale[:, None, None] * normal + shift[:, None, None]
            pooled_map, winners = max_pool(out) if i in POOLED else (out, None)
            pooled = (pooled_map * mask["head sees"]).mean((2, 3))
            logits.append(pooled @ self.head_weight(i).T)
            adapts = self.adapts and i < len(self.masks) - 1
            features.append(self.adapted(i, pooled) if adapts else pooled)
            self.memory.append(
                {"input": x, "before": before, "normal": normal, "spread": spread}
                | {"winners": winners, "pooled": pooled, "map": pooled_map.shape}
            )
            x = pooled_map * mask["trunk sees"]
        return logits, features

    def backward(self, d_logits: list, d_features: list) -> dict[str, np.ndarray]:
        """Returns the gradient of every parameter, from those of logits and features."""
        grads: dict[str, np.ndarray] = {}
        d_next = 0.0  # of the feature, from the next block
        for i in reversed(range(len(self.masks))):
            memory, mask, width = self.memory[i], self.masks[i], WIDTH * MULTIPLIERS[i]
            d_pooled = d_logits[i] @ self.head_weight(i)
            self.put_halves(grads, f"classifers.{i}.fc", d_logits[i].T @ memory["pooled"])
            if self.adapts and i < len(self.masks) - 1:
                name = f"adaptation_layer{i + 1}"
                grads[f"{name}.weight"] = d_features[i].T @ memory["pooled"]
                grads[f"{name}.bias"] = d_features[i].sum(0)
                d_pooled = d_pooled + d_features[i] @ self.weights[f"{name}.weight"]
            positions = memory["map"][2] * memory["map"][3]
            d_head = np.broadcast_to(d_pooled[:, :, None, None] / positions, memory["map"])
            d_out = d_head * mask["head trains"] + d_next * mask["trunk trains"]
            if memory["winners"] is not None:
                d_out = d_out.repeat(2, 2).repeat(2, 3) * memory["winners"]
            grads[f"{norm_name(i)}.weight"] = (d_out * memory["normal"]).sum((0, 2, 3))
            grads[f"{norm_name(i)}.bias"] = d_out.sum((0, 2, 3))
            scale = self.weights[f"{norm_name(i)}.weight"].reshape(1, width, 1, 1)
            d_active = norm_backward(d_out * scale, memory["normal"], memory["spread"])
            d_before = d_active * (memory["before"] > 0)
            d_next, d_weight = convolve_backward(d_before, memory["input"], self.conv_weight(i))
            if i == 0:
                grads["feature_extractors.0.0.weight"] = d_weight
                grads["feature_extractors.0.0.bias"] = d_before.sum((0, 2, 3))
            else:
                self.put_halves(grads, f"feature_extractors.{i}.conv", d_weight)
        return grads

    def normalise(self, i: int, x: np.ndarray, train: bool) -> tuple[np.ndarray, np.ndarray]:
        name = norm_name(i)
        mean, var = self.weights[f"{name}.running_mean"], self.weights[f"{name}.running_var"]
        if train:
            count = x.shape[0] * x.shape[2] * x.shape[3]
            old_mean, old_var = mean, var
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            unbiased = var * count / (count - 1)
            self.running[f"{name}.running_mean"] = (1 - MOMENTUM) * old_mean + MOMENTUM * mean
            self.running[f"{name}.running_var"] = (1 - MOMENTUM) * old_var + MOMENTUM * unbiased
        spread = np.sqrt(var + EPSILON)[:, None, None]
        return (x - mean[:, None, None]) / spread, spread

    def conv_weight(self, i: int) -> np.ndarray:
        if i == 0:
            return self.weights["feature_extractors.0.0.weight"]
        halves = [self.weights[f"feature_extractors.{i}.conv_{half}.weight"] for half in "ps"]
        return np.concatenate(halves, axis=1)

    def head_weight(self, i: int) -> np.ndarray:
        halves = [self.weights[f"classifers.{i}.fc_{half}.weight"] for half in "ps"]
        return np.concatenate(halves, axis=1)

    def put_halves(self, grads: dict, name: str, gradient: np.ndarray) -> None:
        cut = self.weights[f"{name}_p.weight"].shape[1]
        grads[f"{name}_p.weight"], grads[f"{name}_s.weight"] = gradient[:, :cut], gradient[:, cut:]

    def adapted(self, i: int, pooled: np.ndarray) -> np.ndarray:
        name = f"adaptation_layer{i + 1}"
        return pooled @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]


def convolve(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((x.shape[0], weight.shape[0], height, width))
    for row in range(3):
        for column in range(3):
            window = padded[:, :, row : row + height, column : column + width]
            out += np.einsum("nihw,oi->nohw", window, weight[:, :, row, column])
    return out


def convolve_backward(d_out: np.ndarray, x: np.ndarray, weight: np.ndarray) -> tuple:
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    d_padded, d_weight = np.zeros_like(padded), np.zeros_like(weight)
    for row in range(3):
        for column in range(3):
            window = np.s_[:, :, row : row + height, column : column + width]
            d_weight[:, :, row, column] = np.einsum("nohw,nihw->oi", d_out, padded[window])
            d_padded[window] += np.einsum("nohw,oi->nihw", d_out, weight[:, :, row, column])
    return d_padded[:, :, 1:-1, 1:-1], d_weight


def norm_backward(d_normal: np.ndarray, normal: np.ndarray, spread: np.ndarray) -> np.ndarray:
    axes = (0, 2, 3)
    mean = d_normal.mean(axes, keepdims=True)
    along = (d_normal * normal).mean(axes, keepdims=True)
    return (d_normal - mean - normal * along) / spread


def max_pool(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the 2x2 maxima, and ones at the first largest of each window, zeros elsewhere."""
    batch, channels, height, width = x.shape
    out = np.zeros((batch, channels, height // 2, width // 2))
    winners = np.zeros_like(x)
    for n, c, row, column in np.ndindex(out.shape):
        window = x[n, c, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        down, right = divmod(int(window.argmax()), 2)
        out[n, c, row, column] = window[down, right]
        winners[n, c, 2 * row + down, 2 * column + right] = 1
    return out, winners


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def cross_entropy(z: np.ndarray) -> tuple[float, np.ndarray]:
    one_hot = np.eye(CLASSES)[LABELS]
    log_p = log_softmax(z)
    return -(one_hot * log_p).sum() / BATCH, (np.exp(log_p) - one_hot) / BATCH


def deep_supervision(logits: list, features: list) -> tuple[float, list, list]:
    losses, d_logits = zip(*[cross_entropy(z) for z in logits], strict=True)
    return sum(losses), list(d_logits), [np.zeros_like(f) for f in features]


def byot(logits: list, features: list) -> tuple[float, list, list]:
    loss, d_last = cross_entropy(logits[-1])
    target = np.exp(log_softmax(logits[-1] / TEMPERATURE))
    d_logits, d_features = [], []
    for z, feature in zip(logits[:-1], features[:-1], strict=True):
        entropy, d_entropy = cross_entropy(z)
        log_p = log_softmax(z / TEMPERATURE)
        distance = np.sqrt(((feature - features[-1]) ** 2).sum())
        loss += (1 - KD_WEIGHT) * entropy + FD_WEIGHT * distance
        loss -= KD_WEIGHT * (target * log_p).sum() / BATCH
        d_kd = (np.exp(log_p) - target) / (TEMPERATURE * BATCH)
        d_logits.append((1 - KD_WEIGHT) * d_entropy + KD_WEIGHT * d_kd)
        d_features.append(FD_WEIGHT * (feature - features[-1]) / distance)
    return loss, [*d_logits, d_last], [*d_features, np.zeros_like(features[-1])]


LOSSES = {"deep_supervision": deep_supervision, "byot": byot}


def digest(x: np.ndarray, of_gradient: bool) -> dict | None:
    if of_gradient and not x.any():
        return None  # no gradient reaches it
    values = {"norm": rounded(np.linalg.norm(x)), "head": rounded(x.ravel()[:4])}
    return values | {"sum": rounded(x.sum())} if of_gradient else values


def rounded(x) -> float | list:
    """Returns `x` rounded to 12 decimals, as plain numbers."""
    return np.round(np.asarray(x), 12).tolist()


if __name__ == "__main__":
    main()
