"""Added sounds have the requested SNR, rooms are convolutions, and every crop has a draw of its own."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import fftconvolve

import tiny
from memo_jax.training import augment as augmentation
from memo_jax.training.augment import SNR_DB, augment, draw_kinds

KEY = jax.random.key(7)
add_at_snr = jax.jit(augmentation.add_at_snr)
reverberate = jax.jit(augmentation.reverberate)
draw_recordings = jax.jit(augmentation.draw_recordings, static_argnames="samples")
mix_babble = jax.jit(augmentation.mix_babble, static_argnames="views")


def noise(*shape, seed=0, scale=0.1):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def int16_noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(-3000, 3000, shape).astype(np.int16)


def rooms(count=3, taps=50, seed=0):
    return noise(count, taps, seed=seed, scale=1.0) * np.exp(-np.arange(taps) / 8).astype(np.float32)


def snr_db(wave, added):
    return 10 * np.log10(np.sum(np.float64(wave) ** 2, -1) / np.sum(np.float64(added) ** 2, -1))


def test_add_at_snr_has_that_snr():
    waves, added = noise(4, 4000), noise(4, 4000, seed=1, scale=3.0)
    wanted = np.array([0.0, 5.0, 13.5, 20.0], np.float32)
    out = np.asarray(add_at_snr(waves, added, wanted))
    np.testing.assert_allclose(snr_db(waves, out - waves), wanted, atol=0.1)
    correlation = [np.corrcoef(x, y)[0, 1] for x, y in zip(out - waves, added)]
    np.testing.assert_allclose(correlation, 1, atol=1e-3)


def test_silence_is_safe():
    """No energy to measure an SNR against, or to rescale a room to: the crop comes back as it was, without NaN."""
    zeros, some, snr = np.zeros((1, 400), np.float32), noise(1, 400), np.zeros(1, np.float32)
    np.testing.assert_array_equal(add_at_snr(zeros, some, snr), zeros)
    np.testing.assert_array_equal(add_at_snr(some, zeros, snr), some)
    np.testing.assert_array_equal(reverberate(zeros, some[:, :50]), zeros)
    np.testing.assert_array_equal(reverberate(some, zeros[:, :50]), some)
    banks = {"noise": np.zeros((1, 400), np.int16), "rir": rooms(1)}
    silent = jax.jit(functools.partial(augment, clean=0.0, both=1.0))(KEY, np.zeros((4, 400), np.float32), banks)
    np.testing.assert_array_equal(silent, 0)


@pytest.mark.parametrize("samples, taps", [(1000, 100), (1024, 128), (100, 300), (100, 1)])
def test_reverberate_is_convolution_at_the_energy_of_the_input(samples, taps):
    """Against scipy, with several blocks, one block, a response longer than the crop and a single tap."""
    waves, responses = noise(2, samples), noise(2, taps, seed=1)
    out = np.asarray(reverberate(waves, responses))
    for wave, response, ours in zip(waves, responses, out):
        expected = fftconvolve(wave.astype(np.float64), response.astype(np.float64))[:samples]
        expected *= np.sqrt(np.sum(np.float64(wave) ** 2) / np.sum(expected**2))
        np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


def test_kinds_come_in_the_shares_asked_for():
    """20,000 draws: each share within five binomial deviations of the authors' 1/6, 1/8, 3/8 and 1/3."""
    count = 20_000
    keys = jax.random.split(KEY, count)
    draw = jax.jit(draw_kinds, static_argnames=("can_reverberate", "can_add"))
    reverberated, noisy = map(np.asarray, draw(keys, 1 / 6, 1 / 3, 0.25))
    shares = {(0, 0): 1 / 6, (1, 0): 1 / 8, (0, 1): 3 / 8, (1, 1): 1 / 3}
    for (room, added), share in shares.items():
        seen = np.mean((reverberated == room) & (noisy == added))
        assert abs(seen - share) < 5 * np.sqrt(share * (1 - share) / count), (room, added, seen)
    reverberated, noisy = map(np.asarray, draw(keys, 1 / 6, 1 / 3, 0.25, can_add=False))
    assert not noisy.any() and abs(reverberated.mean() - 5 / 6) < 5 * np.sqrt(5 / 36 / count)


def test_categories_are_uniform_and_each_keeps_its_snr_range():
    """A frequency for each category shows which was added to a crop; its SNR must lie in that category's range."""
    time, count = np.arange(256), 600
    tone = {"noise": 40, "music": 60, "speech": 80}
    banks = {name: (9000 * np.sin(2 * np.pi * f * time / 256))[None].astype(np.int16) for name, f in tone.items()}
    waves = np.tile(np.sin(2 * np.pi * 10 * time / 256).astype(np.float32), (count, 1))
    out = np.asarray(jax.jit(functools.partial(augment, clean=0.0, both=0.0, reverb_share=0.0))(KEY, waves, banks))
    added = out - waves
    loudest = np.abs(np.fft.rfft(added)).argmax(axis=1)
    for name, frequency in tone.items():
        mine = loudest == frequency
        assert abs(mine.mean() - 1 / 3) < 5 * np.sqrt(2 / 9 / count)
        measured, (low, high) = snr_db(waves[mine], added[mine]), SNR_DB[name]
        assert low - 0.1 < measured.min() < low + 1 and high - 1 < measured.max() < high + 0.1


