"""The study's MeMo: cheap enough to train many variants on one core.

    python experiments/run.py --config configs/study.py --data DATASET … (see experiments/README.md)

Steps take a second or two; schedules are for 300 of them.
"""

from ml_collections import ConfigDict

import base


def get_config() -> ConfigDict:
    """Returns a MeMo of 300 cheap steps, which rows of the ablation change."""
    config = base.get_config()
    config.total_epochs = -1.0
    config.total_steps = 300

    config.data.batch_size = 24
    config.data.global_seconds = 1.0
    config.data.local_crops = 2
    config.data.local_seconds = 0.6
    config.augment.bank_seconds = 5.0

    config.model.embedding_dim = 128
    config.model.ecapa_channels = (128, 128, 128, 128, 384)
    config.model.resnet_base_channels = 4
    config.model.resnet_blocks = (1, 1, 1, 1)
    config.model.campplus_layers = (2, 3, 2)
    config.model.campplus_growth = 16
    config.model.campplus_channels = 64
    config.model.campplus_plane_channels = 4
    config.model.head_hidden = 512
    config.model.head_bottleneck = 128
    config.model.prototypes = 2048

    # With a warm-up of 20 steps and prototypes frozen for 30, plain DINO's teacher became uniform, and its EER stayed
    # at that of the untrained network.
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 8e-3
    config.optimizer.warmup_epochs = -1.0
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 1e-4

    config.teacher.momentum = 0.95
    config.teacher.temp_warmup_epochs = 3

    config.gate.rule = "plateau"
    config.gate.smoothing = 0.97
    config.gate.window_epochs = -1.0
    config.gate.window_steps = 40
    config.gate.min_epochs = -1.0
    config.gate.min_steps = 100
    config.gate.min_improvement = 0.03
    config.gate.min_alignment = 0.2  # at 0 the gate would never close: a longer run stayed above 0.1
    config.gate.stop_epochs = -1.0
    config.gate.stop_steps = 150

    config.checkpoint.every_epochs = -1.0
    config.checkpoint.every_steps = 60
    config.checkpoint.keep = 1
    config.checkpoint.keep_every_epochs = 0.0
    config.evaluation.every_epochs = -1.0
    config.evaluation.every_steps = 60
    config.collapse.patience_steps = 200
    return config
