"""Every field of a run, with its default. A config file overrides a few of them.

Component options default to None and are then the component's own default; one that is set is
passed on, and a component that lacks it refuses. Any field can be set on the command line:
`--config.optimizer.learning_rate=0.05`.
"""

from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from dfs_jax.training.methods import method_parts


def set_method(
    config: Any,
    method: str,
    *,
    referencing: str | None = None,
    dfs_loss: str = "deep_supervision",
) -> Any:
    """Sets the fork, the loss and the gradient rule by the method after the config file's colon.

        dfs            fork dfs, `referencing` as the published code of this network has it, and
                       `dfs_loss`
        dsn            deep supervision: fork plain, labels at every exit, gradients added up
        byot           be your own teacher: early exits also learn from the last one's features
        distillation   exits also learn from the last one's probabilities
        ge             gradient equilibrium: the fork scales gradients
        pcgrad, cagrad, nash_mtl, upgrad   deep supervision, gradients merged by that combiner
        meta_gf        deep supervision, gradients fused by weights that look one step ahead
        wpn            deep supervision, examples weighed by a network that looks one step ahead

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
    config: Any = ml_collections.ConfigDict()
    config.seed = 0  # reaches initialisation, sampling, augmentation and dropout
    config.batch_size = 128  # over all devices together
    # Micro batches that a step's batch is taken in, one after another, for less memory; None: 1.
    # Each has its own batch statistics and, with BYOT, distance of features.
    config.accumulate_steps = placeholder(int)
    # Parts of a (micro) batch that have batch statistics of their own, as on so many GPUs; None: 1.
    config.batch_norm_groups = placeholder(int)
    # "bfloat16": blocks compute in it; parameters, statistics and losses are float32 either way.
    config.compute_dtype = placeholder(str)
    # Compute the inside of blocks again in the backward pass: less memory, more time.
    config.remat = placeholder(bool)
    config.eval_batch_size = 500
    config.epochs = 100
    config.eval_every_epochs = 1  # evaluate on validation data and save; the last epoch always does
    # Training images by which BatchNorm's statistics are taken anew before an evaluation; None: the
    # running average stays. Worth it where an epoch has few steps or the learning rate is high.
    config.recalibrate_examples = placeholder(int)
    config.checkpoint_every_steps = 0  # save within epochs too; 0: only after an evaluation
    config.log_every_steps = 20  # move the progress bar and look for a non-finite loss
    # Steps that the device takes without the host, at most; each is a part of one program's loop.
    config.steps_per_dispatch = 1
    config.conflict_every_steps = 0  # measure how the exits' gradients conflict; 0: never
    config.conflict_examples = 128  # on the first ones of validation (train where none is held out)
    # Start the trunk from a single-exit network: a .safetensors, .npz or .pth file.
    config.init_from = placeholder(str)

    # How many devices lie along each axis; -1: those that the others leave. Batches are divided
    # over data and fsdp; results are equal within rounding.
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1  # parameters, and all that is shaped like them, divided over them
    config.mesh.tensor = 1  # layers divided over them: vit

    config.model = ml_collections.ConfigDict()
    config.model.name = "vgg7"  # or your own "package.module:attribute"; so fork, loss and data
    # How vgg, resnet and msdnet run; what they compute is the same. Off, the backward pass computes
    # what nothing trains too, and a CPU takes XLA's own kernels (as several devices always do).
    config.model.partitioned_backward = placeholder(bool)
    config.model.cpu_kernels = placeholder(bool)
    config.model.width = placeholder(int)  # resnet, vgg, vit
    # vgg: the convolutions that have an exit, counted from 1, the last one among them; None: all
    config.model.exits = placeholder(tuple)
    config.model.stem = placeholder(str)  # resnet, msdnet: "cifar" or "imagenet"
    config.model.num_exits = placeholder(int)  # msdnet, as all of the following
    config.model.base = placeholder(int)  # layers of the first block
    config.model.step = placeholder(int)  # layers of each later block
    config.model.step_mode = placeholder(str)  # "even" or "lin_grow"
    config.model.initial_channels = placeholder(int)
    config.model.growth = placeholder(int)
    config.model.scale_factors = placeholder(tuple)  # one for each scale, as the next
    config.model.bottleneck_factors = placeholder(tuple)
    config.model.prune = placeholder(str)  # "max" or "min"
    config.model.reduction = placeholder(float)  # width that a transition leaves; 0: no transitions
    config.model.head_channels = placeholder(int)
    config.model.head_dropout = placeholder(float)
    config.model.heads = placeholder(int)  # vit, as all of the following
    config.model.depth = placeholder(int)  # encoder layers
    config.model.patch_size = placeholder(int)  # pixels
    config.model.first_exit_layer = placeholder(int)  # counted from 1; every later layer has one
    config.model.pool = placeholder(str)  # "class" token or "mean" of the others
    config.model.dropout = placeholder(float)

    config.fork = ml_collections.ConfigDict()
    # "plain", an ordinary multi-exit network; "dfs"; or "gradient_equilibrium".
    config.fork.name = ""
    # The paper's beta, 0.5 unless set: one for all exits, or one for each but the last.
    config.fork.partition_ratio = placeholder(tuple)  # dfs, as the next
    config.fork.referencing = placeholder(str)  # "symmetric", "trunk_only" or "none"

    config.loss = ml_collections.ConfigDict()
    config.loss.name = ""  # "deep_supervision", "byot" or "distillation"
    config.loss.label_smoothing = placeholder(float)
    # deep supervision: one for each exit, "constant" or "linear"
    config.loss.exit_weights = placeholder(object)
    config.loss.kd_weight = placeholder(float)  # byot, distillation; as the next
    config.loss.temperature = placeholder(float)
    config.loss.feature_weight = placeholder(float)  # byot
    config.loss.teacher = placeholder(str)  # distillation: "last" exit or all "deeper"
    config.loss.scale = placeholder(float)  # distillation

    # The rule that makes one update of the exits' gradients. Combiners (weighted_sum, pcgrad,
    # cagrad, nash_mtl, upgrad) merge those of the trunk; meta_gf and wpn take trial steps.
    config.gradients = ml_collections.ConfigDict()
    config.gradients.name = ""  # "sum", a combiner, "meta_gf" or "wpn"
    # Way through the exits, "vmap", "unroll" or "scan": time against memory, equal results.
    config.gradients.exits = placeholder(str)  # combiners and meta_gf
    config.gradients.weights = placeholder(tuple)  # weighted_sum: one for each exit
    config.gradients.scaling = placeholder(str)  # cagrad, pcgrad, upgrad, meta_gf: "sum" or another
    config.gradients.radius = placeholder(float)  # cagrad's c
    config.gradients.max_norm = placeholder(float)  # nash_mtl
    config.gradients.learning_rate = placeholder(float)  # meta_gf, wpn: of what the rule learns
    config.gradients.granularity = placeholder(str)  # meta_gf: a weight for a "tensor" or "channel"
    config.gradients.normalisation = placeholder(str)  # meta_gf: "softmax" or "sigmoid"
    config.gradients.window = placeholder(int)  # meta_gf: steps that each exit trains; None: fuse
    config.gradients.auxiliary = placeholder(float)  # meta_gf with a window: weight of other exits
    config.gradients.memory = placeholder(float)  # meta_gf with a window: of weights, over rounds
    config.gradients.weight_decay = placeholder(float)  # wpn, as all of the following
    config.gradients.hidden_size = placeholder(int)
    config.gradients.hidden_layers = placeholder(int)
    config.gradients.strength = placeholder(float)  # largest distance of a weight from 1
    config.gradients.centre = placeholder(str)  # mean 1 over "all", "examples" or "exits"
    config.gradients.p = placeholder(float)  # of the exit distribution
    config.gradients.exchange = placeholder(bool)  # try a step on both halves of the batch
    config.gradients.interval = placeholder(int)  # steps from one trial to the next

    config.data = ml_collections.ConfigDict()
    config.data.name = "cifar10"  # any TFDS image-classification set, "folder" or "digits"
    config.data.data_dir = placeholder(str)  # None: where TFDS keeps its sets
    config.data.validation_examples = placeholder(int)  # held out of train; 0: none
    # Sets without test images: held out of train for the test, a number or a fraction below 1.
    config.data.test_examples = placeholder(object)
    config.data.split_seed = 0  # which ones
    config.data.image_size = placeholder(int)  # resize to a square of this side
    config.data.statistics = placeholder(str)  # normalise with another set's mean and deviation
    # In this order; also autoaugment, randaugment, cutout; "none".
    config.data.augmentation = "crop,flip"
    # Hold the images in device memory. None: GPUs and TPUs do, if an eighth of theirs is enough.
    config.data.on_device = placeholder(bool)
    # Unreadable images that may be left out: 0 in memory, 10 of a streamed set, unless set.
    config.data.max_corrupt = placeholder(int)
    # Photographs decoded while training runs. None: TFDS sets and folders that memory does not
    # hold, or whose augmentation begins with random_resized_crop. What follows is for them alone.
    config.data.streamed = placeholder(bool)
    config.data.num_workers = placeholder(int)  # processes that decode; 0: threads of this one
    config.data.crop_area = placeholder(tuple)  # random_resized_crop: least and largest share
    config.data.centre_fraction = placeholder(float)  # of the shorter side, in evaluation
    config.data.crop_padding = placeholder(int)  # pixels on each side
    config.data.crop_fill = placeholder(int)  # 0..255
    config.data.autoaugment_fill = placeholder(int)
    config.data.autoaugment_policy = placeholder(str)  # found on "cifar10" or on "imagenet"
    config.data.randaugment_operations = placeholder(int)
    config.data.randaugment_magnitude = placeholder(int)  # 0..30
    config.data.randaugment_fill = placeholder(int)
    config.data.cutout_size = placeholder(int)  # side in pixels
    config.data.cutout_fill = placeholder(object)  # 0..255, or "mean": the data set's mean colour

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "sgd"  # or "adamw"
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = placeholder(float)
    config.optimizer.momentum = placeholder(float)  # sgd
    config.optimizer.nesterov = placeholder(bool)  # sgd
    config.optimizer.gradient_clip = placeholder(float)  # largest global norm
    config.optimizer.ema_decay = placeholder(float)  # evaluate a moving average of the parameters

    config.schedule = ml_collections.ConfigDict()
    config.schedule.name = "cosine"  # "multistep" or "constant"
    config.schedule.warmup_epochs = placeholder(float)
    config.schedule.decay_epochs = placeholder(tuple)  # multistep
    config.schedule.decay_factor = placeholder(float)  # multistep
    return set_method(config, method)
