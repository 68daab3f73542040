"""AM-NT-Xent alone on one ECAPA-TDNN, with the authors' augmentation: what 147 CPU-minutes teach without labels.

    memo-jax train --config configs/contrastive.py --workdir runs/contrastive --config.data.train=DATASET …
    python experiments/whiten.py --model runs/contrastive --data DATASET --output contrastive.safetensors

Commands, what else was tried, and the main numbers are in experiments/learning.md, section "A contrastive loss alone".
"""

from ml_collections import ConfigDict

import small


def get_config() -> ConfigDict:
    """Returns one branch that learns by its contrastive loss only."""
    config = small.get_config()
    config.total_steps = 16000

    config.augment.clean = 1 / 6
    config.augment.both = 1 / 3

    config.model.branches = ("ecapa",)
    # Every run has a projection head; here nothing is learned through it.
    config.model.head_hidden = 16
    config.model.head_bottleneck = 16
    config.model.prototypes = 16

    config.loss.self = 0.0
    config.loss.cross = 0.0
    config.loss.mean_entropy = 0.0
    config.loss.koleo = 0.0

    config.checkpoint.every_steps = 100
    config.checkpoint.keep_every_epochs = -1.0
    config.checkpoint.keep_every_steps = 2000
    config.evaluation.every_steps = 2000
    return config
