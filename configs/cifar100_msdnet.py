"""MSDNet with seven exits on CIFAR-100, trained with Deep Feature Surgery.

    python train.py --config=configs/cifar100_msdnet.py         DFS, as the authors published it
    python train.py --config=configs/cifar100_msdnet.py:dsn     deep supervision: the same network
    python train.py --config=configs/cifar100_msdnet.py:byot    self-distillation

For MSDNet's own narrow networks: `--config.model.name=msdnet_cifar_anytime` (seven exits) or
`msdnet_cifar_budgeted` (five).

Hardware and time: written for one GPU; not run here.

Accuracy (%) of exits 1 to 7 in Gong et al., ECCV 2024:

    MSDNet     64.10 67.46 70.34 72.38 73.06 73.81 73.89
    GE         64.00 68.41 71.86 73.50 74.46 75.39 75.96
    CAGrad     68.78 72.55 74.23 74.97 75.35 75.82 76.08
    PCGrad     67.06 71.37 74.86 75.78 76.25 76.95 76.71
    Meta-GF    67.97 72.27 75.06 75.77 76.38 77.11 77.47
    WPN        62.26 67.18 70.53 73.10 74.80 76.05 76.31
    Nash-MTL   64.14 69.23 72.64 74.89 75.32 75.88 76.75
    DFS        72.46 75.64 77.50 78.54 79.20 79.45 79.56

at 56.43, 101.00, 155.31, 198.10, 249.53, 298.05 and 340.64 million operations; as budgeted batch
classification DFS gives 72.83 at 58.8 M, 75.59 at 71.9, 77.30 at 86.7, 78.86 at 113.9, 79.93 at
145.9. The authors chose the best epoch on the test set; here it is chosen on 5,000 held-out images.
"""

from configs import common


def get_config(method: str = "dfs"):
    """Returns the config; `method` is the word after the file's colon: "dfs", "dsn" or "byot"."""
    config = common.get_config()
    config.data.name = "cifar100"
    config.model.name = "msdnet_cifar100"
    config.batch_size = 500
    config.epochs = 300
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "multistep"
    config.schedule.decay_epochs = (250, 280, 295)
    # The paper has "symmetric"; the code published for MSDNet does not stop the exits' gradients.
    return common.set_method(config, method, referencing="trunk_only")
