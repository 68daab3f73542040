"""Decoding by the program ffmpeg, for what libsndfile cannot read: m4a, mp4, webm, wma, amr, aac and rare codecs.

Recordings come from anywhere, so ffmpeg gets as little freedom as possible:

* The container is identified by `containers.find_parts` and forced with `-f`. ffmpeg never guesses, so it never opens a
  playlist, list of images, subtitle or script, whatever the file is called. Whitelists limit everything that a
  container might nest to that one demuxer, and to files.
* It gets an open file (`/dev/fd/N`) and no name. So a name cannot act as an option, protocol or pattern, and the file
  that was checked is the file that is decoded.
* It has no terminal, no standard input, and a process group of its own. It is killed when its reader ends (on Linux)
  and when it stalls: it may take a minute, plus a second for each megabyte of input and each second decoded.
"""

import contextlib
import functools
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from memo_jax.audio.error import BLOCK_SAMPLES, NOT_OF_THE_FILE, AudioError, check_rate
from memo_jax.audio.part import Part
from memo_jax.audio.window import View, Window, file_number

DEMUXERS = {  # by the kind of container
    "aac": "aac",
    "aiff": "aiff",
    "amr": "amr",
    "avi": "avi",
    "caf": "caf",
    "mp3": "mp3",
    "mp4": "mov",
    "ogg": "ogg",
    "w64": "w64",
    "wav": "wav",
    "webm": "matroska",
    "wma": "asf",
}
INDEXED = {"mp4", "webm", "avi"}  # in these ffmpeg finds a time by an index; in others it guesses from the bitrate
PATIENCE = 60.0  # s that ffmpeg may always take
HEADER = 24  # bytes of the header of an au file that matter
TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


