"""Folders of noise, music, speech and room impulse responses → arrays that augmentation samples from."""

import numpy as np

from memo_jax.audio import SAMPLE_RATE, AudioError, is_audio_name, read_audio, read_float_audio
from memo_jax.recordings import files_below

MEGABYTE = 1e6


def load_banks(noise="", music="", speech="", rirs="", *, seconds: float = 8.0, rir_seconds: float = 0.5,
               max_megabytes: float = 512, seed: int = 0) -> dict[str, np.ndarray]:
    """Reads augmentation recordings into memory, one bank a kind.

    Folders are read with all their subfolders; files without the extension of a recording (licences, lists) are passed
    over. A recording gives rows of `seconds`, one after another; a shorter one is repeated to fill its row, and what
    is left at the end of a longer one is dropped, as are rows of silence. A room impulse response is its first channel
    from the direct sound (the largest sample) on, cut or zero-padded to `rir_seconds`, scaled to unit energy; so
    convolution neither delays speech nor, were its spectrum flat, changes its level.

    Args:
      noise, music, speech, rirs: folders; "" for none.
      seconds: length S of a row; longer than a crop, so that a random part of it can be taken.
      rir_seconds: length R of an impulse response.
      max_megabytes: of each bank (10⁶ bytes). Where a folder holds more, recordings are chosen by `seed`.
      seed: of that choice; no part in anything else.

    Returns:
      {"noise": int16 [n, S], "music": …, "speech": …, "rir": float32 [r, R]}, 16 kHz, without the kinds not given.

    Raises:
      FileNotFoundError: a given folder does not exist.
      ValueError: a given folder has no usable recording, a recording is damaged (named), or a length is not positive.
    """
    for name, value in (("seconds", seconds), ("rir_seconds", rir_seconds), ("max_megabytes", max_megabytes)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; expected a positive number")
    length, rir_length, banks = round(seconds * SAMPLE_RATE), round(rir_seconds * SAMPLE_RATE), {}
    for kind, folder in (("noise", noise), ("music", music), ("speech", speech)):
        if folder:
            banks[kind] = _bank(kind, folder, lambda path: _rows(read_audio(path), length),
                                _most_rows(kind, max_megabytes, 2 * length), seed)
    if rirs:
        banks["rir"] = _bank("rir", rirs, lambda path: _impulse_response(path, rir_length),
                             _most_rows("rir", max_megabytes, 4 * rir_length), seed)
    return banks


def describe_banks(banks: dict[str, np.ndarray]) -> str:
    """One line about the banks in memory: kinds, rows, lengths, size."""
    if not banks:
        return "no augmentation banks"
    line = "{}: {:,} rows of {:g} s ({:.1f} MB)"
    return "; ".join(line.format(kind, len(rows), rows.shape[1] / SAMPLE_RATE, rows.nbytes / MEGABYTE)
                     for kind, rows in banks.items())


def _most_rows(kind, max_megabytes, row_bytes):
    most = int(max_megabytes * MEGABYTE // row_bytes)
    if most < 1:
        raise ValueError(f"max_megabytes is {max_megabytes:g}; expected at least {row_bytes / MEGABYTE:g}, "
                         f"one row of the {kind} bank")
    return most


def _bank(kind, folder, read_rows, most, seed):
    """The rows of all recordings in a folder in the order of their names, or `most` of them."""
    paths = sorted(path for path in files_below(folder) if is_audio_name(path))
    if not paths:
        raise ValueError(f"{folder}: no recordings for the {kind} bank")
    rows, count = {}, 0
    for chosen in np.random.default_rng(seed).permutation(len(paths)):  # a subset only when the rest does not fit
        rows[chosen] = read_rows(paths[chosen])[:most - count]
        count += len(rows[chosen])
        if count == most:
            break
    if not count:
        raise ValueError(f"{folder}: only silence for the {kind} bank")
    return np.concatenate([rows[index] for index in sorted(rows)])


def _rows(samples, length):
    """Samples [L] → [rows, length] without rows of silence."""
    rows = np.resize(samples, (max(1, len(samples) // length), length))
    return rows[(rows != rows[:, :1]).any(axis=1)]


def _impulse_response(path, length):
    """The recording's first channel as one impulse response, float32 [1, length]."""
    samples = read_float_audio(path, channel=0)
    direct = int(np.argmax(np.abs(samples)))
    response = np.zeros(length, np.float32)
    kept = samples[direct:direct + length]
    response[:len(kept)] = kept
    energy = np.sum(np.square(response, dtype=np.float64))
    if not energy > 0:
        raise AudioError(path, "silence: no impulse response")
    return (response / np.sqrt(energy)).astype(np.float32)[None]
