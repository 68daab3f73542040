"""The front ends of other toolkits against kaldi-native-fbank and speechbrain themselves."""

import jax
import kaldi_native_fbank
import numpy as np
import pytest
import torch
from references import stub_torchaudio

from memo_jax import features

LENGTHS = np.array([24_000, 16_037, 4_001], np.int32)


def waves() -> np.ndarray:
    """Noise with a falling spectrum and a swelling level, padded with other sound."""
    random = np.random.default_rng(0)
    wave = np.apply_along_axis(np.convolve, 1, random.normal(0, 1, (3, 24_000)), 0.9 ** np.arange(64), "same")
    return (0.05 * wave * (0.01 + np.sin(np.arange(24_000) / 3000) ** 2)).astype(np.float32)


def kaldi(wave: np.ndarray, window: str) -> np.ndarray:
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = window
    options.mel_opts.num_bins = 80
    extractor = kaldi_native_fbank.OnlineFbank(options)
    extractor.accept_waveform(16000, wave.tolist())
    extractor.input_finished()
    frames = np.stack([extractor.get_frame(i) for i in range(extractor.num_frames_ready)])
    return frames - frames.mean(0)


def speechbrain(wave: np.ndarray) -> np.ndarray:
    stub_torchaudio()
    from speechbrain.lobes.features import Fbank
    from speechbrain.processing.features import InputNormalization

    frames = Fbank(n_mels=80)(torch.from_numpy(wave)[None])
    return InputNormalization(norm_type="sentence", std_norm=False)(frames, torch.ones(1))[0].numpy()


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("kaldi_fbank", lambda wave: kaldi(wave, "povey")),
        ("wespeaker_fbank", lambda wave: kaldi(32768 * wave, "hamming")),
        ("speechbrain_fbank", speechbrain),
    ],
)
def test_front_end_agrees_also_in_a_padded_batch(name, reference):
    given = waves()
    ours, frames = jax.jit(features.FRONT_ENDS[name])(given, LENGTHS)
    for row, length, count, wave in zip(np.asarray(ours), LENGTHS, frames, given):
        expected = reference(wave[:length])
        assert count == len(expected)
        np.testing.assert_allclose(row[:count], expected, atol=2e-3 if name == "speechbrain_fbank" else 5e-4)
        assert not row[count:].any()
