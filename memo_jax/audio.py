"""Recordings of any common kind → 16 kHz mono samples, or an error that names the file and the reason."""

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SAMPLE_RATE = 16000
SOUNDFILE_EXTENSIONS = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".sph"})
FFMPEG_EXTENSIONS = frozenset({".m4a", ".aac", ".mp4", ".wma", ".webm", ".amr"})
AUDIO_EXTENSIONS = SOUNDFILE_EXTENSIONS | FFMPEG_EXTENSIONS
SAMPLE_RATES = (4000, 768000)  # Hz; a header outside this lies, and resampling by its ratio would exhaust the memory
LARGEST_SAMPLE = 32.0  # 30 dB over full scale: such float files are not scaled to [-1, 1] and would only clip
SPAN_OVERSHOOT = 0.5  # s that a part may reach beyond the recording, as in Kaldi
BLOCK_SAMPLES = 1 << 20  # samples over all channels decoded at a time


class AudioError(ValueError):
    """A recording that cannot be used: the message is "file: reason", and a reason is "kind" or "kind: details"."""

    def __init__(self, name, reason: str):
        super().__init__(f"{_printable(name)}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):  # lets the error travel between processes
        return type(self), (self.name, self.reason)


def is_audio_name(name) -> bool:
    """Whether the extension of `name` is one of a recording (`AUDIO_EXTENSIONS`, any case)."""
    return os.path.splitext(os.fspath(name))[1].lower() in AUDIO_EXTENSIONS


def read_audio(
    path_or_file,
    *,
    sample_rate: int = SAMPLE_RATE,
    max_seconds: float = 4 * 3600,
    span: tuple[float, float | None] = (0.0, None),
) -> np.ndarray:
    """Decodes a recording, or a part of it, to mono 16-bit samples.

    Channels are averaged, the rate is converted with soxr (high quality), values beyond full scale are clipped. Files
    are decoded in blocks, so memory is that of the result whatever the header claims.

    Args:
      path_or_file: wav, flac, ogg/opus, mp3, aiff, au by libsndfile; m4a/aac and the like by ffmpeg where it is
        installed. Or an open binary file of these kinds, whose attribute `name` tells m4a/aac from the rest.
      sample_rate: of the result, Hz.
      max_seconds: longest recording accepted; guards against files that unpack to more than the memory.
      span: first and last second of the part to read, which is found without decoding all before it; None for the end.
        A part may end up to half a second after the recording, and is then shorter.

    Returns:
      int16 [L], L ≥ 1; 32768 is full scale.

    Raises:
      AudioError: (a ValueError) missing, not a file, empty, unreadable, truncated, without samples, NaN or infinite
        samples, float samples far beyond [-1, 1], too long, a span outside it, or ffmpeg needed and missing.
    """
    return _concatenate(
        path_or_file,
        (_to_int16(chunk) for chunk in _chunks(path_or_file, sample_rate, None, span)),
        np.int16,
        int(max_seconds * sample_rate),
        max_seconds,
    )


def as_audio(samples, rate: int, name: str = "the array") -> np.ndarray:
    """Mono 16-bit samples at 16 kHz, int16 [L], of an array as `soundfile.read` and others give it.

    Args:
      samples: [L] or [L, channels]; floating point in [-1, 1] (beyond is clipped), or int16.
      rate: its samples a second, Hz.
      name: of it in error messages.

    Raises:
      AudioError: (a ValueError) no samples, a wrong shape, type or rate, NaN or infinite samples, or floats far beyond
        [-1, 1].
    """
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[1] > min(samples.shape[0], 64)):
        raise AudioError(name, f"wrong shape: {list(samples.shape)}, expected [samples] or [samples, channels]")
    if samples.dtype != np.int16 and not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(name, f"wrong type: {samples.dtype}, expected floats in [-1, 1] or int16")
    if isinstance(rate, bool) or not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
        raise AudioError(name, f"sample rate out of range: {rate} Hz, expected {SAMPLE_RATES[0]} to {SAMPLE_RATES[1]}")
    if not samples.size:
        raise AudioError(name, "no samples")
    if samples.dtype == np.int16 and samples.ndim == 1 and rate == SAMPLE_RATE:
        return samples
    if samples.dtype == np.int16:
        samples = samples / np.float32(32768)
    _check_samples(name, samples.ravel())
    mono = np.ascontiguousarray(samples if samples.ndim == 1 else samples.mean(axis=1), np.float32)
    if rate != SAMPLE_RATE:
        import soxr

        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
        if not len(mono):
            raise AudioError(name, "no samples")
    return _to_int16(mono)


def check_speech(name, samples: np.ndarray, min_seconds: float) -> None:
    """Raises AudioError for 16-kHz samples that cannot be speech: shorter than that, or all equal."""
    if len(samples) < min_seconds * SAMPLE_RATE:
        raise AudioError(name, f"shorter than {min_seconds:g} s: {len(samples) / SAMPLE_RATE:.3f} s")
    if samples.min() == samples.max():
        raise AudioError(name, "silence: all samples are equal")


