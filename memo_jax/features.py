"""Log-mel features on the device: 16 kHz waveforms in, frames of 80 mel bins out (time, then mel).

80 bins on the HTK mel scale over 0–8000 Hz without area normalisation, a 25-ms periodic Hann window every 10 ms,
centred frames with reflected ends, power spectrum.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SAMPLE_RATE = 16_000
FFT_LENGTH = 512
WINDOW = 400
HOP = 160
MEL_BINS = 80
LOG_FLOOR = 1e-6
NORM_EPSILON = 1e-5

_REACH = WINDOW // 2  # samples that a frame's window reaches to either side of its centre
_BLOCK = 80  # divides both window and hop, so a frame is five whole blocks
_BINS = FFT_LENGTH // 2  # the Nyquist bin is left out: its mel weight is zero


def frame_count(samples):
    """Number of frames of an utterance of `samples` samples (an int or an integer array): 1 + samples // 160."""
    return 1 + samples // HOP


def mel_power(waves, lengths=None):
    """Mel power spectrogram, as `librosa.feature.melspectrogram` gives it (agreement better than 1e-4 relative).

    Args:
      waves: float [N, L], 16 kHz, in [-1, 1].
      lengths: int [N], true lengths in samples (1 to L) of utterances padded to L. An utterance's first
        `frame_count(length)` frames are then those it has alone; later frames are meaningless.

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
    if lengths is None:
        lengths = jnp.full(waves.shape[0], waves.shape[1])
    power = _power_spectrum(_reflected_at_length(waves, lengths))
    return jnp.dot(power, _mel_basis(), precision=jax.lax.Precision.HIGHEST)


def normalized_log_mel(mel_power, frame_lengths=None):
    """log(mel power + 1e-6), per utterance and mel bin of mean 0 and (biased) variance 1 over time.

    Args:
      mel_power: float [N, T, 80].
      frame_lengths: int [N], valid frames of each utterance; statistics are taken over these and the rest is zero.

    Returns:
      float32 [N, T, 80]. The variance carries an epsilon of 1e-5, so a constant bin gives zeros.
    """
    log_mel = jnp.log(mel_power.astype(jnp.float32) + LOG_FLOOR)
    mean, variance, valid = _moments_over_time(log_mel, frame_lengths)
    return (log_mel - mean) * jax.lax.rsqrt(variance + NORM_EPSILON) * valid


def log_mel_statistics(mel_power, frame_lengths=None):
    """Mean and standard deviation over time of the log-mel bins, [N, 160]: what the channel alone gives away.

    The baseline to print beside any equal error rate; takes the arguments of `normalized_log_mel`.
    """
    log_mel = jnp.log(mel_power.astype(jnp.float32) + LOG_FLOOR)
    mean, variance, _ = _moments_over_time(log_mel, frame_lengths)
    return jnp.concatenate([mean, jnp.sqrt(variance)], axis=-1)[:, 0]


def _moments_over_time(x, frame_lengths):
    """Mean and biased variance [N, 1, F] over the valid frames of x [N, T, F]; validity [N or 1, T, 1] as 0 or 1."""
    frames = jnp.arange(x.shape[1])
    if frame_lengths is None:
        frame_lengths = jnp.full(1, x.shape[1])
    valid = (frames < frame_lengths[:, None]).astype(x.dtype)[:, :, None]
    count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
    mean = (x * valid).sum(axis=1, keepdims=True) / count
    variance = (jnp.square(x - mean) * valid).sum(axis=1, keepdims=True) / count
    return mean, variance, valid


def _reflected_at_length(waves, lengths):
    """Waves [N, L] with 200 samples on either side, reflected at the start and at each utterance's own end."""
    head = jnp.take_along_axis(waves, _reflected_index(jnp.arange(-_REACH, 0), lengths), axis=1)
    beyond = lengths[:, None] + jnp.arange(_REACH)
    tail = jnp.take_along_axis(waves, _reflected_index(beyond, lengths), axis=1)
    padded = jnp.pad(jnp.concatenate([head, waves], axis=1), ((0, 0), (0, _REACH)))
    put = jax.vmap(lambda row, end, length: jax.lax.dynamic_update_slice(row, end, (_REACH + length,)))
    return put(padded, tail, lengths)


def _reflected_index(index, lengths):
    """Positions inside [0, length) [N, n] that `index` ([n] or [N, n]) has in utterances mirrored without end."""
    last = lengths[:, None] - 1
    folded = index % jnp.maximum(2 * last, 1)
    return jnp.minimum(folded, 2 * last - folded)


def _power_spectrum(padded):
    """Power spectrum [N, T, 256] of windows of 400 samples every 160, from padded waves [N, L + 400].

    A strided convolution over blocks of 80 samples with the windowed Fourier basis: the framing costs no gather
    and nothing is complex. As fast as a real FFT on CPU (within a tenth), and made of matrix products on TPU.
    """
    block_count = padded.shape[1] // _BLOCK
    blocks = padded[:, : block_count * _BLOCK].reshape(padded.shape[0], block_count, _BLOCK)
    spectrum = jax.lax.conv_general_dilated(
        blocks,
        _fourier_basis().reshape(WINDOW // _BLOCK, _BLOCK, 2 * _BINS),
        window_strides=(HOP // _BLOCK,),
        padding="VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=jax.lax.Precision.HIGHEST,  # the default on TPU and GPU is coarser than float32
    )
    return jnp.square(spectrum[..., :_BINS]) + jnp.square(spectrum[..., _BINS:])


def log_mel_input(waves, lengths=None):
    """What networks trained here take: (`normalized_log_mel` of `mel_power` [N, T, 80], valid frames [N])."""
    lengths = jnp.full(waves.shape[0], waves.shape[1]) if lengths is None else lengths
    frames = frame_count(lengths)
    return normalized_log_mel(mel_power(waves, lengths), frames), frames


# Front ends by the name that a model file has: (waves float [N, L] in [-1, 1], lengths [N]) → (input [N, T, 80], valid
# frames [N]). Frames behind an utterance's own are zero or masked by the network.
FRONT_ENDS = {"log_mel": log_mel_input}


@functools.cache
def _fourier_basis():
    """Cosines and sines under the periodic Hann window, float32 [400, 512]; time is counted from the centre."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    angle = 2 * np.pi / FFT_LENGTH * np.outer(np.arange(WINDOW) - _REACH, np.arange(_BINS))
    return (window[:, None] * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)


@functools.cache
def _mel_basis():
    """Mel filters, float32 [256, 80]: those of `librosa.filters.mel` with htk=True and norm=None.

    Computed here since importing librosa takes longer than comparing two recordings; a test holds them equal.
    """
    highest = 2595.0 * np.log10(1.0 + SAMPLE_RATE / 2 / 700.0)
    corners = 700.0 * (10.0 ** (np.linspace(0.0, highest, MEL_BINS + 2) / 2595.0) - 1.0)  # Hz
    widths = np.diff(corners)
    ramps = corners[:, None] - np.arange(_BINS) * SAMPLE_RATE / FFT_LENGTH
    rising, falling = -ramps[:-2] / widths[:-1, None], ramps[2:] / widths[1:, None]
    return np.ascontiguousarray(np.maximum(0.0, np.minimum(rising, falling)).T, np.float32)
