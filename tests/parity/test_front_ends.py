"""Our speechbrain front end against speechbrain itself; Kaldi's need no PyTorch: tests/test_features.py."""

import jax
import numpy as np
import torch
from references import stub_torchaudio

from memo_jax import features

LENGTHS = np.array([24_000, 16_037, 4_001], np.int32)


def waves() -> np.ndarray:
    """Noise with a falling spectrum and a swelling level, padded with other sound."""
    random = np.random.default_rng(0)
    wave = np.apply_along_axis(np.convolve, 1, random.normal(0, 1, (3, 24_000)), 0.9 ** np.arange(64), "same")
    return (0.05 * wave * (0.01 + np.sin(np.arange(24_000) / 3000) ** 2)).astype(np.float32)


def speechbrain(wave: np.ndarray) -> np.ndarray:
    stub_torchaudio()
    from speechbrain.lobes.features import Fbank
    from speechbrain.processing.features import InputNormalization

    frames = Fbank(n_mels=80)(torch.from_numpy(wave)[None])
    return InputNormalization(norm_type="sentence", std_norm=False)(frames, torch.ones(1))[0].numpy()


def test_front_end_agrees_also_in_a_padded_batch():
    given = waves()
    ours, frames = jax.jit(features.FRONT_ENDS["speechbrain_fbank"])(given, LENGTHS)
    for row, length, count, wave in zip(np.asarray(ours), LENGTHS, frames, given):
        expected = speechbrain(wave[:length])
        assert count == len(expected)
        np.testing.assert_allclose(row[:count], expected, atol=2e-3)
        assert not row[count:].any()
