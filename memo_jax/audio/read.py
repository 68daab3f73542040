"""Recordings of any common kind → 16 kHz mono samples, or an error that names the file and the reason."""

import contextlib
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from memo_jax.audio.containers import find_parts
from memo_jax.audio.decode_ffmpeg import DEMUXERS, FfmpegDecoder
from memo_jax.audio.decode_soundfile import NotReadable, SoundFileDecoder
from memo_jax.audio.error import NOT_OF_THE_FILE, SAMPLE_RATE, AudioError, check_rate
from memo_jax.audio.samples import FULL_SCALE, Collector, Mixer, to_int16
from memo_jax.audio.window import Window

SOUNDFILE_EXTENSIONS = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".aif", ".aiff", ".aifc", ".au", ".snd", ".sph", ".w64"}
    | {".rf64", ".caf"}
)
FFMPEG_EXTENSIONS = frozenset(
    {".m4a", ".m4b", ".aac", ".mp4", ".mov", ".3gp", ".wma", ".asf", ".webm", ".mkv", ".mka", ".amr", ".avi", ".spx"}
)
AUDIO_EXTENSIONS = SOUNDFILE_EXTENSIONS | FFMPEG_EXTENSIONS
EXCERPT = re.compile(r"(.+):(\d+(?:\.\d*)?)-(\d+(?:\.\d*)?)?", re.DOTALL)
SPAN_OVERSHOOT = 0.5  # s that a part may reach beyond the recording, as in Kaldi
MAX_SECONDS = 4 * 3600.0


def is_audio_name(name: str | os.PathLike) -> bool:
    """Returns whether the extension of `name` is that of a recording (`AUDIO_EXTENSIONS`, any case)."""
    return os.path.splitext(os.fspath(name))[1].lower() in AUDIO_EXTENSIONS


def needs_ffmpeg(name: str | os.PathLike) -> bool:
    """Returns whether recordings of this name usually need ffmpeg. When one is read, its content decides."""
    return os.path.splitext(os.fspath(name))[1].lower() in FFMPEG_EXTENSIONS


def parse_channel(text: str) -> str | int:
    """Converts "mean" or a number from 1 to what `read_audio` takes as its channel.

    Raises:
      ValueError: any other text.
    """
    return _checked_channel(int(text) if text.isascii() and text.isdigit() else text)


def read_audio(
    path_or_file: str | os.PathLike | BinaryIO,
    *,
    max_seconds: float = MAX_SECONDS,
    channel: str | int = "mean",
    start: float = 0.0,
    end: float | None = None,
) -> np.ndarray:
    """Decodes a recording, or an excerpt of it, to mono 16-bit samples at 16 kHz.

    The content of a file decides how it is decoded; its name does not matter. libsndfile decodes wav (also RF64, W64
    and MPEG in wav), flac, ogg and opus, mp3, aiff, au, caf and sph. ffmpeg, where installed, decodes m4a and mp4,
    webm and mkv, wma, avi, amr, aac, and the rare codecs of the others; from a film, the first audio track. No other
    kind of file is decoded, so playlists and the like, which name other files, are refused.

    * Channels: the mean of all, whatever their number and layout, or a single one.
    * Rate: converted by soxr (high quality). A constant recording stays constant.
    * Level: values beyond full scale are clipped. A recording with a peak below -54 dB of full scale that 16 bits
      would not hold exactly is amplified by a power of two, to a peak between -12 and -6 dB.
    * Recordings that follow one another in a file (`cat 1.mp3 2.mp3`, chained Ogg) are read one after the other.
    * A truncated file is refused, whatever its kind; `containers` states the rule and its limits. A placeholder for the
      length, as left by programs that write to a pipe, is accepted.
    * Memory: blocks of a few MB beside the result, whatever the length, rate and channels, and whatever the header
      claims. For a recording that is quiet throughout, three times the result.

    Args:
      path_or_file: a path, or an open binary file. Its attribute `name`, if any, is used in messages.
      max_seconds: longest recording accepted; guards against files that unpack to more than the memory.
      channel: "mean", or the number of a channel, from 1.
      start: seconds of the recording to leave out at its beginning. They are skipped without decoding where possible,
        exactly in what libsndfile decodes, to about 10 ms in m4a, webm and avi.
      end: second of the recording to stop at; None for its end. It may lie up to half a second after the end of the
        recording; the excerpt is then shorter.

    Returns:
      int16 [L], L ≥ 1; 32768 is full scale.

    Raises:
      AudioError: (a ValueError) missing, not a file, empty, not a recording, truncated, damaged, without sound, NaN or
        infinite samples, float samples far beyond [-1, 1], too long, no such channel, channels that cancel in their
        mean (phase-inverted), an excerpt outside the recording, or ffmpeg needed and missing.
      ValueError: `channel`, `start` or `end` make no sense.
    """
    return _read(path_or_file, np.int16, max_seconds, channel, start, end)