def test_recordings_are_cut_or_repeated_and_scaled():
    """Every drawn sample is the bank's over 32768, in order from a random position, repeated when the bank is short."""
    keys = jax.random.split(KEY, 40)
    bank = np.arange(2 * 100, dtype=np.int16).reshape(2, 100)
    cut = np.asarray(draw_recordings(keys, bank, samples=30)) * 32768
    np.testing.assert_array_equal(np.diff(cut), 1)
    assert set(cut[:, 0] // 100) == {0, 1} and len(set(cut[:, 0] % 100)) > 15 and (cut[:, 0] % 100).max() <= 70
    repeated = np.asarray(draw_recordings(keys, bank, samples=250)) * 32768
    np.testing.assert_array_equal(repeated % 100, (repeated[:, :1] + np.arange(250)) % 100)
    assert np.all(repeated // 100 == repeated[:, :1] // 100) and len(set(repeated[:, 0] % 100)) > 15


@pytest.mark.parametrize("utterances, views, voices", [(6, 2, 3), (4, 1, 3), (3, 1, 2), (2, 3, 1)])
def test_babble_never_holds_the_utterance_itself(utterances, views, voices):
    """Crop i is a one at position i, so the sum shows which were mixed: `voices` different others of the same view."""
    waves = np.eye(utterances * views, dtype=np.float32)
    for seed in range(5):
        babble = np.asarray(mix_babble(jax.random.split(jax.random.key(seed), len(waves)), waves, views=views))
        assert set(np.unique(babble)) <= {0.0, 1.0} and np.all(babble.sum(1) == voices)
        utterance, view = np.divmod(np.arange(len(waves)), views)
        row, mixed = np.nonzero(babble)
        assert np.all(utterance[row] != utterance[mixed]) and np.all(view[row] == view[mixed])


def test_draws_follow_the_key_and_not_the_batch():
    """With banks for everything, a crop's result depends on the key, its position and itself, not on its neighbours."""
    banks = {name: int16_noise(3, 600, seed=i) for i, name in enumerate(SNR_DB)} | {"rir": rooms()}
    waves, run = noise(32, 400), jax.jit(augment)
    out = np.asarray(run(KEY, waves, banks))
    np.testing.assert_array_equal(out, run(KEY, waves, banks))
    changed = np.any(out != waves, axis=1)
    assert 16 < changed.sum() < 32 and out.dtype == np.float32
    other = np.asarray(run(jax.random.key(8), waves, banks))
    assert np.mean(np.any(other != out, axis=1)) > 0.8
    neighbours = np.concatenate([waves[:5], noise(27, 400, seed=9)])
    np.testing.assert_allclose(run(KEY, neighbours, banks)[:5], out[:5], atol=1e-6)
    np.testing.assert_allclose(run(KEY, waves[:5], banks), out[:5], atol=1e-6)


def test_without_banks_only_babble_remains():
    """Then 5 in 6 crops get babble at 13 to 20 dB; without it, or with everything clean, nothing changes."""
    waves = noise(300, 200)
    out = np.asarray(jax.jit(augment)(KEY, waves, {}))
    changed = np.any(out != waves, axis=1)
    assert abs(changed.mean() - 5 / 6) < 5 * np.sqrt(5 / 36 / 300)
    measured = snr_db(waves[changed], (out - waves)[changed])
    assert 12.9 < measured.min() and measured.max() < 20.1
    np.testing.assert_array_equal(augment(KEY, waves, {}, babble_from_batch=False), waves)
    np.testing.assert_array_equal(augment(KEY, waves, {"rir": rooms()}, clean=1.0), waves)


@pytest.mark.parametrize(
    "banks, settings, message",
    [
        ({}, {"clean": 1.5}, "clean = 1.5"),
        ({}, {"clean": 0.8, "both": 0.4}, "clean . both"),
        ({}, {"snr_db": {"speech": (20, 13)}}, "snr_db needs 'speech'"),
        ({}, {"views": 3}, "3 views"),
        ({"nosie": int16_noise(1, 10)}, {}, "unknown bank 'nosie'"),
        ({"noise": int16_noise(0, 10)}, {}, "'noise' must be"),
        ({"rir": int16_noise(1, 10)}, {}, "'rir' has type int16"),
    ],
)
def test_senseless_settings_are_refused(banks, settings, message):
    with pytest.raises(ValueError, match=message):
        augment(KEY, jnp.zeros((4, 20)), banks, **settings)


FOUR_DEVICES = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from memo_jax.training.augment import augment
rng = np.random.default_rng(0)
waves = rng.standard_normal((8, 400)).astype(np.float32)
banks = {"noise": rng.integers(-3000, 3000, (3, 500)).astype(np.int16), "rir": rng.random((3, 50), np.float32)}
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
sharded = jax.jit(augment, in_shardings=(whole, rows, whole), out_shardings=rows)
key = jax.random.key(0)
np.testing.assert_allclose(sharded(key, waves, banks), jax.jit(augment)(key, waves, banks), atol=1e-6)
"""


def test_four_devices_draw_what_one_draws():
    """Noise, rooms and babble of a batch sharded over devices are those of the batch on one: draws belong to crops."""
    done = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES], env=tiny.environment(devices=4), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
