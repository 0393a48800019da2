"""Handwritten digits, which come with scikit-learn: the main job in a minute or two, offline."""

from configs import common


def get_config():
    config = common.get_config()
    config.data.name = "digits"
    config.data.augmentation = "crop"  # a mirrored digit is another sign
    config.data.crop_padding = 2
    config.data.crop_fill = 0  # the digits' own background
    config.model.width = 16
    config.batch_size = 64
    config.epochs = 40
    config.eval_every_epochs = 2
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 5e-4
    config.schedule.warmup_epochs = 2.0
    return config
