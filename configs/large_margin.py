"""Large-margin fine-tuning: the last epochs of training on labels or clusters, with a wider margin and longer crops.

    memo-jax train --config configs/large_margin.py --workdir runs/large_margin --init runs/stage2 \
        --config.data.train=DATASET --config.supervised.labels=clusters.tsv …

From the workdir of `configs/pseudo_labels.py` with the same labels, the directions of the labels are kept, too. For
speakers as labels, `configs/supervised.py` has the command, without loss gate and correction. Margin, crops and
duration are those of the recipe for VoxCeleb2 in theolepage/wavlm_ssl_sv.
"""

from ml_collections import ConfigDict

import pseudo_labels


def get_config() -> ConfigDict:
    """Returns the config of the runs that it continues, with a margin of 0.5 and crops of 6 s."""
    config = pseudo_labels.get_config()
    config.total_epochs = 5.0
    config.data.global_seconds = 6.0
    config.supervised.margin = 0.5
    config.supervised.margin_warmup_epochs = 0.0
    config.supervised.loss_gate_after_epochs = 1
    config.supervised.correct_labels_after_epochs = 1
    config.optimizer.learning_rate = 2e-3  # a fifth of the previous run's: the network is trained already
    return config
