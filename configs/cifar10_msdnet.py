"""MSDNet with seven exits on CIFAR-10, with the recipe for CIFAR-100.

    python train.py --config=configs/cifar10_msdnet.py         DFS, as the authors published it
    python train.py --config=configs/cifar10_msdnet.py:dsn     deep supervision: the same network
    python train.py --config=configs/cifar10_msdnet.py:byot    self-distillation

Hardware and time: written for one GPU; not run here. For smaller machines: `--config.model.growth=4
--config.epochs=30 --config.schedule.decay_epochs="(15,22,27)"`.

The paper has no accuracies for MSDNet on CIFAR-10.
"""

from configs import cifar100_msdnet


def get_config(method: str = "dfs"):
    """Returns the config; `method` is the word after the file's colon: "dfs", "dsn" or "byot"."""
    config = cifar100_msdnet.get_config(method)
    config.data.name = "cifar10"
    return config
