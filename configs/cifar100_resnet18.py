"""ResNet18 with four exits on CIFAR-100: Deep Feature Surgery with BYOT's losses.

    python train.py --config=configs/cifar100_resnet18.py          DFS, as the authors trained it
    python train.py --config=configs/cifar100_resnet18.py:byot     the same losses, no surgery
    python train.py --config=configs/cifar100_resnet18.py:dsn      deep supervision

Give each its own --workdir. A method is a fork and a loss, which can be combined freely: DSN is
`--config.fork.name=plain --config.loss.name=deep_supervision`, BYOT `--config.fork.name=plain`, and
DFS with labels only `--config.loss.name=deep_supervision`.

Hardware and time: written for one GPU; not run here. Counted: 13.5 million images at 582 million
multiply-adds forward and twice that backward are 4.7e16 FLOPs, 80 minutes at 10 TFLOP/s.

Accuracy (%) of exits 1 to 4 and their ensemble in Gong et al., ECCV 2024:

    DSN     67.23 73.80 77.75 78.38   79.27
    BYOT    67.85 74.57 78.23 78.64   79.67
    DFS     74.17 77.43 78.82 79.93   80.89

A careful implementation of BYOT with the same heads is reported at 76.25 79.30 81.06 81.33, and
82.32 for the ensemble: the mark to reach. The authors chose the best epoch on the test set and
normalised with CIFAR-10's statistics; here it is chosen on 5,000 held-out images, and CIFAR-100's
statistics are used (`--config.data.statistics=cifar10` for theirs).
"""

from configs import common


def get_config(method: str = "dfs"):
    """Returns the config; `method` is the word after the file's colon: "dfs", "byot" or "dsn"."""
    config = common.get_config()
    config.data.name = "cifar100"
    config.data.augmentation = "crop,flip,autoaugment,cutout"
    config.model.name = "resnet18"
    config.model.stem = "cifar"
    config.batch_size = 500
    config.epochs = 300
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "multistep"
    config.schedule.decay_epochs = (250, 280, 295)
    return common.set_method(config, method, dfs_loss="byot")
