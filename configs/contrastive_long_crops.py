r"""The second part of configs/contrastive.py: crops of two seconds, at a low learning rate, from its network.

    memo-jax export --model runs/contrastive --output contrastive.safetensors
    memo-jax train --config configs/contrastive_long_crops.py --workdir runs/contrastive-long \
        --config.init=contrastive.safetensors --config.data.train=DATASET …

Commands and all numbers are in experiments/learning.md.
"""

import contrastive


def get_config():
    """Returns configs/contrastive.py for a few steps with longer crops."""
    config = contrastive.get_config()
    config.total_steps = 120
    config.data.batch_size = 32
    config.data.global_seconds = 2.0

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.teacher.momentum = 0.98

    config.checkpoint.every_steps = 40
    config.checkpoint.keep_every_steps = 40
    config.evaluation.every_steps = 60
    return config
