"""The study over many epochs: configs/study.py at a size at which one core sees its data sixty times.

    python experiments/run.py --config configs/study_epochs.py --rows … (see experiments/many_epochs.md)

A thousand recordings, an ECAPA-TDNN of 64 channels and a small ResNet, both with a stride of 2. Targets are balanced,
as in SDPN: with a centre, the teacher becomes uniform over its prototypes. Crops are longer than in the study, and
half of them clean: with those of the study, DINO did not pass log-mel statistics.
"""

from ml_collections import ConfigDict

import study


def get_config() -> ConfigDict:
    """Returns a MeMo of 60 epochs of cheap steps, which rows of the ablation change."""
    config = study.get_config()
    config.total_epochs = 60.0
    config.total_steps = -1
    config.data.batch_size = 48
    config.data.global_seconds = 2.0
    config.data.local_seconds = 1.0
    config.augment.clean = 0.5
    config.augment.both = 0.17

    config.model.embedding_dim = 64
    config.model.ecapa_channels = (64, 64, 64, 64, 192)
    config.model.ecapa_stride = 2
    config.model.resnet_base_channels = 8
    config.model.resnet_stride = 2
    config.model.head_hidden = 256
    config.model.head_bottleneck = 64
    config.model.prototypes = 256

    config.loss.targets = "sinkhorn"
    config.loss.mean_entropy = 1.0
    config.loss.koleo = 0.1
    config.teacher.temp = 0.025
    config.teacher.end_temp = 0.025

    config.gate.smoothing = 0.98
    config.gate.window_steps = 110  # five epochs of the study's 1,085 recordings
    config.gate.min_steps = 220
    config.gate.stop_steps = 330

    config.checkpoint.every_steps = 220
    config.evaluation.every_steps = 440
    return config
