"""AAM-softmax on clusters instead of speakers: the second stage, after self-supervised training.

    memo-jax cluster --model MODEL --data DATASET --output clusters.tsv
    memo-jax train --config configs/pseudo_labels.py --workdir runs/stage2 --init MODEL --config.data.train=DATASET \
        --config.supervised.labels=clusters.tsv …

MODEL must be a network of this size (`configs/small.py`, its ECAPA-TDNN). Durations and crops are those of the recipe
for VoxCeleb2 in theolepage/wavlm_ssl_sv.
"""

from ml_collections import ConfigDict

import supervised


def get_config() -> ConfigDict:
    """Returns an ECAPA-TDNN that learns clusters."""
    config = supervised.get_config()
    config.total_epochs = 15.0
    config.total_steps = -1
    config.data.global_seconds = 3.0
    config.supervised.scale = 30.0
    config.supervised.margin = 0.2
    config.supervised.loss_gate_after_epochs = 4
    config.supervised.correct_labels_after_epochs = 8
    return config
