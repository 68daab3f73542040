"""Decoding by the program ffmpeg, for what libsndfile does not know: m4a, mp4, webm, wma, amr, aac and rare codecs.

A recording comes from anywhere, so ffmpeg is given as little freedom as it needs:

* The container is told by us (`containers.find_parts`) and forced with `-f`: ffmpeg never guesses, so no playlist, list
  of images, subtitle or script is ever opened, whatever it is called. Demuxers and protocols are limited to that one
  and to files, also for what a container might nest.
* It gets an open file (`/dev/fd/N`), never a name, so a name cannot be an option, a protocol or a pattern, and what
  was checked is what is decoded.
* It has no terminal and no standard input, runs in a process group of its own, is killed with its reader (on Linux),
  and when it delivers nothing: it may take a minute, and for each megabyte and each second decoded a second more.
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

from memo_jax.audio.error import BLOCK_SAMPLES, AudioError, check_rate
from memo_jax.audio.part import Part
from memo_jax.audio.window import View, Window, file_number

DEMUXERS = {  # by the kind of container
    "aac": "aac",
    "aiff": "aiff",
    "amr": "amr",
    "au": "au",
    "avi": "avi",
    "caf": "caf",
    "flac": "flac",
    "mp3": "mp3",
    "mp4": "mov",
    "ogg": "ogg",
    "w64": "w64",
    "wav": "wav",
    "webm": "matroska",
    "wma": "asf",
}
INDEXED = {"mp4", "webm", "avi"}  # in which ffmpeg finds a time exactly; it guesses it from the bitrate in others
PATIENCE = 60.0  # s without which no recording is given up
HEADER = 24  # bytes of an au file
TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


class FfmpegDecoder:
    """A part of a file, being decoded; its attributes are those of `SoundFileDecoder`.

    Args:
      window: the file.
      part: of the file.
      is_alone: whether the file has no other part.
      start, end: seconds of the part that will be read; an `end` of None is its end.
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
        self._skipped = start if part.kind in INDEXED and is_alone else 0.0  # s that ffmpeg leaves out itself
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
            # xerror: without it ffmpeg leaves out what is damaged or missing, and says that all went well.
            command = [
                program,
                "-v",
                "error",
                "-nostdin",
                "-xerror",
                "-threads",
                "1",
                "-protocol_whitelist",
                "file,pipe",
            ]
            command += ["-format_whitelist", demuxer, "-f", demuxer, *span, "-i", f"file:/dev/fd/{file.fileno()}"]
            # An au file tells its rate and channels in 24 bytes. All channels come: ffmpeg's own mix is not their mean.
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
                raise AudioError(self._name, f"ffmpeg failed: it made no samples of this {self._kind}")
            offset, self.rate, self.channels = (int.from_bytes(header[i : i + 4], "big") for i in (4, 16, 20))
            check_rate(self._name, self.rate)
            self._read(offset - HEADER)
        except OSError as error:
            self._closing.close()
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
          AudioError: ffmpeg failed, or was killed because it delivered nothing.
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
        """So many bytes of what ffmpeg writes, fewer at its end; keeps the end of what it complains about."""
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
        """The pipes that have something, once there is one."""
        begun = time.monotonic()
        ready = self._pipes.select(max(0.0, PATIENCE + self._size / 1e6 + self._decoded - self._waited))
        self._waited += time.monotonic() - begun
        if not ready:
            raise AudioError(self._name, f"ffmpeg hangs: given up on this {self._kind} after {self._waited:.0f} s")
        return [key.fileobj for key, _ in ready]

    def _finish(self):
        """Waits for ffmpeg's end; raises AudioError unless all went well."""
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
            raise AudioError(self._name, f"ffmpeg hangs: given up on this {self._kind}") from None
        text = self._errors.decode(errors="replace")
        if "ended prematurely" in text:
            raise AudioError(self._name, f"truncated: the {self._kind} ends before its end mark")
        if "matches no streams" in text:
            raise AudioError(self._name, f"no sound: this {self._kind} has no audio track")
        if status:
            reason = f"signal {signal.Signals(-status).name}" if status < 0 else _last_line(text)
            raise AudioError(self._name, f"ffmpeg failed: {reason} (decoding {self._kind})")

    def _end(self):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.stdout.close()
        self._process.stderr.close()
        self._process.wait()


def _system_file(window, part, is_alone):
    """An open file of the system, from which ffmpeg reads the part."""
    begins = part.start == 0 or window.read(0, 3) == b"ID3"
    if is_alone and begins and not part.patches and not part.prefix and file_number(window.file) is not None:
        return contextlib.nullcontext(window.file)
    copy = tempfile.TemporaryFile()  # not a pipe: the table of an m4a mostly stands at its end
    shutil.copyfileobj(View(window.file, part.start, part.end, part.prefix, part.patches), copy, 1 << 20)
    copy.flush()
    return copy


def _tied(command):
    """The command, killed when the thread that started it ends, however that happens; on Linux alone."""
    if sys.platform != "linux":
        return command
    program = _setpriv()
    return [program, "--pdeathsig", "KILL", *command] if program else [sys.executable, "-ISc", TIED, *command]


@functools.cache
def _setpriv():
    """The program of util-linux, which starts faster than Python; that of busybox cannot do it."""
    program = shutil.which("setpriv")
    return program if program and os.path.basename(os.path.realpath(program)) == "setpriv" else None


def _last_line(text: str) -> str:
    lines = [re.sub(r"^\[[^\]]* @ 0x[0-9a-f]+\] ", "", line.strip()) for line in text.splitlines() if line.strip()]
    return re.sub(r"^(file:)?/dev/fd/\d+: ", "", lines[-1]) if lines else "it failed without a message"
