"""The front end of training, on the device: int16 crops in, augmented and normalised log-mel views out."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from memo_jax import features
from memo_jax.training.augment import augment

KINDS = ("global", "local")


def training_views(
    key: jax.Array, batch: Mapping[str, jax.Array], banks: Mapping[str, jax.Array], **settings: Any
) -> tuple[jax.Array, ...]:
    """Returns the views of a batch, float32 [B, V, T, 80] for each kind of crop, global crops first.

    Args:
      key: a jax.random key; every draw of the augmentation comes from it.
      batch: {"global": crops, "local": crops}, int16 [B, V, L] at 16 kHz; "local" may be missing.
      banks: recordings and room responses, as `augment` takes them.
      **settings: the shares and ranges that `augment` takes.
    """
    views = []
    for i, kind in enumerate(KINDS):
        if kind in batch:
            crops = batch[kind]
            count = crops.shape[1]
            waves = crops.reshape(-1, crops.shape[-1]).astype(jnp.float32) / 32768
            waves = augment(jax.random.fold_in(key, i), waves, banks, views=count, **settings)
            mel = features.normalized_log_mel(features.mel_power(waves))
            views.append(mel.reshape((-1, count) + mel.shape[1:]))
    return tuple(views)
