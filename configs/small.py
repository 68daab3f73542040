"""MeMo for two cores and a few thousand short utterances.

    memo-jax train --config configs/small.py --workdir runs/small --config.data.train=DATASET …

On one core it takes about an hour (2.7 CPU-seconds a step). Trained on utterances of speechocean762 and LibriSpeech, it
reaches 9.70 % EER on the test trials of speechocean762. Commands, what else was tried, and all numbers are in
experiments/README.md.
"""

import base


def get_config():
    """Returns a small MeMo with an adaptive optimiser and quick teachers."""
    config = base.get_config()
    config.total_epochs = -1.0
    config.total_steps = 1200

    config.data.batch_size = 24
    config.data.global_seconds = 1.0
    config.data.local_crops = 2
    config.data.local_seconds = 0.6
    config.augment.bank_seconds = 5.0

    config.model.embedding_dim = 128
    config.model.ecapa_channels = (256, 256, 256, 256, 768)
    config.model.resnet_base_channels = 4
    config.model.resnet_blocks = (1, 1, 1, 1)
    config.model.head_hidden = 512
    config.model.head_bottleneck = 128
    config.model.prototypes = 2048

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 8e-3
    config.optimizer.warmup_epochs = -1.0
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 1e-4

    config.teacher.momentum = 0.95
    config.teacher.temp_warmup_epochs = 3

    config.gate.rule = "always"  # rules that close the gate have not been compared at this size
    config.gate.window_epochs = -1.0
    config.gate.window_steps = 100
    config.gate.min_epochs = -1.0
    config.gate.min_steps = 200
    config.gate.smoothing = 0.98

    config.checkpoint.every_epochs = -1.0
    config.checkpoint.every_steps = 100
    config.checkpoint.keep_every_epochs = 0.0
    config.evaluation.every_epochs = -1.0
    config.evaluation.every_steps = 150
    config.collapse.patience_steps = 300
    return config
