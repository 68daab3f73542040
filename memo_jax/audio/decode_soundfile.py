"""Decoding by libsndfile: wav, flac, ogg, opus, mp3, aiff, au, caf, sph, w64."""

import os
import sys
from collections.abc import Iterator

import numpy as np

from memo_jax.audio.error import BLOCK_SAMPLES, AudioError, check_rate
from memo_jax.audio.part import Part
from memo_jax.audio.window import View, Window, file_number

MP3_DELAY = 3000  # samples; an MP3 may decode to this much less: the decoder's delay and the encoder's padding


class NotReadable(Exception):
    """Why libsndfile cannot open a part; ffmpeg may be able to."""


class SoundFileDecoder:
    """A part of a file, opened.

    Attributes:
      rate: Hz.
      channels: their number.
      frames: samples per channel, None if unknown.
      passed: seconds of the part that `blocks` has read or skipped, None if unknown.
      is_short: whether libsndfile would stop before the end.

    Raises:
      NotReadable: libsndfile cannot open it.
      AudioError: a sample rate out of range.
    """

    def __init__(self, window: Window, part: Part, is_alone: bool):
        import soundfile

        self._name, self._part = window.name, part
        # libsndfile reads fastest from a file descriptor.
        begins = part.start == 0 or (part.kind == "mp3" and window.read(0, 3) == b"ID3")
        is_whole = is_alone and begins and (part.end == window.size or part.kind == "mp3")
        if is_whole and not part.prefix and not part.patches and (number := file_number(window.file)) is not None:
            os.lseek(number, 0, os.SEEK_SET)
            source = os.dup(number)
        else:
            source = View(window.file, part.start, part.end, part.prefix, part.patches)
        try:
            self._file = soundfile.SoundFile(source)
        except (soundfile.SoundFileError, TypeError, ValueError) as error:
            raise NotReadable(_reason(error)) from None
        # soundfile seeks after each block, to where it is, unless the file says that it cannot seek. That costs Ogg and
        # Opus a seventh of the time. In an MP3, libsndfile may land next to that place, and then decodes frames without
        # those that they depend on: up to a quarter of a second is lost.
        self._file.seekable = lambda: False
        self.rate, self.channels = self._file.samplerate, self._file.channels
        unknown = not 0 <= self._file.frames < 2**62
        self.frames = part.frames if unknown or part.frames is not None else self._file.frames
        self.is_short = not unknown and self.frames - self._file.frames > MP3_DELAY
        self.passed = 0.0
        check_rate(self._name, self.rate)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def blocks(self, first: int, wanted: int | None) -> Iterator[np.ndarray]:
        """Yields float32 [n, channels] from frame `first` on: `wanted` frames, or all.

        Raises:
          AudioError: damaged, or fewer frames than its header promises.
        """
        import soundfile

        wanted, done = sys.maxsize if wanted is None else wanted, 0
        step = max(1, BLOCK_SAMPLES // self.channels)
        try:
            if first:
                first = self._seek(first, step)
                self.passed = first / self.rate
            while done < wanted and len(block := self._file.read(min(wanted - done, step), "float32", always_2d=True)):
                done += len(block)
                self.passed = (first + done) / self.rate
                yield block
        except (soundfile.SoundFileError, RuntimeError) as error:
            place = (first + done) / self.rate
            raise AudioError(self._name, f"damaged: {_reason(error)} after {place:.2f} s") from None
        if self.frames is not None:
            promised = min(self.frames - first, wanted)
            if done < promised - (MP3_DELAY if self._part.kind == "mp3" else 0):
                raise AudioError(self._name, f"truncated: {done:,} of the {promised:,} frames that its header promises")

    def _seek(self, first, step):
        """Goes to a frame or the end and returns its number; by decoding, in MP3 and where libsndfile cannot seek."""
        # The class's method: the instance's is replaced above.
        if self._part.kind != "mp3" and self.frames is not None and type(self._file).seekable(self._file):
            return self._file.seek(first)
        left = first
        while left > 0 and (skipped := len(self._file.read(min(left, step), "float32"))):
            left -= skipped
        return first - left


def _reason(error):
    # python-soundfile says "Error opening 'PATH': reason", libsndfile's own reasons end in a full stop
    return str(getattr(error, "error_string", "") or error).rsplit(": ", 1)[-1].strip().rstrip(".")
