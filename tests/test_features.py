"""Front ends agree with librosa and Kaldi, and an utterance's features do not depend on what it is batched with."""

import jax
import jax.export
import kaldi_native_fbank
import librosa
import numpy as np
import pytest

from memo_jax import features


def speech_like(samples, seed=0):
    """Noise with a falling spectrum and a swelling level, float32 [samples] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    wave = np.convolve(rng.standard_normal(samples + 63), 0.9 ** np.arange(64), mode="valid")
    wave = wave * (0.1 + np.sin(np.arange(samples) / 3000) ** 2)
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def librosa_mel_power(wave):
    power = librosa.feature.melspectrogram(
        y=wave.astype(np.float64), sr=16000, n_fft=512, win_length=400, hop_length=160, window="hann", center=True,
        pad_mode="reflect", power=2.0, n_mels=80, fmin=0, fmax=8000, htk=True, norm=None,
    )  # fmt: skip
    return power.T


@pytest.mark.parametrize("samples", [16000, 15999])
def test_mel_power_is_librosas(samples):
    """Also where the last hop is incomplete; in float64, librosa is the exact value within 1e-4 of every bin."""
    wave = speech_like(samples)
    ours = np.asarray(jax.jit(features.mel_power)(wave[None]))[0]
    expected = librosa_mel_power(wave)
    assert ours.shape == expected.shape == (features.frame_count(samples), 80)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_mel_filters_are_librosas():
    theirs = librosa.filters.mel(sr=16000, n_fft=512, n_mels=80, fmin=0.0, fmax=8000.0, htk=True, norm=None)
    np.testing.assert_array_equal(features._mel_basis(), theirs.T[:256])
    assert theirs[:, 256].max() < 1e-12  # the bin that is left out


@jax.jit
def all_features(waves, lengths):
    power = features.mel_power(waves, lengths)
    frames = None if lengths is None else features.frame_count(lengths)
    return power, features.normalized_log_mel(power, frames), features.log_mel_statistics(power, frames)


def test_padding_does_not_change_an_utterance():
    """The reflection is at each utterance's own end, so it has the same frames as alone, however short it is."""
    lengths = np.array([4000, 2403, 150, 1], np.int32)
    waves = np.stack([speech_like(4000, seed) for seed in range(len(lengths))])  # padding is other sound, not zeros
    power, normalized, statistics = all_features(waves, lengths)
    for row, length in enumerate(lengths):
        frames = features.frame_count(length)
        power_alone, normalized_alone, statistics_alone = all_features(waves[row : row + 1, :length], None)
        np.testing.assert_allclose(power[row, :frames], power_alone[0], rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(normalized[row, :frames], normalized_alone[0], atol=1e-3)
        np.testing.assert_allclose(statistics[row], statistics_alone[0], rtol=1e-3, atol=1e-3)
        assert not np.asarray(normalized[row, frames:]).any()


def test_normalized_log_mel_is_instance_norm_over_time():
    """Mean 0 and biased variance v / (v + 1e-5) in every bin, and nothing that a constant gain could change."""
    power = np.random.default_rng(0).gamma(1.0, size=(2, 50, 80)).astype(np.float32) + 0.1
    normalize = jax.jit(features.normalized_log_mel)
    normalized = np.asarray(normalize(power))
    log_mel = np.log(power.astype(np.float64) + 1e-6)
    expected = (log_mel - log_mel.mean(1, keepdims=True)) / np.sqrt(log_mel.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(normalized, expected, atol=1e-4)
    np.testing.assert_allclose(normalize(100 * power), normalized, atol=1e-3)


def test_log_mel_statistics_are_mean_and_deviation():
    power = np.random.default_rng(0).gamma(1.0, size=(2, 50, 80)).astype(np.float32)
    log_mel = np.log(power.astype(np.float64) + 1e-6)
    expected = np.concatenate([log_mel.mean(1), log_mel.std(1)], axis=1)
    np.testing.assert_allclose(jax.jit(features.log_mel_statistics)(power), expected, rtol=1e-4, atol=1e-4)


def test_silence_gives_finite_features():
    """The floor in the logarithm and the epsilon in the variance: digital silence becomes zeros."""
    _, normalized, _ = all_features(np.zeros((1, 3200), np.float32), None)
    np.testing.assert_allclose(normalized, 0, atol=1e-3)


@pytest.mark.parametrize("waves", [np.zeros((1, 3200), np.int16), np.zeros(3200, np.float32), np.zeros((1, 0))])
def test_waves_of_the_wrong_kind_are_refused(waves):
    with pytest.raises(ValueError, match="waves must be float"):
        features.mel_power(waves)


def test_features_export_with_any_batch_and_length():
    """One exported program for every batch size and utterance length: what users carry away from a training."""
    batch, samples = jax.export.symbolic_shape("batch, samples", constraints=["samples >= 400"])
    shapes = jax.ShapeDtypeStruct((batch, samples), np.float32), jax.ShapeDtypeStruct((batch,), np.int32)
    exported = jax.export.export(all_features)(*shapes)
    waves, lengths = np.stack([speech_like(1500, 0), speech_like(1500, 1)]), np.array([1500, 900], np.int32)
    for ours, expected in zip(exported.call(waves, lengths), all_features(waves, lengths)):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def kaldi_features(wave, window, high=0.0, snip_edges=True):
    """Kaldi's filter-bank features minus their mean over time, by kaldi-native-fbank."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = window
    options.frame_opts.snip_edges = snip_edges
    options.mel_opts.num_bins = 80
    options.mel_opts.high_freq = high
    extractor = kaldi_native_fbank.OnlineFbank(options)
    extractor.accept_waveform(16000, wave.tolist())
    extractor.input_finished()
    frames = np.stack([extractor.get_frame(i) for i in range(extractor.num_frames_ready)])
    return frames - frames.mean(0)


@pytest.mark.parametrize(
    ("front_end", "options", "scale"),
    [
        ("kaldi_fbank", ("povey",), 1),
        ("wespeaker_fbank", ("hamming",), 32768),
        ("sherpa_fbank", ("povey", 7600.0, False), 1),
    ],
)
def test_kaldi_front_end_is_kaldis_also_in_a_padded_batch(front_end, options, scale):
    lengths = np.array([24_000, 16_037, 4_001], np.int32)
    waves = np.stack([0.2 * speech_like(24_000, seed) for seed in range(3)])  # padding is other sound, not zeros
    ours, frames = jax.jit(features.FRONT_ENDS[front_end])(waves, lengths)
    for row, count, length, wave in zip(np.asarray(ours), frames, lengths, waves):
        expected = kaldi_features(scale * wave[:length], *options)
        assert count == len(expected)
        np.testing.assert_allclose(row[:count], expected, atol=5e-4)
        assert not row[count:].any()
    alone, _ = jax.jit(features.FRONT_ENDS[front_end])(waves[:1])
    np.testing.assert_allclose(alone[0], ours[0, : len(alone[0])], atol=1e-4)


@pytest.mark.parametrize("front_end", ["kaldi_fbank", "wespeaker_fbank"])
def test_kaldi_front_end_of_silence_and_of_less_than_a_frame_is_finite(front_end):
    """Kaldi has no frame for a recording under 25 ms; ours fills one up with zeros."""
    waves, lengths = np.zeros((2, 3200), np.float32), np.array([3200, 100], np.int32)
    waves[1] = speech_like(3200)
    ours, frames = jax.jit(features.FRONT_ENDS[front_end])(waves, lengths)
    assert frames.tolist() == [18, 1]
    np.testing.assert_allclose(ours, 0, atol=1e-5)  # a single frame is its own mean
