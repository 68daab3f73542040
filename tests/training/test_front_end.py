"""The front end of training: masks of mel bins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from memo_jax.features import FRONT_ENDS
from memo_jax.training.front_end import mask_bins, training_views

CROPS, BINS, MOST = 400, 80, 12


def test_each_crop_loses_a_band_of_its_own_and_nothing_else():
    mel = jnp.float32(np.random.default_rng(0).normal(1, 0.1, (CROPS, 5, BINS)))
    mask = jax.jit(mask_bins, static_argnums=2)
    masked = np.asarray(mask(jax.random.key(0), mel, MOST))
    lost = (masked == 0).all(axis=1)  # [N, F]: over all frames
    np.testing.assert_array_equal(masked, np.where(lost[:, None], 0, mel))
    widths, edges = lost.sum(axis=1), np.abs(np.diff(np.pad(lost, ((0, 0), (1, 1))).astype(int))).sum(axis=1)
    assert set(edges[widths > 0]) == {2}, "one band, without gaps"
    assert set(widths) == set(range(MOST + 1)) and abs(widths.mean() - MOST / 2) < 1
    assert (lost.mean(axis=0) > 0.005).all(), "every bin is lost at times"
    np.testing.assert_array_equal(masked[:7], mask(jax.random.key(0), mel[:7], MOST))


def test_masks_are_the_last_thing_that_a_view_gets_and_off_costs_nothing():
    crops = np.random.default_rng(1).integers(-9000, 9000, (3, 2, 4000)).astype(np.int16)
    batch, key = {"global": crops, "local": crops[:, :1, :3000]}, jax.random.key(1)
    views_of = jax.jit(functools.partial(training_views, front_end="log_mel"), static_argnames="masked_bins")
    plain, masked = (views_of(key, batch, {}, masked_bins=most) for most in (0, 40))
    assert plain.shared and masked.shared
    for whole, part in zip(plain.students, masked.students, strict=True):
        assert whole.shape == part.shape and np.any(part != whole)
        np.testing.assert_array_equal(part, np.where(part == 0, 0, whole))
    programs = [
        str(jax.make_jaxpr(functools.partial(training_views, front_end="log_mel", **options))(key, batch, {}))
        for options in ({}, {"masked_bins": 0}, {"masked_bins": 40})
    ]
    assert programs[0] == programs[1] != programs[2]


def test_crops_for_teachers_are_views_of_their_own_augmented_or_clean():
    crops = np.random.default_rng(2).integers(-9000, 9000, (3, 2, 4000)).astype(np.int16)
    key, options = jax.random.key(1), {"front_end": "log_mel", "masked_bins": 40}
    views_of = jax.jit(functools.partial(training_views, **options), static_argnames="clean_teachers")
    batch = {"global": crops, "local": crops[:, :1, :3000]}
    plain, augmented = (views_of(key, batch | more, {}) for more in ({}, {"teacher": crops}))
    for one, other in zip(plain.students, augmented.students, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(plain.of_teachers, plain.students[0])
    assert not augmented.shared and augmented.of_teachers.shape == augmented.students[0].shape
    assert np.any(augmented.of_teachers != augmented.students[0]), "other draws"
    batch = {"local": batch["local"], "teacher": crops}
    views = views_of(key, batch, {}, clean_teachers=True)
    expected, _ = FRONT_ENDS["log_mel"](jnp.float32(crops.reshape(-1, 4000) / 32768))
    np.testing.assert_allclose(views.of_teachers.reshape(expected.shape), expected, atol=1e-4)
    assert len(views.students) == 1 and views.students[0].shape[1] == 1
