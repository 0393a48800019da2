"""The PyTorch networks that ours are measured against: they compute the same."""

import jax
import numpy as np
import pytest

from benchmarks.torch_peer import torch_loss
from dfs_jax.forks import create_fork
from dfs_jax.interop import from_torch_state_dict
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model

torch = pytest.importorskip("torch")

from benchmarks.torch_networks import build_network  # noqa: E402  (needs torch)

CLASSES, BATCH = 7, 3
NETWORKS = [
    ("vgg7", {"width": 5}, (8, 8, 3)),
    ("resnet18", {"width": 3}, (16, 16, 3)),
    (
        "msdnet",
        {
            "num_exits": 3,
            "base": 2,
            "initial_channels": 3,
            "growth": 2,
            "head_channels": 5,
            "head_dropout": 0.0,
        },
        (16, 16, 3),
    ),
]


def published_gradients(network):
    """The network's gradients by the names of its state_dict, besides its running statistics."""
    for parameter in network.parameters():
        parameter.data = parameter.grad
    return network.state_dict()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
@pytest.mark.parametrize("loss_name", ["deep_supervision", "byot"])
@pytest.mark.parametrize(("name", "options", "shape"), NETWORKS)
def test_logits_and_gradients_are_ours(name, options, shape, loss_name, dtype, tolerance):
    draw = np.random.default_rng(0)
    images = draw.normal(size=(BATCH, *shape)).astype(dtype)
    labels = draw.integers(0, CLASSES, BATCH)
    loss = create_loss(loss_name)
    model = create_model(name, num_classes=CLASSES, adapt_features=loss_name == "byot", **options)
    fork = create_fork("dfs", partition_ratio=0.3)
    network = build_network(model, fork).to(getattr(torch, dtype)).train()
    with jax.enable_x64(dtype == "float64"):
        variables = from_torch_state_dict(model, network.state_dict(), image_shape=shape)

        @jax.jit
        def ours(variables, images, labels):
            def total(params):
                outputs, _ = model.apply(
                    {**variables, "params": params},
                    images,
                    fork,
                    train=True,
                    mutable=["batch_stats"],
                )
                return loss(outputs, labels).sum(), outputs.logits

            return jax.grad(total, has_aux=True)(variables["params"])

        gradients, logits = jax.device_get(ours(variables, images, labels))
    outputs = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch_loss(loss)(outputs, torch.from_numpy(labels)).backward()
    theirs = from_torch_state_dict(model, published_gradients(network), image_shape=shape)["params"]
    np.testing.assert_allclose(
        logits, torch.stack(outputs.logits).detach().numpy(), rtol=tolerance, atol=tolerance
    )
    assert jax.tree.structure(theirs) == jax.tree.structure(gradients)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        other = theirs
        for key in path:
            other = other[key.key]
        np.testing.assert_allclose(leaf, other, rtol=tolerance, atol=tolerance, err_msg=str(path))
