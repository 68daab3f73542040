"""A MeMo so small that `make demo` learns to tell voices apart in a few minutes on two cores.

    make demo

Both branches, both heads and the contrastive term are there; only sizes, crops and the length of the run are small.
experiments/demo.py fills in the data. On other data than the demo's, start with configs/small.py.
"""

from ml_collections import ConfigDict

import base


def get_config() -> ConfigDict:
    """Returns the demo's config."""
    config = base.get_config()
    config.total_epochs = -1.0
    config.total_steps = 150

    config.data.batch_size = 32
    config.data.global_seconds = 1.0
    config.data.local_crops = 2
    config.data.local_seconds = 0.5
    config.augment.bank_seconds = 4.0  # as long as the demo's noises

    config.model.embedding_dim = 64
    config.model.ecapa_channels = (64, 64, 64, 64, 192)
    config.model.resnet_base_channels = 4
    config.model.resnet_blocks = (1, 1, 1, 1)
    config.model.head_hidden = 256
    config.model.head_bottleneck = 64
    config.model.prototypes = 512

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.024  # 3e-3 at a batch of 32
    config.optimizer.warmup_epochs = -1.0
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 1e-4
    config.optimizer.freeze_prototypes_epochs = -1.0
    config.optimizer.freeze_prototypes_steps = 10

    config.teacher.momentum = 0.9
    config.teacher.end_temp = 0.04
    config.teacher.temp_warmup_epochs = 0

    config.gate.rule = "step"
    config.gate.stop_epochs = -1.0
    config.gate.stop_steps = 100

    config.checkpoint.every_epochs = -1.0
    config.checkpoint.every_steps = 50
    config.checkpoint.keep_every_epochs = 0.0
    config.evaluation.every_epochs = -1.0
    config.evaluation.every_steps = 25
    config.collapse.patience_steps = 100
    config.log_every_steps = 1
    return config
