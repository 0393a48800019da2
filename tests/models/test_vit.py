"""Vision transformers: by hand, against PyTorch's, and what they refuse."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from dfs_jax.costs.flops import exit_costs
from dfs_jax.costs.step_operations import theoretical_step_cost
from dfs_jax.forks import create_fork
from dfs_jax.interop import from_torch_state_dict, load_trunk, to_torch_state_dict
from dfs_jax.losses import create_loss
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.models.vit import ViT
from dfs_jax.types import UserError

CLASSES, IMAGE_SHAPE = 7, (6, 10, 3)
SMALL = {"width": 6, "heads": 2, "depth": 3, "patch_size": 2, "first_exit_layer": 2}
TOKENS = 1 + 3 * 5

# What the same networks with one exit are known to have.
SINGLE_EXIT = {"vit_tiny": 5_717_416, "vit_small": 22_050_664, "vit_base": 86_567_656}


@pytest.mark.parametrize("name", SINGLE_EXIT)
def test_parameters_by_hand(name):
    model = create_model(name, num_classes=1000)
    width = model.width
    head = 2 * width + 1000 * width + 1000
    layer = 4 * width + 4 * (width * width) + 4 * width + 8 * width * width + 5 * width
    total = 16 * 16 * 3 * width + width + width + 197 * width + 5 * layer
    for cost in exit_costs(model, (224, 224, 3)):
        total += layer + head
        assert cost.params == total
    assert total - 6 * head == SINGLE_EXIT[name]


def test_macs_by_hand():
    width, tokens = 6, TOKENS
    layer = tokens * 12 * width * width + 2 * tokens * tokens * width
    total = (tokens - 1) * 2 * 2 * 3 * width + layer
    for i, cost in enumerate(exit_costs(ViT(CLASSES, **SMALL), IMAGE_SHAPE)):
        total += layer
        assert cost.macs_without_earlier_heads == total + width * CLASSES
        assert cost.macs == total + (i + 1) * width * CLASSES


def draw(model, image_shape=IMAGE_SHAPE, seed=0):
    """Random variables of a model."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def model():
    return ViT(CLASSES, **SMALL)


@pytest.fixture(scope="module")
def variables(model):
    return draw(model)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).normal(size=(3, *IMAGE_SHAPE)).astype(np.float32)


# A slow and obvious reference, one image and one head at a time.


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def attend(x, p, heads):
    tokens, width = x.shape
    size = width // heads
    qkv = dense(x, p["qkv"])
    mixed = np.zeros((tokens, width))
    for h in range(heads):
        q, k, v = (qkv[:, part * width + h * size :][:, :size] for part in range(3))
        for t in range(tokens):
            weights = np.exp(k @ q[t] / math.sqrt(size))
            mixed[t, h * size : (h + 1) * size] = weights @ v / weights.sum()
    return dense(mixed, p["output"])


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def encoder_layer(x, p, heads):
    x = x + attend(norm(x, p["norm1"]), p["attention"], heads)
    return x + dense(gelu(dense(norm(x, p["norm2"]), p["mlp1"])), p["mlp2"])


