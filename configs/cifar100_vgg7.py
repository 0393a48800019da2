"""VGG7 with six exits on CIFAR-100, trained with Deep Feature Surgery.

    python train.py --config=configs/cifar100_vgg7.py          DFS
    python train.py --config=configs/cifar100_vgg7.py:dsn      deep supervision: the same network
    python train.py --config=configs/cifar100_vgg7.py:byot     self-distillation

Hardware and time: written for one GPU; not run here.

Accuracy (%) of the first and the last of six exits in Gong et al., ECCV 2024, by beta
(`--config.fork.partition_ratio`):

    0.1    22.8 ... 65.5
    0.5    20.8 ... 70.6
    0.9    17.9 ... 73.1
"""

from configs import common


def get_config(method: str = "dfs"):
    """Returns the config; `method` is the word after the file's colon: "dfs", "dsn" or "byot"."""
    config = common.get_config()
    config.data.name = "cifar100"
    config.data.augmentation = "crop,flip,autoaugment,cutout"
    config.model.name = "vgg7"
    config.batch_size = 500
    config.epochs = 100
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "multistep"
    config.schedule.decay_epochs = (70, 85, 90)
    return common.set_method(config, method)
