"""ViT-Tiny with seven exits on ImageNet, trained with Deep Feature Surgery.

    python train.py --config=configs/imagenet_vit.py --config.init_from=FILE         DFS
    python train.py --config=configs/imagenet_vit.py:dsn --config.init_from=FILE     plain network
    python train.py --config=configs/imagenet_vit.py:byot --config.init_from=FILE    distillation

FILE holds a pretrained backbone under timm's names, such as `vit_tiny_patch16_224`'s
`model.safetensors`; exits after layers 6 to 12 start from nothing, as their number of classes is
free. Without it everything does, for which the learning rate is too small. `--config.model.name`
also takes `vit_small` and `vit_base`.

The network and its recipe are complete, its input is not: images are not yet read from disk as
training goes, nor cut at random places and scales. Until then this config scales every image to
224x224 and holds the set in memory, which only a part of ImageNet fits into.

Hardware and time: written for several GPUs; not run here. DFS saves no work here, see `ViT`.
"""

from configs import common


def get_config(method: str = "dfs"):
    """Returns the run's config; `method` ("dfs", "dsn" or "byot") stands after the file's colon."""
    config = common.get_config()
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.augmentation = "flip"
    config.model.name = "vit_tiny"
    config.batch_size = 1024
    config.eval_batch_size = 250
    config.epochs = 60
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-5
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "cosine"
    # The code published for ViT leaves exits their whole gradient.
    return common.set_method(config, method, referencing="trunk_only")