def embed(image, p, patch):
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    tokens = [p["class_token"][0, 0]]
    for r in range(rows):
        for c in range(columns):
            cut = image[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
            tokens.append(np.tensordot(cut, p["patches"]["kernel"], 3) + p["patches"]["bias"])
    return np.stack(tokens) + p["position"][0]


def reference(params, image, pool):
    params = jax.tree.map(np.float64, params)
    x = embed(image.astype(np.float64), params["block1"]["embedding"], 2)
    logits = []
    for i, layers in enumerate(((1, 2), (3,)), start=1):
        for label in layers:
            x = encoder_layer(x, params[f"block{i}"][f"layer{label}"], 2)
        head = params[f"head{i}"]
        normed = norm(x, head["norm"])
        pooled = normed[0] if pool == "class" else normed[1:].mean(0)
        logits.append(dense(pooled, head["classifier"]))
    return logits


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_every_exit_by_hand(model, variables, images, pool):
    logits = jax.jit(model.clone(pool=pool).apply)(variables, images).logits
    for n, image in enumerate(images):
        for ours, theirs in zip(
            logits[:, n], reference(variables["params"], image, pool), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_blocks_are_the_layers_between_exits():
    model = ViT(CLASSES, width=2, heads=1, depth=5, first_exit_layer=3)
    assert [model.layers_of_block(i) for i in range(model.num_exits)] == [(1, 2, 3), (4,), (5,)]
    single = ViT(CLASSES, width=2, heads=1, depth=5, first_exit_layer=5)
    assert single.num_exits == 1
    assert single.layers_of_block(0) == (1, 2, 3, 4, 5)


def test_layer_norm_leaves_surgery_nothing_to_save(model):
    loss = create_loss("deep_supervision")
    plain, dfs = (
        theoretical_step_cost(model, create_fork(name), loss, IMAGE_SHAPE)
        for name in ("plain", "dfs")
    )
    assert plain == dfs


def test_dropout_acts_in_training_alone(model, variables, images):
    dropping = model.clone(dropout=0.5)

    @jax.jit
    def run(key):
        trained = dropping.apply(variables, images, train=True, rngs={"dropout": key})
        return trained.logits, dropping.apply(variables, images).logits

    first, evaluated = run(jax.random.key(0))
    again, _ = run(jax.random.key(0))
    other, _ = run(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    alone = jax.jit(model.apply)(variables, images).logits
    np.testing.assert_allclose(evaluated, alone, rtol=1e-5, atol=1e-6)


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, "width of 6 cannot be split evenly among 4 heads"),
        ({"first_exit_layer": 0}, "one of the 3 encoder layers, counted from 1, got 0"),
        ({"first_exit_layer": 4}, "one of the 3 encoder layers, counted from 1, got 4"),
        ({"pool": "max"}, "pool must be one of class, mean, got 'max'"),
        ({"patch_size": 0}, "patch_size must be a whole number of at least 1, got 0"),
        ({"width": 6.0}, "width must be a whole number of at least 1, got 6.0"),
        ({"depth": True}, "depth must be a whole number of at least 1, got True"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"mlp": 3}, "model 'vit_tiny' has no option 'mlp'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        create_model("vit_tiny", num_classes=CLASSES, **{**SMALL, **options})


@pytest.mark.parametrize("shape", [(7, 10, 3), (6, 11, 3)])
def test_patches_that_do_not_fill_the_image_are_refused(model, shape):
    message = f"{shape[0]}x{shape[1]} cannot be cut into patches of 2x2: choose a patch_size"
    with pytest.raises(UserError, match=message):
        draw(model, shape)


def test_images_of_another_size_than_the_weights_are_refused(model, variables):
    with pytest.raises(UserError, match=r"6x12 make 18 patches, but .* positions for 15"):
        jax.eval_shape(model.apply, variables, jnp.zeros((1, 6, 12, 3)))


# Weights from and to other programs


def timm_names(depth):
    layer = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    modules = [f"blocks.{n}.{module}" for n in range(depth) for module in layer]
    modules = ["patch_embed.proj", *modules, "norm", "head"]
    tensors = [f"{module}.{tensor}" for module in modules for tensor in ("weight", "bias")]
    return ["cls_token", "pos_embed", *tensors]


def test_a_single_exit_has_timms_names(model):
    single = model.clone(first_exit_layer=3)
    drawn = draw(single)
    state_dict = to_torch_state_dict(single, drawn)
    assert list(state_dict) == timm_names(3)
    assert state_dict["blocks.1.attn.qkv.weight"].shape == (18, 6)
    assert state_dict["patch_embed.proj.weight"].shape == (6, 3, 2, 2)
    assert state_dict["pos_embed"].shape == (1, TOKENS, 6)
    back = from_torch_state_dict(single, state_dict, image_shape=IMAGE_SHAPE)
    jax.tree.map(np.testing.assert_array_equal, back, drawn)


def test_early_exits_have_names_of_their_own(model, variables):
    state_dict = to_torch_state_dict(model, variables)
    added = [name for name in state_dict if name not in timm_names(3)]
    assert added == [
        "exit_norms.0.weight",
        "exit_norms.0.bias",
        "exit_heads.0.weight",
        "exit_heads.0.bias",
    ]
    np.testing.assert_array_equal(
        state_dict["exit_heads.0.weight"].T, variables["params"]["head1"]["classifier"]["kernel"]
    )
    adapting = model.clone(adapt_features=True)
    written = to_torch_state_dict(adapting, draw(adapting))
    assert written.keys() - state_dict.keys() == {
        "adaptation_layer1.weight",
        "adaptation_layer1.bias",
    }


def pretrained(path, **changes):
    """Writes a single-exit checkpoint in timm's names."""
    single = ViT(11, **{**SMALL, "first_exit_layer": SMALL["depth"], **changes})
    state_dict = to_torch_state_dict(single, draw(single, seed=3))
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in state_dict.items()}, path
    )
    return state_dict


