"""MeMo for two cores and some thousands of short utterances.

    memo-jax train --config configs/small.py --workdir runs/small --config.data.train=DATASET …

It takes about 95 CPU-minutes. How most of it was chosen, on validation data, and what it reaches is in
experiments/learning.md, section "MeMo": each of the two networks is good, and the mean of their scores is better.
"""

from ml_collections import ConfigDict

import base


def get_config() -> ConfigDict:
    """Returns a small MeMo with an adaptive optimiser and quick teachers."""
    config = base.get_config()
    config.total_epochs = -1.0
    config.total_steps = 6000

    config.data.batch_size = 48
    config.data.global_seconds = 1.0
    config.data.local_crops = 0
    # More augmentation is better where recordings differ in noise and rooms; where they do not, less is.
    config.augment.clean = 0.5
    config.augment.both = 0.17
    config.augment.bank_seconds = 5.0

    # Few channels and a stride of 2, for the sake of many epochs.
    config.model.embedding_dim = 128
    config.model.ecapa_channels = (128, 128, 128, 128, 384)
    config.model.ecapa_stride = 2
    config.model.resnet_base_channels = 8
    config.model.resnet_blocks = (1, 1, 1, 1)
    config.model.resnet_stride = 2
    config.model.head_hidden = 256
    config.model.head_bottleneck = 64
    config.model.prototypes = 256

    # Balanced targets: with a centre, teachers become uniform over their prototypes.
    config.loss.targets = "sinkhorn"
    config.loss.mean_entropy = 1.0
    config.loss.koleo = 0.1
    config.loss.contrastive_temperature = 0.05
    config.loss.contrastive_margin = 0.1

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 8e-3
    config.optimizer.warmup_epochs = -1.0
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 1e-4

    config.teacher.momentum = 0.95
    config.teacher.temp = 0.025
    config.teacher.end_temp = 0.025

    config.gate.rule = "always"  # rules that close the gate have not been compared at this size
    config.gate.window_epochs = -1.0
    config.gate.window_steps = 100
    config.gate.min_epochs = -1.0
    config.gate.min_steps = 200
    config.gate.smoothing = 0.98

    config.checkpoint.every_epochs = -1.0
    config.checkpoint.every_steps = 250
    config.checkpoint.keep_every_epochs = 0.0
    config.evaluation.every_epochs = -1.0
    config.evaluation.every_steps = 1500
    config.collapse.patience_steps = 300
    return config
