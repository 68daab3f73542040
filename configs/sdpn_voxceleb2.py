"""SDPN on VoxCeleb2: one ECAPA-TDNN whose teacher sees a single clean view, and balanced targets over 1,024 prototypes.

    memo-jax train --config configs/sdpn_voxceleb2.py --workdir runs/sdpn --config.data.train=data/voxceleb2 …

Chen et al. report 1.80 % EER on VoxCeleb1-O with the ECAPA-TDNN of 1,024 channels, as 3D-Speaker has it. Sharpening to
the power 4 is a temperature of 0.1 / 4. Small batches hurt it. We have not run it at full length.
"""

from ml_collections import ConfigDict

import base


def with_sdpn(config: ConfigDict) -> ConfigDict:
    """Returns a config with SDPN's losses and views; sizes and optimiser stay."""
    config.data.global_crops = 1

    config.model.branches = ("ecapa",)
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


def get_config() -> ConfigDict:
    """Returns SDPN's recipe."""
    config = with_sdpn(base.get_config())
    config.data.batch_size = 384

    config.model.ecapa_channels = (1024, 1024, 1024, 1024, 3072)
    config.model.embedding_dim = 512
    config.model.prototypes = 1024

    config.optimizer.learning_rate = 0.4
    config.optimizer.warmup_epochs = 10.0
    return config
