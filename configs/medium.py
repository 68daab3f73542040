"""MeMo for two cores: configs/small.py with almost three times the steps.

    memo-jax train --config configs/medium.py --workdir runs/medium --config.data.train=DATASET …

It takes 110 to 240 CPU-minutes: an hour on two quick cores, two and a half on two slow and busy ones. What it reaches
is in experiments/learning.md, section "MeMo": the network that comes with the package is from here.
"""

from ml_collections import ConfigDict

import small


def get_config() -> ConfigDict:
    """Returns a small MeMo that trains for longer."""
    config = small.get_config()
    config.total_steps = 16000
    return config
