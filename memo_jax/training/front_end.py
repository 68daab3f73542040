"""The front end of training, on the device: int16 crops in, augmented views of normalised features out."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from memo_jax.features import FRONT_ENDS
from memo_jax.training.augment import augment

KINDS = ("global", "local")


def training_views(
    key: jax.Array,
    batch: Mapping[str, jax.Array],
    banks: Mapping[str, jax.Array],
    *,
    front_end: str,
    masked_bins: int = 0,
    **settings: Any,
) -> tuple[jax.Array, ...]:
    """Returns the views of a batch, float32 [B, V, T, 80] for each kind of crop, global crops first.

    Args:
      key: a jax.random key; every draw of the augmentation comes from it.
      batch: {"global": crops, "local": crops}, int16 [B, V, L] at 16 kHz; "local" may be missing.
      banks: recordings and room responses, as `augment` takes them.
      front_end: a name in `features.FRONT_ENDS`.
      masked_bins: width of the widest band of mel bins that a crop loses, 0 to 80; see `mask_bins`.
      **settings: the shares and ranges that `augment` takes.
    """
    views = []
    for i, kind in enumerate(KINDS):
        if kind in batch:
            crops = batch[kind]
            count = crops.shape[1]
            with jax.named_scope("augment"):
                waves = crops.reshape(-1, crops.shape[-1]).astype(jnp.float32) / 32768
                waves = augment(jax.random.fold_in(key, i), waves, banks, views=count, **settings)
            with jax.named_scope("mel"):
                x, _ = FRONT_ENDS[front_end](waves)
            if masked_bins:
                x = mask_bins(jax.random.fold_in(key, len(KINDS) + i), x, masked_bins)
            views.append(x.reshape((-1, count) + x.shape[1:]))
    return tuple(views)


def clean_features(batch: Mapping[str, jax.Array], *, front_end: str) -> jax.Array:
    """Returns the features, float32 [B, T, 80], of the first global crop of each utterance as it is in the batch."""
    with jax.named_scope("mel"):
        return FRONT_ENDS[front_end](batch["global"][:, 0].astype(jnp.float32) / 32768)[0]


def mask_bins(key: jax.Array, x: jax.Array, widest: int) -> jax.Array:
    """Returns features [N, T, F] with a random band of neighbouring mel bins of each crop set to zero, their mean.

    Width (0 to `widest`) and place are uniform. Every draw of crop i comes from `fold_in(key, i)`. This is the
    frequency masking of SpecAugment (Park et al., Interspeech 2019): no crop can be recognised by a few bins alone.
    """
    rows, _, bins = x.shape

    def band(key):
        width_key, place_key = jax.random.split(key)
        width = jax.random.randint(width_key, (), 0, widest + 1)
        start = jax.random.randint(place_key, (), 0, bins - width + 1)
        number = jnp.arange(bins)
        return (number >= start) & (number < start + width)

    masked = jax.vmap(band)(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows)))
    return jnp.where(masked[:, None, :], 0.0, x)
