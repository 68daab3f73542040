"""MeMo for two cores in about three hours: configs/small.py with almost three times the steps.

memo-jax train --config configs/medium.py --workdir runs/medium --config.data.train=DATASET …
"""

import small


def get_config():
    """Returns a small MeMo that trains for longer."""
    config = small.get_config()
    config.total_steps = 16000
    return config