class Excerpt(NamedTuple):
    """Seconds `start` to `end` of the file `path`; an `end` of None is that of the file."""

    path: str
    start: float = 0.0
    end: float | None = None


def parse_excerpt(name: str | os.PathLike) -> Excerpt:
    """Returns which part of which file a name means: `file.wav`, `file.wav:12.5-20` (seconds) or `file.wav:12.5-`.

    If a file really has that name, all of it is meant.

    Raises:
      AudioError: the excerpt ends before it begins.
    """
    name = os.fspath(name)
    found = None if os.path.lexists(name) else EXCERPT.fullmatch(name)
    if found is None:
        return Excerpt(name)
    start, end = float(found[2]), None if found[3] is None else float(found[3])
    if end is not None and end <= start:
        raise AudioError(name, "no excerpt: it ends before it begins; expected file:start-end in seconds")
    return Excerpt(found[1], start, end)


def excerpt_name(path: str, start: float, end: float) -> str:
    """Returns the name of an excerpt, to the millisecond: `file.wav:12.5-20`."""
    return f"{path}:{round(start, 3):.12g}-{round(end, 3):.12g}"


def read_excerpt(name: str | os.PathLike, *, channel: str | int = "mean") -> np.ndarray:
    """Decodes what `parse_excerpt` finds in a name: int16 [L] at 16 kHz.

    Raises:
      AudioError: as for `parse_excerpt` and `read_audio`.
      ValueError: as for `read_audio`.
    """
    path, start, end = parse_excerpt(name)
    return read_audio(path, channel=channel, start=start, end=end)


def read_float_audio(path_or_file: str | os.PathLike | BinaryIO, *, channel: str | int = "mean") -> np.ndarray:
    """Decodes like `read_audio` but to float32 [L] of full scale 1, neither clipped nor amplified."""
    return _read(path_or_file, np.float32, MAX_SECONDS, channel, 0.0, None)


def audio_seconds(path: str | os.PathLike | BinaryIO) -> float:
    """Returns a recording's seconds, without decoding it where possible.

    Raises:
      AudioError: as for `read_audio`.
    """
    with _opened(path) as window:
        parts, seconds = find_parts(window), 0.0
        for part in parts:
            with _decoder(window, part, len(parts) == 1) as decoder:
                frames = decoder.frames
                if frames is None:
                    frames = sum(len(block) for block in decoder.blocks(0, None))
                seconds += frames / decoder.rate
        return seconds


def as_audio(samples: ArrayLike, rate: int, name: str = "the array", channel: str | int = "mean") -> np.ndarray:
    """Returns mono 16-bit samples at 16 kHz, int16 [L], of an array as `soundfile.read` and others return it.

    Args:
      samples: [L] or [L, channels]; floating point in [-1, 1] (beyond is clipped), or int16.
      rate: its sample rate, Hz.
      name: what error messages call it.
      channel: "mean", or the number of a channel, from 1.

    Raises:
      AudioError: (a ValueError) no samples, a wrong shape, type or rate, no such channel, channels that cancel in their
        mean, NaN or infinite samples, or floats far beyond [-1, 1].
    """
    samples, channel = np.asarray(samples), _checked_channel(channel)
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[1] > min(samples.shape[0], 64)):
        raise AudioError(name, f"wrong shape: {list(samples.shape)}, expected [samples] or [samples, channels]")
    if samples.dtype != np.int16 and not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(name, f"wrong type: {samples.dtype}, expected floats in [-1, 1] or int16")
    check_rate(name, rate)
    if not samples.size:
        raise AudioError(name, "no samples")
    if samples.dtype == np.int16 and samples.ndim == 1 and rate == SAMPLE_RATE and channel in ("mean", 1):
        return samples
    scale = FULL_SCALE if samples.dtype == np.int16 else 1
    mixer, collector = Mixer(name, channel), Collector(np.int16)
    with np.errstate(over="ignore"):  # from float64, which the mixer refuses
        block = (samples.reshape(len(samples), -1) / scale).astype(np.float32)
    for mono in _resampled(iter([(rate, mixer.mono(block))])):
        collector.add(mono)
    return _finished(name, mixer, collector, np.int16)


def check_speech(name: str | os.PathLike, samples: np.ndarray, min_seconds: float) -> None:
    """Checks that 16-kHz samples can be speech.

    Args:
      name: what the error message calls them.
      samples: int16 [L] at 16 kHz.
      min_seconds: the shortest length that is accepted.

    Raises:
      AudioError: they are shorter than that, or all equal.
    """
    if len(samples) < min_seconds * SAMPLE_RATE:
        raise AudioError(name, f"shorter than {min_seconds:g} s: {len(samples) / SAMPLE_RATE:.3f} s")
    if samples.min() == samples.max():
        raise AudioError(name, "silence: all samples are equal")


