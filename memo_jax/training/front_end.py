"""The front end of training, on the device: int16 crops in, augmented and normalised log-mel views out."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from memo_jax import features
from memo_jax.training.augment import augment

KINDS = ("global", "local")


def training_views(
    key: jax.Array,
    batch: Mapping[str, jax.Array],
    banks: Mapping[str, jax.Array],
    masked_bins: int = 0,
    **settings: Any,
) -> tuple[jax.Array, ...]:
    """Returns the views of a batch, float32 [B, V, T, 80] for each kind of crop, global crops first.

    Args:
      key: a jax.random key; every draw of the augmentation comes from it.
      batch: {"global": crops, "local": crops}, int16 [B, V, L] at 16 kHz; "local" may be missing.
      banks: recordings and room responses, as `augment` takes them.
      masked_bins: in each crop up to so many neighbouring mel bins become zero, their mean; 0 to 80.
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
            if masked_bins:
                mel = mask_bins(jax.random.fold_in(key, len(KINDS) + i), mel, masked_bins)
            views.append(mel.reshape((-1, count) + mel.shape[1:]))
    return tuple(views)


def mask_bins(key: jax.Array, mel: jax.Array, most: int) -> jax.Array:
    """Returns log-mel crops [N, T, F] with zeros in a band of 0 to `most` neighbouring bins, of each crop its own.

    Both its width and its place are uniform, every draw of crop i comes from `fold_in(key, i)`. The frequency masking
    of SpecAugment (Park et al., Interspeech 2019): no crop can be told by what a microphone or codec does to few bins.
    """
    rows, _, bins = mel.shape

    def band(key):
        width_key, place_key = jax.random.split(key)
        width = jax.random.randint(width_key, (), 0, most + 1)
        start = jax.random.randint(place_key, (), 0, bins - width + 1)
        number = jnp.arange(bins)
        return (number >= start) & (number < start + width)

    masked = jax.vmap(band)(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows)))
    return jnp.where(masked[:, None, :], 0.0, mel)
