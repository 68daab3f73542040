"""MeMo for two cores and a few thousand short utterances."""

import base


def get_config():
    """Returns a small MeMo with an adaptive optimiser and quick teachers."""
    config = base.get_config()
    config.total_epochs = -1.0
    config.total_steps = 1500

    config.data.batch_size = 64
    config.data.global_seconds = 2.0
    config.data.local_seconds = 1.0

    config.model.embedding_dim = 128
    config.model.ecapa_channels = (128, 128, 128, 128, 384)
    config.model.resnet_base_channels = 8
    config.model.head_hidden = 512
    config.model.head_bottleneck = 128
    config.model.prototypes = 2048

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.end_learning_rate = 1e-5
    config.optimizer.warmup_epochs = -1.0
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 1e-4
    config.optimizer.freeze_prototypes_epochs = 1.0

    config.teacher.momentum = 0.95
    config.teacher.temp_warmup_epochs = 10

    config.gate.rule = "always"
    config.checkpoint.every_epochs = -1.0
    config.checkpoint.every_steps = 200
    config.checkpoint.keep_every_epochs = 0.0
    config.evaluation.every_epochs = -1.0
    config.evaluation.every_steps = 200
    return config
