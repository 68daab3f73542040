r"""The second part of configs/contrastive.py: crops of two seconds, at a low learning rate, from its network.

    memo-jax export --model runs/contrastive --output contrastive.safetensors
    memo-jax train --config configs/contrastive_long_crops.py --workdir runs/contrastive-long \
        --config.init=contrastive.safetensors --config.data.train=DATASET …

Commands and all numbers are in experiments/learning.md.
"""

import contrastive


def get_config():
    """Returns configs/contrastive.py for fewer and longer crops."""
    config = contrastive.get_config()
    config.total_steps = 220
    config.data.batch_size = 40
    config.data.global_seconds = 2.0

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.teacher.momentum = 0.98

    config.evaluation.every_steps = 110
    return config
