"""AAM-softmax on the dataset's speakers: training with labels, by the same loop.

    memo-jax train --config configs/supervised.py --workdir runs/supervised --config.data.train=DATASET …

Large-margin fine-tuning continues for five epochs with a margin of 0.5, crops of 6 s and a learning rate of 2e-3. The
loss gate and the correction of labels, which `configs/large_margin.py` has for clusters, are switched off:

    memo-jax train --config configs/large_margin.py --workdir runs/large_margin --init runs/supervised \
        --config.data.train=DATASET --config.supervised.loss_gate_after_epochs=0 \
        --config.supervised.correct_labels_after_epochs=0 …
"""

from ml_collections import ConfigDict

import small


def get_config() -> ConfigDict:
    """Returns an ECAPA-TDNN that learns its speakers."""
    config = small.get_config()
    config.total_steps = 1200

    config.model.branches = ("ecapa",)
    # Every run has a projection head; here nothing is learned through it.
    config.model.head_hidden = 16
    config.model.head_bottleneck = 16
    config.model.prototypes = 16

    config.loss.self = 0.0
    config.loss.cross = 0.0
    config.loss.contrastive = 0.0
    config.loss.mean_entropy = 0.0
    config.loss.koleo = 0.0
    config.gate.rule = "never"
    config.supervised.weight = 1.0
    config.supervised.margin_warmup_epochs = 1.0

    config.optimizer.learning_rate = 1e-2  # times 48/256
    config.optimizer.warmup_steps = 50

    config.evaluation.every_steps = 300
    return config
