"""Every field of a run, with its default. A config file overrides a few of them.

A section is a component's name and its options, which `dfs_jax.training.sections` reads from the
components; an option that is None has its component's default. Any field can be set on the command
line, `--config.optimizer.learning_rate=0.05`, and `--help_config` prints all of them.
"""

from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from dfs_jax.training.methods import method_parts
from dfs_jax.training.sections import create_section

# Fields of the run: default, or type of a value that is unset, and documentation.
RUN: dict[str, tuple[Any, str]] = {
    "seed": (0, "random seed of initialisation, sampling, augmentation and dropout"),
    "batch_size": (128, "examples in a training step, over all devices"),
    "accumulate_steps": (int, "micro batches of a step, for less memory; unset: 1"),
    "batch_norm_groups": (int, "parts of a micro batch with their own batch statistics"),
    "compute_dtype": (str, '"bfloat16": type in which blocks compute; parameters stay float32'),
    "remat": (bool, "recompute the inside of blocks in the backward pass: less memory, more time"),
    "eval_batch_size": (500, "examples in an evaluation step"),
    "epochs": (100, "passes over the training data"),
    "eval_every_epochs": (1, "epochs from one evaluation and checkpoint to the next"),
    "recalibrate_examples": (int, "training images for BatchNorm statistics before evaluations"),
    "checkpoint_every_steps": (0, "steps between additional checkpoints; 0: none within epochs"),
    "log_every_steps": (20, "steps between updates of the progress bar and checks of the loss"),
    "steps_per_dispatch": (1, "largest number of steps in one compiled call"),
    "conflict_every_steps": (0, "steps between measurements of gradient conflict; 0: never"),
    "conflict_examples": (128, "validation examples for measuring the conflict"),
    "init_from": (str, "weights for the trunk: a .safetensors, .npz or .pth file, or a name"),
    "mesh.data": (-1, "devices with different examples; -1: all remaining ones"),
    "mesh.fsdp": (1, "devices that also divide the parameters"),
    "mesh.tensor": (1, "devices that divide the layers of a ViT"),
}


def set_method(
    config: Any,
    method: str,
    *,
    referencing: str | None = None,
    dfs_loss: str = "deep_supervision",
) -> Any:
    """Sets the fork, the loss and the gradient rule of the method after the config file's colon.

        dfs            fork dfs, `referencing` as in the published code of this network, and
                       `dfs_loss`
        dsn            deep supervision: fork plain, labels at every exit, summed gradients
        byot           be your own teacher: early exits also learn from the last exit's features
        distillation   exits also learn from the last exit's probabilities
        ge             gradient equilibrium: the fork scales gradients
        pcgrad, cagrad, nash_mtl, upgrad   deep supervision, gradients merged by this combiner
        meta_gf        deep supervision, gradients fused by weights that look one step ahead
        wpn            deep supervision, examples weighted by a network that looks one step ahead

    A plus joins methods that change different parts: `dfs+pcgrad`, `ge+distillation+cagrad`.
    """
    parts = method_parts(method)
    is_dfs = parts.fork == "dfs"
    config.fork.name = parts.fork
    config.fork.referencing = referencing if is_dfs else None
    config.loss.name = parts.loss or (dfs_loss if is_dfs else "deep_supervision")
    config.gradients.name = parts.gradients
    return config


def get_config(method: str = "dfs") -> Any:
    """Returns the defaults for a method of `dfs_jax.training.methods`, or several with a plus."""
    config: Any = ml_collections.ConfigDict({"mesh": {}})
    for field, (default, _) in RUN.items():
        section, _, name = field.rpartition(".")
        tree = config[section] if section else config
        tree[name] = placeholder(default) if isinstance(default, type) else default
    config.model = create_section("model", "vgg7")
    config.fork = create_section("fork", "")
    config.loss = create_section("loss", "")
    config.gradients = create_section("gradients", "")
    config.regime = create_section("regime", "joint")
    config.data = create_section("data", "cifar10", augmentation="crop,flip", split_seed=0)
    config.optimizer = create_section("optimizer", "sgd", learning_rate=0.1)
    config.schedule = create_section("schedule", "cosine")
    return set_method(config, method)
