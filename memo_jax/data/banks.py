"""Folders of noise, music, speech and room impulse responses → arrays that augmentation samples from."""

import os

import numpy as np

from memo_jax.audio import SAMPLE_RATE, AudioError, audio_seconds, is_audio_name, read_audio, read_float_audio
from memo_jax.data.recordings import files_below, is_hidden
from memo_jax.log import plural, progress, say

MEGABYTE = 1e6
# The folders of each kind in the corpora that have several.
MUSAN = {"noise": ("noise",), "music": ("music",), "speech": ("speech",)}
RIRS_NOISES = {"noise": ("pointsource_noises",), "rir": ("simulated_rirs", "real_rirs_isotropic_noises")}
REAL_RIRS, RIR_LIST = "real_rirs_isotropic_noises", "rir_list"  # rooms and noises are mixed there


def load_banks(
    noise: str | os.PathLike = "",
    music: str | os.PathLike = "",
    speech: str | os.PathLike = "",
    rirs: str | os.PathLike = "",
    *,
    seconds: float = 8.0,
    rir_seconds: float = 0.5,
    max_megabytes: float = 512,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Reads augmentation recordings into memory, one bank for each kind.

    Folders are read with all their subfolders; files without the extension of a recording (licences, lists) are passed
    over, and so are hidden files, whose number is printed. Of a complete MUSAN or RIRS_NOISES, the part of the right
    kind is taken: noise, music, speech; for rooms the simulated and the real ones, for noise the point sources.

    A recording yields consecutive rows of `seconds`; a shorter one is repeated to fill its row, and the remainder of a
    longer one is dropped, as are rows of silence. A room impulse response is its first channel (the mean of several
    would not be a room) from the direct sound (the largest sample) on, cut or zero-padded to `rir_seconds`, scaled to
    unit energy. Convolution with it thus does not delay speech and, were its spectrum flat, would not change its level.

    Args:
      noise: folder of noise; "" for none.
      music: likewise, of music.
      speech: likewise, of speech, for babble.
      rirs: likewise, of room impulse responses.
      seconds: length S of a row; longer than a crop, so that a random part of it can be taken.
      rir_seconds: length R of an impulse response.
      max_megabytes: of each bank (10⁶ bytes). If there is more, each recording yields the same number of rows, from a
        random place; if there are more recordings than rows, a random choice of them yields one each. Nothing else is
        decoded.
      seed: of that choice, and of nothing else.

    Returns:
      {"noise": int16 [n, S], "music": …, "speech": …, "rir": float32 [r, R]}, 16 kHz, without the kinds not given.

    Raises:
      FileNotFoundError: a given folder does not exist.
      ValueError: a given folder has no usable recording of its kind, a recording is damaged (named), or a length is not
        positive.
    """
    for name, value in (("seconds", seconds), ("rir_seconds", rir_seconds), ("max_megabytes", max_megabytes)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; expected a positive number")
    length, rir_length, banks = round(seconds * SAMPLE_RATE), round(rir_seconds * SAMPLE_RATE), {}
    for kind, folder in (("noise", noise), ("music", music), ("speech", speech)):
        if folder:
            banks[kind] = _bank(kind, folder, length, _most_rows(kind, max_megabytes, 2 * length), seed)
    if rirs:
        banks["rir"] = _rir_bank(rirs, rir_length, _most_rows("rir", max_megabytes, 4 * rir_length), seed)
    return banks


def _most_rows(kind, max_megabytes, row_bytes):
    most = int(max_megabytes * MEGABYTE // row_bytes)
    if most < 1:
        raise ValueError(
            f"max_megabytes is {max_megabytes:g}; expected at least {row_bytes / MEGABYTE:g}, "
            f"one row of the {kind} bank"
        )
    return most


def _bank(kind, folder, length, most, seed):
    """Rows of the recordings in a folder in the order of their names, int16 [at most `most`, length]."""
    rng = np.random.default_rng(seed)
    paths = _chosen(_announced(kind, folder), most, rng)
    counts = np.array([max(1, int(audio_seconds(path) * SAMPLE_RATE) // length) for path in paths])
    limit = _fair_limit(counts, most)
    bank, filled = np.empty((np.minimum(counts, limit).sum(), length), np.int16), 0
    for path, count in progress(
        list(zip(paths, counts)), label=f"{kind} bank", unit="recording", active=len(paths) > 100
    ):
        span = (0.0, None)
        if count > limit:
            start = rng.uniform(0, (count - limit) * length) / SAMPLE_RATE
            span = (start, start + limit * length / SAMPLE_RATE + 0.01)  # rounding must not cost a row
        rows = _rows(read_audio(path, start=span[0], end=span[1]), length)[: min(count, limit)]
        bank[filled : filled + len(rows)] = rows
        filled += len(rows)
    if not filled:
        raise ValueError(f"{folder}: only silence for the {kind} bank")
    return bank[:filled]


def _rir_bank(folder, length, most, seed):
    """The impulse responses in a folder, or some of them, in the order of their names, float32 [n, length]."""
    paths = _chosen(_announced("rir", folder), most, np.random.default_rng(seed))
    bank = np.empty((len(paths), length), np.float32)
    for index, path in enumerate(progress(paths, label="rir bank", unit="recording", active=len(paths) > 1000)):
        bank[index] = _impulse_response(path, length)
    return bank


def _announced(kind, folder):
    """The paths of `_recordings`; says how many hidden files lie beside them."""
    paths, hidden = _recordings(kind, folder)
    if hidden:
        say(f"{folder}: passed over {plural(len(hidden), 'hidden file')} for the {kind} bank, such as {hidden[0]}")
    return paths


def _recordings(kind, folder):
    """The sorted paths of the recordings of a kind in a folder, and of the hidden files with names like theirs."""
    paths, hidden = [], []
    for part in _folders_of_kind(kind, os.fspath(folder)):
        for path in _of_kind(kind, part):
            if is_audio_name(path):
                (hidden if is_hidden(os.path.relpath(path, part).replace(os.sep, "/")) else paths).append(path)
    if not paths:
        raise ValueError(f"{folder}: no recordings for the {kind} bank")
    return sorted(paths), sorted(hidden)


def _folders_of_kind(kind, folder):
    """The folders to read: the folder itself or, for a whole corpus of several kinds, those of the kind."""
    there = (
        {name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name))}
        if os.path.isdir(folder)
        else set()
    )
    is_musan = there >= set(MUSAN) or os.path.basename(os.path.abspath(folder)).lower() == "musan"
    if is_musan and there & set(MUSAN):
        parts, corpus = MUSAN, "MUSAN"
    elif there & {part for parts in RIRS_NOISES.values() for part in parts}:
        parts, corpus = RIRS_NOISES, "RIRS_NOISES"
    else:
        return [folder]
    found = [os.path.join(folder, part) for part in parts.get(kind, ()) if part in there]
    if not found:
        has = [key for key, names in parts.items() if there & set(names)]
        raise ValueError(f"{folder}: nothing for the {kind} bank here; of {corpus} it has {' and '.join(has)}")
    return found


def _of_kind(kind, folder):
    """The files below a folder; of the real rooms and noises of RIRS_NOISES, only those that are of the kind."""
    if os.path.basename(os.path.abspath(folder)) != REAL_RIRS:
        return files_below(folder)
    try:  # "--rir-id … --room-id … RIRS_NOISES/real_rirs_isotropic_noises/NAME.wav"
        with open(os.path.join(folder, RIR_LIST), encoding="utf-8-sig") as file:
            names = {os.path.basename(line.split()[-1]) for line in file if line.strip()}
    except FileNotFoundError:
        names = {os.path.basename(path) for path in files_below(folder) if "_noise_" not in os.path.basename(path)}
    return (path for path in files_below(folder) if (os.path.basename(path) in names) == (kind == "rir"))


def _chosen(paths, most, rng):
    """All paths, or `most` of them in the same order."""
    return paths if len(paths) <= most else [paths[index] for index in sorted(rng.permutation(len(paths))[:most])]


def _fair_limit(counts, most):
    """The largest number of rows per recording with which all together yield at most `most`; at least 1."""
    limit = int(counts.max())
    if counts.sum() > most:
        low = 1
        while low < limit:  # bisection
            middle = (low + limit + 1) // 2
            low, limit = (middle, limit) if np.minimum(counts, middle).sum() <= most else (low, middle - 1)
    return limit


def _rows(samples, length):
    """Samples [L] → [rows, length] without rows of silence."""
    rows = np.resize(samples, (max(1, len(samples) // length), length))
    return rows[(rows != rows[:, :1]).any(axis=1)]


def _impulse_response(path, length):
    """The recording's first channel as an impulse response, float32 [length]."""
    samples = read_float_audio(path, channel=1)
    direct = int(np.argmax(np.abs(samples)))
    response = np.zeros(length, np.float32)
    kept = samples[direct : direct + length]
    response[: len(kept)] = kept
    energy = np.sum(np.square(response, dtype=np.float64))
    if not energy > 0:
        raise AudioError(path, "silence: no impulse response")
    return (response / np.sqrt(energy)).astype(np.float32)
