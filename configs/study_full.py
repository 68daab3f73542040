"""The study's MeMo at the authors' sizes, for accelerators.

    python experiments/accelerator.py --output DIR --data DIR

Networks, heads and crops are those of base.py, in bfloat16. Schedules are those of study.py, which accelerator.py
stretches to as many steps as its minutes hold; the batch is smaller where this one does not fit.
"""

from ml_collections import ConfigDict

import base
import study


def get_config() -> ConfigDict:
    """Returns the study's schedules with the authors' networks."""
    config, authors = study.get_config(), base.get_config()
    config.model = authors.model
    config.model.dtype = "bfloat16"
    # No learning rate was tried at this width. The key is scaled by the batch, which would make 4e-3 of the study's
    # 7.5e-4; scaled by the square root, it is 1.7e-3.
    config.optimizer.learning_rate *= (config.data.batch_size / 128) ** 0.5
    config.data.batch_size = 128
    for key in ("global_crops", "global_seconds", "local_crops", "local_seconds"):
        config.data[key] = authors.data[key]
    return config