def read_float_audio(
    path_or_file, *, sample_rate: int = SAMPLE_RATE, channel: int | None = None, max_seconds: float = 4 * 3600
) -> np.ndarray:
    """Decodes like `read_audio` but to float32 [L], full scale 1, unclipped; one `channel`, or the mean when None."""
    return _concatenate(
        path_or_file,
        _chunks(path_or_file, sample_rate, channel, (0.0, None)),
        np.float32,
        int(max_seconds * sample_rate),
        max_seconds,
    )


def audio_seconds(path) -> float:
    """Length of a recording in seconds, from its header where it has one; raises AudioError as `read_audio`."""
    path = os.fspath(path)
    _check_is_nonempty_file(path)
    if needs_ffmpeg(path):
        return len(read_audio(path)) / SAMPLE_RATE
    with _opened(path) as file:
        _check_header(path, file, None)
        return file.frames / file.samplerate


def needs_ffmpeg(name) -> bool:
    """Whether a recording of this name is decoded by ffmpeg."""
    return os.path.splitext(os.fspath(name))[1].lower() in FFMPEG_EXTENSIONS


def _chunks(source, sample_rate, channel, span):
    """Yields mono float32 chunks of the recording at `sample_rate`."""
    if not hasattr(source, "read"):
        source = os.fspath(source)
        _check_is_nonempty_file(source)
    if needs_ffmpeg(_name(source)):
        return _ffmpeg_chunks(source, sample_rate, channel, span)
    return _soundfile_chunks(source, sample_rate, channel, span)


