"""Log-mel features on the device: 16 kHz waveforms in, frames of 80 mel bins out (time, then mel).

Ours: 80 bins on the HTK mel scale over 0–8000 Hz without area normalisation, a 25-ms periodic Hann window every 10 ms,
centred frames with reflected ends, power spectrum. The front ends of other toolkits, which their weights need, follow.
"""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from memo_jax.audio import SAMPLE_RATE

FFT_LENGTH = 512
WINDOW = 400
HOP = 160
MEL_BINS = 80
LOG_FLOOR = 1e-6
NORM_EPSILON = 1e-5

Count = TypeVar("Count", int, np.ndarray, jax.Array)

_REACH = WINDOW // 2  # samples that a frame's window reaches to either side of its centre
_BLOCK = 80  # divides both window and hop, so a frame is five whole blocks
_BINS = FFT_LENGTH // 2  # the Nyquist bin is left out: its mel weight is zero


def frame_count(samples: Count) -> Count:
    """Returns the frames of an utterance of `samples` samples (an int or an integer array): 1 + samples // 160."""
    return 1 + samples // HOP


def mel_power(waves: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Returns the mel power spectrogram, that of `librosa.feature.melspectrogram` to 1e-4 relative.

    Args:
      waves: float [N, L], 16 kHz, in [-1, 1].
      lengths: int [N], true lengths in samples (1 to L) of utterances padded to L. The first `frame_count(length)`
        frames are then those of the utterance alone; later frames are meaningless.

    Returns:
      float32 [N, frame_count(L), 80].

    Raises:
      ValueError: if `waves` is not a floating-point array of two axes with at least one sample.
    """
    if waves.ndim != 2 or waves.shape[1] == 0 or not jnp.issubdtype(waves.dtype, jnp.floating):
        raise ValueError(
            f"waves must be float [N, L] in [-1, 1] with L > 0, got {waves.dtype}{list(waves.shape)}; "
            "divide int16 samples by 32768"
        )
    waves = waves.astype(jnp.float32)
    padded = _reflected(waves) if lengths is None else _reflected_at_length(waves, lengths)
    power = _power_spectrum(padded, _fourier_basis())
    return jnp.dot(power, _mel_basis(), precision=jax.lax.Precision.HIGHEST)


def normalized_log_mel(mel_power: jax.Array, frame_lengths: jax.Array | None = None) -> jax.Array:
    """Returns log(mel power + 1e-6), normalised over time per utterance and mel bin: mean 0, biased variance 1.

    Args:
      mel_power: float [N, T, 80].
      frame_lengths: int [N], valid frames of each utterance; statistics are taken over these and the rest is zero.

    Returns:
      float32 [N, T, 80]. The variance includes an epsilon of 1e-5, so a constant bin yields zeros.
    """
    log_mel = jnp.log(mel_power.astype(jnp.float32) + LOG_FLOOR)
    mean, variance, valid = _moments_over_time(log_mel, frame_lengths)
    return (log_mel - mean) * jax.lax.rsqrt(variance + NORM_EPSILON) * valid


def log_mel_statistics(mel_power: jax.Array, frame_lengths: jax.Array | None = None) -> jax.Array:
    """Returns mean and standard deviation over time of the log-mel bins, [N, 160]: what the channel alone reveals.

    The baseline to print beside any equal error rate. Takes the arguments of `normalized_log_mel`.
    """
    log_mel = jnp.log(mel_power.astype(jnp.float32) + LOG_FLOOR)
    mean, variance, _ = _moments_over_time(log_mel, frame_lengths)
    return jnp.concatenate([mean, jnp.sqrt(variance)], axis=-1)[:, 0]


def _moments_over_time(x, frame_lengths):
    """Returns mean and biased variance [N, 1, F] over the valid frames of x [N, T, F], and a mask [N or 1, T, 1]."""
    frames = jnp.arange(x.shape[1])
    if frame_lengths is None:
        frame_lengths = jnp.full(1, x.shape[1])
    valid = (frames < frame_lengths[:, None]).astype(x.dtype)[:, :, None]
    count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
    mean = (x * valid).sum(axis=1, keepdims=True) / count
    variance = (jnp.square(x - mean) * valid).sum(axis=1, keepdims=True) / count
    return mean, variance, valid


def _reflected(waves):
    """Returns waves [N, L], all of full length, padded by 200 reflected samples on either side, without a gather."""
    return jnp.pad(waves, ((0, 0), (_REACH, _REACH)), mode="reflect")


def _reflected_at_length(waves, lengths):
    """Returns waves [N, L] padded by 200 samples, reflected at the start and at each utterance's own end."""
    head = jnp.take_along_axis(waves, _reflected_index(jnp.arange(-_REACH, 0), lengths), axis=1)
    beyond = lengths[:, None] + jnp.arange(_REACH)
    tail = jnp.take_along_axis(waves, _reflected_index(beyond, lengths), axis=1)
    padded = jnp.pad(jnp.concatenate([head, waves], axis=1), ((0, 0), (0, _REACH)))
    put = jax.vmap(lambda row, end, length: jax.lax.dynamic_update_slice(row, end, (_REACH + length,)))
    return put(padded, tail, lengths)


def _reflected_index(index, lengths):
    """Returns the positions in [0, length), [N, n], of `index` ([n] or [N, n]) in endlessly mirrored utterances."""
    last = lengths[:, None] - 1
    folded = index % jnp.maximum(2 * last, 1)
    return jnp.minimum(folded, 2 * last - folded)


def _power_spectrum(padded, basis):
    """Power spectrum [N, T, B] of windows of 400 samples every 160, from padded waves [N, L + 400].

    A strided convolution over blocks of 80 samples with the windowed Fourier basis [400, 2B] (cosines, then sines):
    framing needs no gather, and nothing is complex. As fast as a real FFT on CPU (within a tenth), and made of matrix
    products on TPU.
    """
    block_count = padded.shape[1] // _BLOCK
    blocks = padded[:, : block_count * _BLOCK].reshape(padded.shape[0], block_count, _BLOCK)
    spectrum = jax.lax.conv_general_dilated(
        blocks,
        basis.reshape(WINDOW // _BLOCK, _BLOCK, -1),
        window_strides=(HOP // _BLOCK,),
        padding="VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=jax.lax.Precision.HIGHEST,  # the default on TPU and GPU is coarser than float32
    )
    bins = basis.shape[1] // 2
    return jnp.square(spectrum[..., :bins]) + jnp.square(spectrum[..., bins:])


def kaldi_fbank_input(
    waves: jax.Array,
    lengths: jax.Array | None = None,
    window: str = "povey",
    scale: float = 1.0,
    high: float = 8000.0,
    snip_edges: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Returns Kaldi's filter-bank features minus their mean over time: (float32 [N, T, 80], valid frames int [N]).

    25-ms frames every 10 ms, each minus its mean, pre-emphasised by 0.97 and windowed; power spectrum of 512 points, 80
    mel bins from 20 Hz, natural logarithm, no dither. Agrees with kaldi-native-fbank.

    Args:
      waves: float [N, L], 16 kHz, in [-1, 1].
      lengths: int [N], true lengths in samples of utterances padded to L.
      window: "povey" or "hamming".
      scale: multiplies the waves; it only matters for the floor of the logarithm.
      high: upper edge of the mel bins, Hz.
      snip_edges: True: frames lie wholly inside the utterance (one of under 25 ms is padded with zeros),
        1 + (L − 400) // 160 of them. False: (L + 80) // 160, centred on every 10 ms, with the utterance mirrored at its
        ends.
    """
    waves = waves.astype(jnp.float32)
    true_lengths = jnp.full(waves.shape[0], waves.shape[1]) if lengths is None else lengths
    if snip_edges:
        frames = 1 + jnp.maximum(true_lengths - WINDOW, 0) // HOP
        padded = jnp.pad(_silent_after(waves, true_lengths), ((0, 0), (0, WINDOW)))
    else:
        frames = (true_lengths + HOP // 2) // HOP
        padded = _mirrored(waves, lengths, before=(WINDOW - HOP) // 2, after=WINDOW // 2)
    power = _power_spectrum(padded, _kaldi_basis(window)) * scale**2
    mel = jnp.dot(power, _kaldi_mel_basis(high), precision=jax.lax.Precision.HIGHEST)
    return _centred(jnp.log(jnp.maximum(mel, jnp.finfo(jnp.float32).eps)), frames), frames


def _mirrored(waves, lengths, before, after):
    """Returns waves [N, L] padded by mirrored samples on either side, the one at the end repeated, as in Kaldi."""
    if lengths is None:
        return jnp.pad(waves, ((0, 0), (before, after)), mode="symmetric")
    index = jnp.arange(-before, waves.shape[1] + after) % (2 * lengths[:, None])
    return jnp.take_along_axis(waves, jnp.minimum(index, 2 * lengths[:, None] - 1 - index), axis=1)


def speechbrain_fbank_input(waves: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns speechbrain's features, `Fbank` and sentence normalisation: ([N, T, 80], valid frames [N]).

    Centred frames of 400 points under a periodic Hamming window, zeros beyond the ends; decibels, at most 80 below the
    utterance's loudest bin, minus their mean over time.
    """
    lengths = jnp.full(waves.shape[0], waves.shape[1]) if lengths is None else lengths
    frames = frame_count(lengths)
    padded = jnp.pad(_silent_after(waves, lengths), ((0, 0), (_REACH, _REACH)))
    power = _power_spectrum(padded, _speechbrain_basis())
    mel = jnp.dot(power, _speechbrain_mel_basis(), precision=jax.lax.Precision.HIGHEST)
    decibels = 10 * jnp.log10(jnp.maximum(mel, 1e-10))
    valid = (jnp.arange(mel.shape[1]) < frames[:, None])[:, :, None]
    loudest = jnp.where(valid, decibels, -jnp.inf).max(axis=(1, 2), keepdims=True)
    return _centred(jnp.maximum(decibels, loudest - 80), frames), frames


def _silent_after(waves, lengths):
    """Returns waves [N, L] float32 with zeros after each utterance's end."""
    return waves.astype(jnp.float32) * (jnp.arange(waves.shape[1]) < lengths[:, None])


def _centred(x, frames):
    """Returns x [N, T, F] minus its mean over the valid frames of each utterance, and zeros after them."""
    mean, _, valid = _moments_over_time(x, frames)
    return (x - mean) * valid


def log_mel_input(waves: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns what networks trained here take: (`normalized_log_mel` of `mel_power` [N, T, 80], valid frames [N])."""
    frames = None if lengths is None else frame_count(lengths)
    x = normalized_log_mel(mel_power(waves, lengths), frames)
    return x, jnp.full(x.shape[0], x.shape[1]) if frames is None else frames


# Front ends by their names in model files: (waves float [N, L] in [-1, 1], lengths [N]) → (input [N, T, 80], valid
# frames [N]). Frames after an utterance's own are zero, or the network masks them.
FRONT_ENDS = {
    "log_mel": log_mel_input,
    "kaldi_fbank": kaldi_fbank_input,  # of 3D-Speaker
    "wespeaker_fbank": functools.partial(kaldi_fbank_input, window="hamming", scale=32768.0),
    "sherpa_fbank": functools.partial(kaldi_fbank_input, high=7600.0, snip_edges=False),  # of sherpa-onnx
    "speechbrain_fbank": speechbrain_fbank_input,
}


@functools.cache
def _fourier_basis():
    """Returns cosines and sines under the periodic Hann window, float32 [400, 512]; time starts at the centre."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    angle = 2 * np.pi / FFT_LENGTH * np.outer(np.arange(WINDOW) - _REACH, np.arange(_BINS))
    return (window[:, None] * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)


@functools.cache
def _mel_basis():
    """Returns mel filters, float32 [256, 80]: triangles in hertz, peak 1, evenly spaced on the HTK mel scale.

    Bit by bit those of `librosa.filters.mel(sr=16000, n_fft=512, n_mels=80, htk=True, norm=None)`, as a test shows.
    Importing librosa itself takes two seconds, as long as the rest of a first embedding.
    """
    mel = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), MEL_BINS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = np.arange(_BINS)[:, None] * SAMPLE_RATE / FFT_LENGTH
    rising = (hertz - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - hertz) / np.diff(edges)[1:]
    return np.maximum(np.minimum(rising, falling), 0).astype(np.float32)


@functools.cache
def _kaldi_basis(window):
    """Returns mean removal, pre-emphasis, window and Fourier basis of a frame as one matrix, float32 [400, 512]."""
    shape = {"povey": np.hanning(WINDOW) ** 0.85, "hamming": np.hamming(WINDOW)}[window]
    emphasis = np.eye(WINDOW) - 0.97 * np.eye(WINDOW, k=-1)
    emphasis[0, 0] -= 0.97  # the first sample is its own predecessor
    prepared = (shape[:, None] * emphasis) @ (np.eye(WINDOW) - 1 / WINDOW)
    angle = 2 * np.pi / FFT_LENGTH * np.outer(np.arange(WINDOW), np.arange(_BINS))
    return (prepared.T @ np.concatenate([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)


@functools.cache
def _kaldi_mel_basis(high=8000.0):
    """Kaldi's mel filters, triangles on the mel axis from 20 Hz to `high`, float32 [256, 80]."""
    mel = 1127 * np.log1p(np.arange(_BINS) * SAMPLE_RATE / FFT_LENGTH / 700)
    edges = np.linspace(1127 * np.log1p(20 / 700), 1127 * np.log1p(high / 700), MEL_BINS + 2)
    rising = (mel[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mel[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(rising, falling), 0).astype(np.float32)


@functools.cache
def _speechbrain_basis():
    """Returns the Fourier basis of 400 points under the periodic Hamming window, float32 [400, 400]."""
    window = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    angle = 2 * np.pi / WINDOW * np.outer(np.arange(WINDOW), np.arange(WINDOW // 2))
    return (window[:, None] * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)


@functools.cache
def _speechbrain_mel_basis():
    """Returns speechbrain's mel filters, float32 [200, 80]: triangles in hertz, as steep on either side."""
    mel = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), MEL_BINS + 2)
    hertz = 700 * (10 ** (mel / 2595) - 1)
    distance = np.abs(np.arange(WINDOW // 2)[:, None] * SAMPLE_RATE / WINDOW - hertz[1:-1])
    return np.maximum(1 - distance / np.diff(hertz)[:-1], 0).astype(np.float32)
