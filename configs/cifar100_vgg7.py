from configs import common


def get_config():
    config = common.get_config()
    config.data.name = "cifar100"
    config.data.augmentation = "crop,flip,autoaugment,cutout"
    config.model.name = "vgg7"
    config.batch_size = 500
    config.epochs = 100
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "multistep"
    config.schedule.decay_epochs = (70, 85, 90)
    return config