def _check_is_nonempty_file(path):
    try:
        status = os.stat(path)
    except OSError as error:
        raise AudioError(path, _missing_reason(error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise AudioError(path, "not a file")
    if status.st_size == 0:
        raise AudioError(path, "empty file")


def _missing_reason(error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else f"cannot be opened: {error.strerror}"


def _soundfile_chunks(source, sample_rate, channel, span):
    import soundfile
    import soxr

    name, file = _name(source), _opened(source)
    with file:
        _check_header(name, file, channel)
        resampler = None
        if file.samplerate != sample_rate:
            resampler = soxr.ResampleStream(file.samplerate, sample_rate, 1, dtype="float32", quality="HQ")
        first, wanted = _span_frames(name, file, span)
        frames = 0
        while True:
            try:
                if first and not frames:
                    _seek(file, first)
                block = file.read(
                    min(wanted - frames, max(1, BLOCK_SAMPLES // file.channels)), dtype="float32", always_2d=True
                )
            except (soundfile.SoundFileError, RuntimeError) as error:
                place = (first + frames) / file.samplerate
                raise AudioError(name, f"damaged: {_reason(error)} after {place:.2f} s") from None
            frames += len(block)
            with np.errstate(over="ignore", invalid="ignore"):  # of damaged floats: the check that follows tells
                mono = block.mean(axis=1) if channel is None and file.channels > 1 else block[:, channel or 0]
            _check_samples(name, mono)
            ends = not len(block)
            if resampler is not None:
                mono = resampler.resample_chunk(np.ascontiguousarray(mono), last=ends)
            if len(mono):
                yield mono
            if ends:
                break
        # The length an MP3 announces is an estimate; everything else promises what it holds.
        promised = min(file.frames - first, wanted)
        if frames < promised and file.format != "MP3":
            raise AudioError(name, f"truncated: {frames} of the {promised} frames that its header promises")


def _seek(file, first):
    """Goes to a frame, in an MP3 and in a file that does not seek by decoding all before it."""
    if file.format != "MP3" and type(file).seekable(file):  # of its class: `_opened` denies it
        file.seek(first)
        return
    while first > 0 and (skipped := len(file.read(min(first, max(1, BLOCK_SAMPLES // file.channels)), "float32"))):
        first -= skipped


def _span_frames(name, file, span):
    """The first frame of a span, and the number of its frames."""
    start, stop = span
    first = round(start * file.samplerate)
    seconds = file.frames / file.samplerate
    if first and first >= file.frames or stop is not None and stop > seconds + SPAN_OVERSHOOT:
        end = "the end" if stop is None else f"{stop:g} s"
        raise AudioError(name, f"no such part: {start:g} s to {end}, of {seconds:.2f} s")
    return first, sys.maxsize if stop is None else max(0, round(stop * file.samplerate) - first)


def _opened(source):
    import soundfile

    name = _name(source)
    try:
        if isinstance(source, str):
            os.close(os.open(source, os.O_RDONLY))  # a permission error in the system's words, not libsndfile's
        file = soundfile.SoundFile(source if isinstance(source, str) else _ForgivingFile(source))
        # soundfile seeks after each block, to where it is, unless the file says that it cannot seek. That costs Ogg and
        # Opus a seventh of the time. In an MP3, libsndfile may land beside that place, and then decodes frames without
        # those that they build on: up to a quarter of a second is lost.
        file.seekable = lambda: False
        return file
    except OSError as error:
        raise AudioError(name, _missing_reason(error)) from None
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        raise AudioError(name, f"not readable as audio: {_reason(error)}") from None


class _ForgivingFile:
    """An open file in which libsndfile, led by a damaged header, may seek to places that do not exist."""

    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def seek(self, offset, whence=os.SEEK_SET):
        with contextlib.suppress(ValueError, OSError):
            self._file.seek(offset, whence)
        return self._file.tell()


def _check_header(name, file, channel):
    low, high = SAMPLE_RATES
    if not low <= file.samplerate <= high:
        raise AudioError(name, f"sample rate out of range: {file.samplerate} Hz, expected {low} to {high}")
    if channel is not None and channel >= file.channels:
        raise AudioError(name, f"channel missing: number {channel} of {file.channels}")
    # libsndfile shortens the length of a WAV that ends early and tells of it in its log only. Writers to a pipe leave
    # the length at a placeholder (0 or near 2³¹ or 2³²), which is no promise.
    promise = re.search(r"data : (\d+) \(should be (\d+)\)", file.extra_info) if file.format.startswith("WAV") else None
    if promise and int(promise[2]) < int(promise[1]) < 2**31 - 2**16:
        raise AudioError(name, f"truncated: {promise[2]} of the {promise[1]} bytes that its header promises")


def _check_samples(name, samples):
    if not np.isfinite(samples).all():
        raise AudioError(name, "NaN or infinite samples")
    if len(samples) and max(samples.max(), -samples.min()) > LARGEST_SAMPLE:
        raise AudioError(name, f"samples out of range: up to {np.abs(samples).max():.4g}, expected within [-1, 1]")


def _ffmpeg_chunks(source, sample_rate, channel, span):
    """Yields what ffmpeg decodes; it averages the channels itself, so only `channel=None` is possible."""
    name, (start, stop) = _name(source), span
    if channel is not None:
        raise AudioError(name, "not read by channel: convert it to wav or flac")
    program = shutil.which("ffmpeg")
    if program is None:
        raise AudioError(
            name,
            f"ffmpeg is missing: it is needed to decode {Path(name).suffix}; install it, or convert "
            "the file to wav or flac",
        )
    with contextlib.ExitStack() as files:
        path = source
        if not isinstance(source, str):  # not by a pipe: the table of an m4a mostly stands at its end
            copy = files.enter_context(tempfile.NamedTemporaryFile(suffix=Path(name).suffix))
            shutil.copyfileobj(source, copy)
            copy.flush()
            path = copy.name
        part = ["-ss", str(start)] * bool(start) + (["-t", str(stop - start)] if stop is not None else [])
        # xerror: without it ffmpeg leaves out what is damaged or missing, and says that all went well
        command = [
            program,
            "-v",
            "error",
            "-nostdin",
            "-xerror",
            "-threads",
            "1",
            *part,
            "-i",
            f"file:{path}",
            "-map",
            "0:a:0",
            "-ac",
            "1",
            "-ar",
            str(sample_rate),
            "-f",
            "f32le",
            "pipe:1",
        ]
        # stderr goes to a file: a pipe that nobody reads would block ffmpeg once full.
        errors = files.enter_context(tempfile.TemporaryFile())
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        try:
            while data := process.stdout.read(4 * BLOCK_SAMPLES):
                samples = np.frombuffer(data[: len(data) // 4 * 4], "<f4")
                _check_samples(name, samples)
                yield samples
            if process.wait():
                errors.seek(0)
                raise AudioError(name, "ffmpeg failed: " + _last_line(errors.read(1 << 16).decode(errors="replace")))
        finally:  # also when the reader stops early, at a recording too long
            process.kill()
            process.stdout.close()
            process.wait()


def _concatenate(source, chunks, dtype, max_samples, max_seconds):
    parts, length = [], 0
    for part in chunks:
        parts.append(part)
        length += len(part)
        if length > max_samples:
            raise AudioError(_name(source), f"longer than {max_seconds:g} s: cut it into shorter recordings")
    if not length:
        raise AudioError(_name(source), "no samples")
    return parts[0] if len(parts) == 1 else np.concatenate(parts, dtype=dtype)


def _to_int16(samples):
    return np.clip(np.rint(samples * np.float32(32768)), -32768, 32767).astype(np.int16)


def _name(source) -> str:
    return source if isinstance(source, str) else str(getattr(source, "name", "") or "an open file")


def _printable(name) -> str:
    return os.fsencode(name).decode(errors="backslashreplace") if isinstance(name, (str, os.PathLike)) else str(name)


def _reason(error) -> str:
    # python-soundfile says "Error opening 'PATH': reason", libsndfile's own reasons end in a full stop
    return str(getattr(error, "error_string", "") or error).rsplit(": ", 1)[-1].strip().rstrip(".")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it failed without a message"
