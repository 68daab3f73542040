r"""MeMo as its authors train it: ECAPA-TDNN 512 and ResNet34 on VoxCeleb2, 150 epochs at a batch of 240.

    memo-jax train --config configs/memo_voxceleb2.py --workdir runs/memo \
        --config.data.train=data/voxceleb2 --config.augment.noise=musan/noise --config.augment.music=musan/music \
        --config.augment.speech=musan/speech --config.augment.rirs=RIRS_NOISES/simulated_rirs

The authors report 3.10 % EER on VoxCeleb1-O for the ECAPA teacher. We have not run this recipe at full length.
"""

from ml_collections import ConfigDict

import base


def get_config() -> ConfigDict:
    """Returns the authors' recipe."""
    config = base.get_config()
    config.model.crop_remat = False  # accelerators have the memory
    return config
