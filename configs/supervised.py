"""AAM-softmax on the dataset's speakers: training with labels, by the same loop.

    memo-jax train --config configs/supervised.py --workdir runs/supervised --config.data.train=DATASET …

Large-margin fine-tuning continues from a run with a wider margin and longer crops: `--init WORKDIR
--config.supervised.margin=0.5 --config.data.global_seconds=6`.
"""

import small


def get_config():
    """Returns an ECAPA-TDNN that learns its speakers."""
    config = small.get_config()
    config.total_steps = 1200
    config.data.batch_size = 24
    config.data.local_crops = 0

    config.model.branches = ("ecapa",)
    # Every run has a projection head; here nothing is learned through it.
    config.model.head_hidden = 16
    config.model.head_bottleneck = 16
    config.model.prototypes = 16

    config.loss.self = 0.0
    config.loss.cross = 0.0
    config.loss.contrastive = 0.0
    config.gate.rule = "never"
    config.supervised.weight = 1.0
    config.supervised.margin_warmup_epochs = 1.0

    config.optimizer.learning_rate = 2e-2  # times 24/256
    config.optimizer.warmup_steps = 50
    return config
