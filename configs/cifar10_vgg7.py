from configs import common


def get_config():
    config = common.get_config()
    config.data.name = "cifar10"
    config.model.name = "vgg7"
    config.batch_size = 125
    config.epochs = 30
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 5e-4
    config.schedule.warmup_epochs = 1.0
    return config
