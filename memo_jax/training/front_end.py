"""The front end of training, on the device: int16 crops in, augmented views of normalised features out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memo_jax.features import FRONT_ENDS
from memo_jax.training.augment import augment

STUDENT_CROPS = ("global", "local")  # crops that students see


class Views(NamedTuple):
    """What the networks of a step see: normalised features, float32.

    Attributes:
      students: [B, V, T, F] of each kind of crop, global crops first.
      teachers: [B, W, T, F] of crops that only teachers see. None: they see students[0], the global crops.
    """

    students: tuple[jax.Array, ...]
    teachers: jax.Array | None = None

    @property
    def of_teachers(self) -> jax.Array:
        """The views that teachers see, [B, W, T, F]."""
        return self.students[0] if self.teachers is None else self.teachers

    @property
    def shared(self) -> bool:
        """Whether the teachers' views are the first of the students'."""
        return self.teachers is None


def training_views(
    key: jax.Array,
    batch: Mapping[str, jax.Array],
    banks: Mapping[str, jax.Array],
    *,
    front_end: str,
    masked_bins: int = 0,
    clean_teachers: bool = False,
    **settings: Any,
) -> Views:
    """Returns the views of a batch, of 80 mel bins.

    Args:
      key: a jax.random key; every draw of the augmentation comes from it.
      batch: {"global": crops, "local": crops, "teacher": crops}, int16 [B, V, L] at 16 kHz. One of the students' kinds
        may be missing. Without "teacher", teachers see the students' first kind.
      banks: recordings and room responses, as `augment` takes them.
      front_end: a name in `features.FRONT_ENDS`.
      masked_bins: width of the widest band of mel bins that a crop loses, 0 to 80; see `mask_bins`.
      clean_teachers: crops for teachers only are neither augmented nor masked.
      **settings: the shares and ranges that `augment` takes.

    Raises:
      ValueError: as `augment` does.
    """

    def views_of(crops, augment_number, mask_number, clean=False):
        """The numbers keep the draws of one kind of crop apart from those of the others."""
        count = crops.shape[1]
        with jax.named_scope("augment"):
            waves = crops.reshape(-1, crops.shape[-1]).astype(jnp.float32) / 32768
            if not clean:
                waves = augment(jax.random.fold_in(key, augment_number), waves, banks, views=count, **settings)
        with jax.named_scope("mel"):
            x, _ = FRONT_ENDS[front_end](waves)
        if masked_bins and not clean:
            x = mask_bins(jax.random.fold_in(key, mask_number), x, masked_bins)
        return x.reshape((-1, count) + x.shape[1:])

    students = tuple(
        views_of(batch[kind], i, len(STUDENT_CROPS) + i) for i, kind in enumerate(STUDENT_CROPS) if kind in batch
    )
    if "teacher" not in batch:
        return Views(students)
    return Views(
        students, views_of(batch["teacher"], 2 * len(STUDENT_CROPS), 2 * len(STUDENT_CROPS) + 1, clean_teachers)
    )


def clean_features(batch: Mapping[str, jax.Array], *, front_end: str) -> jax.Array:
    """Returns the features, float32 [B, T, 80], of the students' first crop of each utterance as it is in the batch."""
    crops = next(batch[kind] for kind in STUDENT_CROPS if kind in batch)
    with jax.named_scope("mel"):
        return FRONT_ENDS[front_end](crops[:, 0].astype(jnp.float32) / 32768)[0]


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
