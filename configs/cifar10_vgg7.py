"""VGG7 with six exits on CIFAR-10, trained with Deep Feature Surgery.

    python train.py --config=configs/cifar10_vgg7.py           DFS
    python train.py --config=configs/cifar10_vgg7.py:dsn       deep supervision: the same network
    python train.py --config=configs/cifar10_vgg7.py:byot      self-distillation

The recipe is this project's own (the paper has no VGG7 on CIFAR-10): one cosine, crop and flip.

Hardware and time: written for one GPU; not run in full here. Measured on 2 busy CPU cores, a narrow
network for two epochs, 5 minutes (`--config.model.width=16 --config.epochs=2`): test accuracy (%)
of exits 1 to 6 and their ensemble

    33.57 43.37 48.04 52.07 56.77 58.63   55.25
"""

from configs import common


def get_config(method: str = "dfs"):
    """Returns the config; `method` is the word after the file's colon: "dfs", "dsn" or "byot"."""
    config = common.get_config()
    config.data.name = "cifar10"
    config.model.name = "vgg7"
    config.batch_size = 125
    config.epochs = 30
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 5e-4
    config.schedule.warmup_epochs = 1.0
    return common.set_method(config, method)
