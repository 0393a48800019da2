"""ViT-Tiny with seven exits on ImageNet, trained with Deep Feature Surgery.

    python train.py --config=configs/imagenet_vit.py --config.init_from=FILE         DFS
    python train.py --config=configs/imagenet_vit.py:dsn --config.init_from=FILE     plain network
    python train.py --config=configs/imagenet_vit.py:byot --config.init_from=FILE    distillation

FILE contains a pretrained backbone under timm's names, such as `vit_tiny_patch16_224`'s
`model.safetensors`. The exits after layers 6 to 12 are initialised at random, since their number of
classes can differ. Without FILE the whole network is, and the learning rate is too small for that.
`--config.model.name` also accepts `vit_small` and `vit_base`.

Photographs are read and cropped during training (random resized crops and flips; the central 224 of
256 in evaluation). `python -m dfs_jax.data.prepare imagenet2012` says what to download first.
`--config.data.num_workers=N` decodes in N processes instead of threads.

Hardware and time: written for several GPUs; not run here. DFS saves no operations here, see `ViT`.
"""

from configs import common


def get_config(method: str = "dfs"):
    """Returns the config; `method` is the word after the file's colon: "dfs", "dsn" or "byot"."""
    config = common.get_config()
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.augmentation = "random_resized_crop,flip"
    config.model.name = "vit_tiny"
    config.batch_size = 1024
    config.eval_batch_size = 250
    config.epochs = 60
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-5
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "cosine"
    # The code published for ViT does not stop the exits' gradients.
    return common.set_method(config, method, referencing="trunk_only")
