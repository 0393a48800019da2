"""VGG16 with thirteen exits on ImageNet, trained with Deep Feature Surgery.

    python train.py --config=configs/imagenet_vgg16.py         DFS
    python train.py --config=configs/imagenet_vgg16.py:dsn     deep supervision: the same network
    python train.py --config=configs/imagenet_vgg16.py:byot    self-distillation

There is no published recipe. Epochs, batch size and decays are those of MSDNet on ImageNet, the
weight decay is that of VGG7 on CIFAR-100.

Photographs are read and cropped during training (random resized crops and flips; the central 224 of
256 in evaluation). `python -m dfs_jax.data.prepare imagenet2012` says what to download first.
`--config.data.num_workers=N` decodes in N processes instead of threads.

Hardware and time: written for several GPUs; not run here.

Gong et al., ECCV 2024, report no accuracies, but the speed: with thirteen exits DFS trained 13.51 %
more images a second than deep supervision. The savings in multiply-adds per step:
`python -m dfs_jax.reports.cost_report --config=configs/imagenet_vgg16.py`.
"""

from configs import common


def get_config(method: str = "dfs"):
    """Returns the config; `method` is the word after the file's colon: "dfs", "dsn" or "byot"."""
    config = common.get_config()
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.augmentation = "random_resized_crop,flip"
    config.model.name = "vgg16"
    config.batch_size = 256
    config.eval_batch_size = 250
    config.epochs = 90
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "multistep"
    config.schedule.decay_epochs = (70, 80, 85)
    return common.set_method(config, method)