class FfmpegDecoder:
    """A part of a file that ffmpeg is decoding; has the attributes of `SoundFileDecoder`.

    Args:
      window: the file.
      part: what to decode of it.
      is_alone: whether the file has no other part.
      start: seconds to skip.
      end: second to stop at, None for the end.

    Raises:
      AudioError: ffmpeg is missing or fails, it finds no samples, or a sample rate out of range.
    """

    frames = None

    def __init__(self, window: Window, part: Part, is_alone: bool, start: float = 0.0, end: float | None = None):
        self._name, self._kind, self._size = window.name, part.kind, part.end - part.start
        program = shutil.which("ffmpeg")
        if program is None:
            raise AudioError(
                self._name,
                f"ffmpeg is missing: it is needed to decode {part.kind}; install it, or convert it to wav or flac",
            )
        self._skipped = start if part.kind in INDEXED and is_alone else 0.0  # s skipped by ffmpeg
        self.passed = None if self._skipped else 0.0
        span = ["-ss", f"{self._skipped:.9f}"] if self._skipped else []
        if end is not None:
            span += ["-t", f"{end - self._skipped:.9f}"]
        self._closing, self._errors, self._at_end = contextlib.ExitStack(), b"", False
        self._waited = self._decoded = 0.0  # s
        try:
            file = self._closing.enter_context(_system_file(window, part, is_alone))
            file.seek(0)
            demuxer = DEMUXERS[part.kind]
            # Without -xerror, ffmpeg skips what is damaged or missing, and reports success.
            command = [program, "-v", "error", "-nostdin", "-xerror", "-threads", "1"]
            command += ["-protocol_whitelist", "file,pipe", "-format_whitelist", demuxer, "-f", demuxer, *span]
            command += ["-i", f"file:/dev/fd/{file.fileno()}"]
            # The first 24 bytes of an au file state rate and channels. ffmpeg's own mix would not be their mean.
            command += ["-map", "0:a:0", "-map_metadata", "-1", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
            self._process = subprocess.Popen(
                _tied(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[file.fileno()],
                process_group=0,
            )
            self._closing.callback(self._end)
            self._pipes = self._closing.enter_context(selectors.DefaultSelector())
            for pipe in (self._process.stdout, self._process.stderr):
                self._pipes.register(pipe, selectors.EVENT_READ)
            header = self._read(HEADER)
            if len(header) < HEADER or header[:4] != b".snd":
                self._finish()
                raise AudioError(self._name, f"ffmpeg failed: it decoded no samples from this {self._kind}")
            offset, self.rate, self.channels = (int.from_bytes(header[i : i + 4], "big") for i in (4, 16, 20))
            check_rate(self._name, self.rate)
            self._read(offset - HEADER)
        except OSError as error:
            self._closing.close()
            if error.errno in NOT_OF_THE_FILE:
                raise
            raise AudioError(self._name, f"ffmpeg cannot be given this {self._kind}: {error.strerror}") from None
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._closing.close()

    def blocks(self, first: int, wanted: int | None) -> Iterator[np.ndarray]:
        """Yields float32 [n, channels] from frame `first` on, `wanted` frames or all.

        Raises:
          AudioError: ffmpeg failed, or stalled and was killed.
        """
        first -= round(self._skipped * self.rate)
        step, frame, place = max(1, BLOCK_SAMPLES // self.channels), 4 * self.channels, 0
        while data := self._read(frame * step):
            block = np.frombuffer(data[: len(data) // frame * frame], ">f4").reshape(-1, self.channels)
            self._decoded += len(block) / self.rate
            begin, stop = max(0, first - place), None if wanted is None else max(0, first + wanted - place)
            place += len(block)
            self.passed = self._skipped + place / self.rate
            block = block[begin:stop]
            if len(block):
                yield block.astype(np.float32)
            if wanted is not None and place >= first + wanted:
                return
        self._finish()

    def _read(self, count):
        """`count` bytes of ffmpeg's output, fewer at the end. Keeps the end of its messages."""
        data = bytearray()
        while len(data) < count and not self._at_end:
            for pipe in self._ready():
                chunk = os.read(
                    pipe.fileno(), min(count - len(data), 1 << 20) if pipe is self._process.stdout else 4096
                )
                if not chunk:
                    self._pipes.unregister(pipe)
                    self._at_end |= pipe is self._process.stdout
                elif pipe is self._process.stdout:
                    data += chunk
                else:
                    self._errors = (self._errors + chunk)[-4096:]
        return bytes(data)

    def _ready(self):
        """Waits for output or messages and returns the pipes that have some."""
        begun = time.monotonic()
        ready = self._pipes.select(max(0.0, PATIENCE + self._size / 1e6 + self._decoded - self._waited))
        self._waited += time.monotonic() - begun
        if not ready:
            raise AudioError(self._name, f"ffmpeg hangs: gave up on this {self._kind} after {self._waited:.0f} s")
        return [key.fileobj for key, _ in ready]

    def _finish(self):
        """Waits until ffmpeg ends and raises AudioError unless it succeeded."""
        while self._pipes.get_map():
            for pipe in self._ready():
                chunk = os.read(pipe.fileno(), 4096)
                if not chunk:
                    self._pipes.unregister(pipe)
                elif pipe is self._process.stderr:
                    self._errors = (self._errors + chunk)[-4096:]
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AudioError(self._name, f"ffmpeg hangs: gave up on this {self._kind}") from None
        text = self._errors.decode(errors="replace")
        if "ended prematurely" in text:
            raise AudioError(self._name, f"truncated: the {self._kind} ends before its end mark")
        if "matches no streams" in text:
            raise AudioError(self._name, f"no sound: this {self._kind} has no audio track")
        if status:
            reason = f"signal {signal.Signals(-status).name}" if status < 0 else _last_line(text)
            raise AudioError(self._name, f"ffmpeg failed: {reason} (decoding {self._kind})")

    def _end(self):
        if self._process.returncode is None:  # else its number may be another process's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.stdout.close()
        self._process.stderr.close()
        self._process.wait()


def _system_file(window, part, is_alone):
    """An open file with a descriptor, from which ffmpeg reads the part."""
    begins = part.start == 0 or window.read(0, 3) == b"ID3"
    if is_alone and begins and not part.patches and not part.prefix and file_number(window.file) is not None:
        return contextlib.nullcontext(window.file)
    copy = tempfile.TemporaryFile()  # not a pipe: the table of an m4a is mostly at its end
    shutil.copyfileobj(View(window.file, part.start, part.end, part.prefix, part.patches), copy, 1 << 20)
    copy.flush()
    return copy


def _tied(command):
    """The command, wrapped to be killed when the thread that starts it ends."""
    program = _setpriv()
    return [program, "--pdeathsig", "KILL", *command] if program else [sys.executable, "-ISc", TIED, *command]


@functools.cache
def _setpriv():
    """The path of setpriv from util-linux, which starts faster than Python; busybox's cannot do this."""
    program = shutil.which("setpriv")
    return program if program and os.path.basename(os.path.realpath(program)) == "setpriv" else None


def _last_line(text: str) -> str:
    lines = [re.sub(r"^\[[^\]]* @ 0x[0-9a-f]+\] ", "", line.strip()) for line in text.splitlines() if line.strip()]
    return re.sub(r"^(file:)?/dev/fd/\d+: ", "", lines[-1]) if lines else "it failed without a message"
