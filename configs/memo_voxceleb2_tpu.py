"""The authors' recipe in the form that TPUs run fastest: bfloat16, and the ResNet's planes packed to fill its lanes.

memo-jax plan --config configs/memo_voxceleb2_tpu.py --topology v5e:2x2 --config.data.batch_size=128
"""

from ml_collections import ConfigDict

import memo_voxceleb2


def get_config() -> ConfigDict:
    """Returns memo_voxceleb2 with the options for TPUs; parameters and checkpoints have the same shapes."""
    config = memo_voxceleb2.get_config()
    config.model.dtype = "bfloat16"
    config.model.resnet_packed = True
    return config