def test_a_pretrained_backbone_starts_the_trunk(tmp_path, model, variables):
    state_dict = pretrained(tmp_path / "vit.safetensors")
    loaded = load_trunk(tmp_path / "vit.safetensors", model, variables)
    params = loaded["params"]
    np.testing.assert_array_equal(
        params["block1"]["embedding"]["position"], state_dict["pos_embed"]
    )
    for label, block in ((1, "block1"), (2, "block1"), (3, "block2")):
        ours = params[block][f"layer{label}"]["mlp1"]["kernel"]
        np.testing.assert_array_equal(ours, state_dict[f"blocks.{label - 1}.mlp.fc1.weight"].T)
    kept = {name: params[name] for name in ("head1", "head2")}
    jax.tree.map(
        np.testing.assert_array_equal, kept, {n: variables["params"][n] for n in ("head1", "head2")}
    )
    fresh = traverse_util.flatten_dict(variables["params"], sep="/")
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        assert path.startswith("head") or not np.array_equal(leaf, fresh[path]), path


def test_a_backbone_for_another_image_size_is_refused(tmp_path, model):
    pretrained(tmp_path / "vit.safetensors")
    message = r"nothing was loaded; misshapen: pos_embed is \[1, 16, 6\] instead of \[1, 19, 6\]"
    with pytest.raises(UserError, match=message):
        load_trunk(tmp_path / "vit.safetensors", model, draw(model, (6, 12, 3)))


def test_a_deeper_backbone_is_refused(tmp_path, model, variables):
    pretrained(tmp_path / "vit.safetensors", depth=4, first_exit_layer=4)
    with pytest.raises(UserError, match=r"unexpected: blocks\.3\.attn\.proj\.bias, "):
        load_trunk(tmp_path / "vit.safetensors", model, variables)


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE_EXIT)
def test_a_full_size_model_learns_in_a_step(name):
    model = create_model(name, num_classes=1000)
    images = jax.random.normal(jax.random.key(1), (2, 224, 224, 3))
    params = init_variables(model, jax.random.key(0), (224, 224, 3))["params"]
    fork, loss = create_fork("dfs", referencing="trunk_only"), create_loss("deep_supervision")

    @jax.jit
    def step(params):
        def total(params):
            outputs = model.apply({"params": params}, images, fork, train=True)
            return loss(outputs, jnp.asarray([3, 500])).sum()

        value, gradients = jax.value_and_grad(total)(params)
        return value, jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients)

    before, params = step(params)
    after, _ = step(params)
    assert before == pytest.approx(7 * math.log(1000), rel=0.2)
    assert after < before


# Against PyTorch


def torch_vit(torch, width, heads, depth, patch, num_classes):
    """A vision transformer in plain PyTorch, its tensors named as in timm."""
    nn = torch.nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x):
            batch, tokens, _ = x.shape
            split = self.qkv(x).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(*split.unbind(0))
            return self.proj(mixed.transpose(1, 2).reshape(x.shape))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
            self.attn = Attention()
            self.mlp = nn.ModuleDict(
                {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
            )

        def forward(self, x):
            x = x + self.attn(self.norm1(x))
            return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (224 // patch) ** 2, width))
            self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
            self.blocks = nn.Sequential(*(Layer() for _ in range(depth)))
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.head = nn.Linear(width, num_classes)

        def forward(self, images):
            patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
            first = self.cls_token.expand(len(images), -1, -1)
            x = torch.cat([first, patches], 1) + self.pos_embed
            return self.head(self.norm(self.blocks(x))[:, 0])

    return Network()


def check_against(torch, theirs, name):
    """Draws the PyTorch network's weights anew and compares its logits with those of ours."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    ours = create_model(name, num_classes=11, first_exit_layer=12)
    variables = from_torch_state_dict(ours, theirs.state_dict())
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    logits = jax.jit(ours.apply)(variables, images).logits[-1]
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE_EXIT)
def test_a_single_exit_equals_plain_pytorch(name):
    torch = pytest.importorskip("torch")
    options = create_model(name, num_classes=11)
    check_against(torch, torch_vit(torch, options.width, options.heads, 12, 16, 11), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE_EXIT)
def test_a_single_exit_equals_timms(name):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    theirs = timm.create_model(f"{name}_patch16_224", pretrained=False, num_classes=11)
    check_against(torch, theirs, name)