def _read(source, dtype, max_seconds, channel, start, end):
    channel = _checked_channel(channel)
    if not 0 <= start < math.inf or (end is not None and not start <= end):
        raise ValueError(f"no excerpt: start={start}, end={end}; expected seconds, 0 <= start <= end")
    with _opened(source) as window:
        mixer, collector = Mixer(window.name, channel), Collector(dtype)
        blocks = ((rate, mixer.mono(block)) for rate, block in _excerpt(window, start, end))
        for mono in _resampled(blocks):
            collector.add(mono)
            if collector.length > max_seconds * SAMPLE_RATE:
                raise AudioError(window.name, f"longer than {max_seconds:g} s: cut it into shorter recordings")
        return _finished(window.name, mixer, collector, dtype)


def _finished(name, mixer, collector, dtype):
    if not collector.length:
        raise AudioError(name, "no samples")
    mixer.check_cancelled()
    samples = collector.result()
    if mixer.low == mixer.high:  # removes the transients that resampling leaves at both ends
        value = np.full(1, mixer.low, np.float32)
        samples[:] = to_int16(value) if dtype is np.int16 else value
    return samples


def _excerpt(window, start, end) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (rate, float32 [n, channels]) of seconds `start` to `end` of all that a file holds."""
    parts, passed, anything = find_parts(window), 0.0, False  # passed: seconds of the parts read or skipped
    for part in parts:
        if end is not None and passed >= end and anything:
            return
        first, stop = max(0.0, start - passed), None if end is None else end - passed
        with _decoder(window, part, len(parts) == 1, first, stop) as decoder:
            first = round(first * decoder.rate)
            if decoder.frames is not None and first and first >= decoder.frames:
                passed += decoder.frames / decoder.rate
                continue
            for block in decoder.blocks(first, None if stop is None else max(0, round(stop * decoder.rate) - first)):
                anything = True
                yield decoder.rate, block
            passed += math.nan if decoder.passed is None else decoder.passed
    if end is not None and passed >= start and round((end - start) * SAMPLE_RATE) < 1:
        raise AudioError(window.name, f"no samples between {start:g} s and {end:g} s")
    if (start and not anything) or (end is not None and passed < end - SPAN_OVERSHOOT):
        until = "the end" if end is None else f"{end:g} s"
        length = "the recording is shorter" if math.isnan(passed) else f"the recording has {passed:.2f} s"
        raise AudioError(window.name, f"no such part: {start:g} s to {until}; {length}")


def _decoder(window, part, is_alone, start=0.0, end=None):
    """Opens a part with libsndfile if that can decode it, else with ffmpeg."""
    reason = None
    if part.libsndfile:
        try:
            decoder = SoundFileDecoder(window, part, is_alone)
        except NotReadable as error:
            reason = error
        else:
            if not decoder.is_short:
                return decoder
            decoder.__exit__()
    if reason and part.kind not in DEMUXERS:
        raise AudioError(window.name, f"not readable as audio: {part.kind}: {reason}")
    try:
        return FfmpegDecoder(window, part, is_alone, start, end)
    except AudioError as error:
        if reason is None:
            raise
        raise AudioError(window.name, f"not readable as audio: {part.kind}: {reason}; {error.reason}") from None


def _resampled(blocks):
    """Converts (rate, float32 [n]) to float32 blocks at 16 kHz; parts of the same rate join without a gap."""
    resampler = rate = None
    for next_rate, block in blocks:
        if next_rate != rate:
            if resampler is not None:
                yield resampler.resample_chunk(np.empty(0, np.float32), last=True)
            resampler, rate = None, next_rate
            if rate != SAMPLE_RATE:
                import soxr

                resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        yield block if resampler is None else resampler.resample_chunk(block)
    if resampler is not None:
        yield resampler.resample_chunk(np.empty(0, np.float32), last=True)


def _checked_channel(channel):
    if channel == "mean" or (isinstance(channel, (int, np.integer)) and not isinstance(channel, bool) and channel >= 1):
        return channel
    raise ValueError(f"channel {channel!r}: expected mean, or a number from 1")


@contextlib.contextmanager
def _opened(source):
    """Opens a path, or wraps an open file, which stays open."""
    with contextlib.ExitStack() as files:
        if hasattr(source, "read"):
            name = str(getattr(source, "name", "") or "an open file")
            if not source.seekable():
                copy = files.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(source, copy)
                source = copy
        else:
            name = os.fspath(source)
            source = files.enter_context(_open_file(name))
        window = Window(name, source)
        if not window.size:
            raise AudioError(name, "empty file")
        try:
            yield window
        except OSError as error:
            if error.errno in NOT_OF_THE_FILE:
                raise
            raise AudioError(name, f"cannot be read: {error.strerror}") from None


def _open_file(path):
    try:
        # NONBLOCK: do not wait for the writer of a named pipe.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in NOT_OF_THE_FILE:
            raise
        missing = isinstance(error, FileNotFoundError)
        raise AudioError(path, "no such file" if missing else f"cannot be opened: {error.strerror}") from None
    except ValueError as error:  # a name with a zero in it
        raise AudioError(path, f"cannot be opened: {error}") from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise AudioError(path, "not a file")
    return open(number, "rb")
