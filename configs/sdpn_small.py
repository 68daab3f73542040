"""SDPN for two cores and a few thousand short utterances.

    memo-jax train --config configs/sdpn_small.py --workdir runs/sdpn --config.data.train=DATASET …

The sizes and the optimiser of `small.py` with the losses and the views of `sdpn_voxceleb2.py`.
"""

from ml_collections import ConfigDict

import sdpn_voxceleb2
import small


def get_config() -> ConfigDict:
    """Returns a small SDPN."""
    config = sdpn_voxceleb2.with_sdpn(small.get_config())
    config.data.local_crops = 4
    config.data.local_seconds = 0.6
    return config
