"""MSDNet with five exits on ImageNet, trained with Deep Feature Surgery.

    python train.py --config=configs/imagenet_msdnet.py         DFS, as the authors published it
    python train.py --config=configs/imagenet_msdnet.py:dsn     deep supervision: the same network
    python train.py --config=configs/imagenet_msdnet.py:byot    self-distillation

Photographs are read and cropped during training (random resized crops and flips; the central 224 of
256 in evaluation). `python -m dfs_jax.data.prepare imagenet2012` says what to download first.
`--config.data.num_workers=N` decodes in N processes instead of threads.

Hardware and time: written for several GPUs; not run here.

Accuracy (%) of exits 1 to 5 in Gong et al., ECCV 2024:

    MSDNet             56.64 65.14 68.42 69.77 71.34
    GE                 57.28 66.22 70.24 71.71 72.43
    CAGrad             58.37 64.21 66.88 68.22 69.42
    PCGrad             57.62 64.87 68.93 71.05 72.45
    Meta-GF            57.43 64.82 69.08 71.67 73.27
    WPN (300 epochs)   61.64 67.89 71.61 73.82 75.03
    DFS                61.80 68.03 70.75 71.79 72.88

at 339.90, 685.46, 1008.16, 1254.47 and 1360.53 million operations.
"""

from configs import common


def get_config(method: str = "dfs"):
    """Returns the config; `method` is the word after the file's colon: "dfs", "dsn" or "byot"."""
    config = common.get_config()
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.augmentation = "random_resized_crop,flip"
    config.model.name = "msdnet_imagenet"
    config.batch_size = 256
    config.eval_batch_size = 250
    config.epochs = 90
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "multistep"
    config.schedule.decay_epochs = (70, 80, 85)
    # The code published for MSDNet does not stop the exits' gradients.
    return common.set_method(config, method, referencing="trunk_only")
