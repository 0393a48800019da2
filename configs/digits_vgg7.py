"""VGG7 with six exits on scikit-learn's handwritten digits: trains in minutes, offline.

    make demo
    python train.py --config=configs/digits_vgg7.py            DFS
    python train.py --config=configs/digits_vgg7.py:dsn        deep supervision: the same network
    python train.py --config=configs/digits_vgg7.py:byot       self-distillation

Measured on 2 CPU cores by `make demo`, DFS at beta 0.5, seed 0: test accuracy (%) of exits 1 to 6
and their ensemble

    54.67 88.33 94.33 98.67 99.00 99.33   98.67
"""

from configs import common


def get_config(method: str = "dfs"):
    """Returns the config; `method` is the word after the file's colon: "dfs", "dsn" or "byot"."""
    config = common.get_config()
    config.data.name = "digits"
    config.data.augmentation = "crop"  # a mirrored digit is another character
    config.data.crop_padding = 2
    config.data.crop_fill = 0  # the digits' own background
    config.model.width = 16
    config.batch_size = 64
    config.epochs = 36
    config.eval_every_epochs = 2
    config.recalibrate_examples = 512  # with 18 steps per epoch, the running average lags behind
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 5e-4
    config.schedule.warmup_epochs = 2.0
    return common.set_method(config, method)
