"""NT-Xent alone on one ECAPA-TDNN: the most that an hour or two on one core teaches without labels.

    memo-jax train --config configs/contrastive.py --workdir runs/contrastive --config.data.train=DATASET …

Commands, what else was tried, and all numbers are in experiments/learning.md.
"""

import small


def get_config():
    """Returns one branch that learns by its contrastive loss only."""
    config = small.get_config()
    config.data.batch_size = 48
    config.data.local_crops = 0

    config.model.branches = ("ecapa",)
    config.model.ecapa_stride = 2
    # The head is there, as in every run, but nothing is learned through it.
    config.model.head_hidden = 16
    config.model.head_bottleneck = 16
    config.model.prototypes = 16

    config.loss.self = 0.0
    config.loss.cross = 0.0
    return config
