"""SDPN for two cores and a few thousand short utterances.

    memo-jax train --config configs/sdpn_small.py --workdir runs/sdpn --config.data.train=DATASET …

The sizes and the optimiser of `small.py` with the losses and the views of `sdpn_voxceleb2.py`.
"""

import small


def get_config():
    """Returns a small SDPN."""
    config = small.get_config()
    config.data.batch_size = 48
    config.data.global_crops = 1
    config.data.local_crops = 4

    config.model.branches = ("ecapa",)
    config.model.prototypes = 256
    config.model.shared_prototypes = True

    config.loss.cross = 0.0
    config.loss.targets = "sinkhorn"
    config.loss.mean_entropy = 1.0
    config.loss.koleo = 0.1
    config.gate.rule = "never"

    config.teacher.view = "clean"
    config.teacher.temp = 0.025
    config.teacher.end_temp = 0.025

    config.optimizer.freeze_prototypes_epochs = 0.0
    return config
