"""Plain DINO on VoxCeleb2: one ECAPA-TDNN, one head, no cross-distillation, no contrastive term.

    memo-jax train --config configs/dino_voxceleb2.py --workdir runs/dino --config.data.train=data/voxceleb2 …

The baseline of the MeMo paper, here with the optimiser and the crops of `memo_voxceleb2.py`. We have not run it at full
length.
"""

from ml_collections import ConfigDict

import base


def get_config() -> ConfigDict:
    """Returns MeMo's recipe without what makes it MeMo."""
    config = base.get_config()
    config.model.branches = ("ecapa",)
    config.model.crop_remat = False
    config.loss.cross = 0.0
    config.gate.rule = "never"
    return config
