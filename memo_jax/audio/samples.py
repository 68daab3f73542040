"""From decoded blocks of any rate and number of channels to mono 16-bit samples."""

import collections

import numpy as np

from memo_jax.audio.error import AudioError

LARGEST_SAMPLE = 32.0  # 30 dB over full scale: such float files are not scaled to [-1, 1] and would only clip
CANCELLED = 0.01  # of the channels' power; with less left in their mean, they cancel (64 unrelated ones leave 1/64)
QUIET = 2.0**-9  # of full scale, -54 dB; with a lower peak, speech has fewer than 7 of the 16 bits
SILENT = 2.0**-24  # of full scale; less than one step of 24 bits
FULL_SCALE = 32768


class Mixer:
    """Makes blocks [n, channels] mono: the mean of the channels, or one of them, counted from 1."""

    def __init__(self, name: str, channel: str | int):
        self._name, self._channel = name, channel
        self._power = self._mean_power = 0.0
        self.low, self.high = np.inf, -np.inf

    def mono(self, block: np.ndarray) -> np.ndarray:
        """Converts a block float32 [n, channels] to [n].

        Raises:
          AudioError: no such channel, NaN or infinite samples, or samples far beyond [-1, 1].
        """
        channels = block.shape[1]
        if self._channel != "mean" or channels == 1:
            number = 1 if self._channel == "mean" else self._channel
            if number > channels:
                raise AudioError(self._name, f"no channel {number}: it has {channels}")
            mono = np.ascontiguousarray(block[:, number - 1])
            self._check(mono)
            return mono
        with np.errstate(over="ignore", invalid="ignore"):  # from damaged floats, which _check refuses
            mono = block.mean(axis=1)
            self._check(mono)
            if channels <= 64:
                self._power += len(block) * float(block.var(axis=0).mean())
                self._mean_power += len(block) * float(mono.var())
        return mono

    def check_cancelled(self) -> None:
        """Raises AudioError if the channels cancel in their mean, as in phase-inverted stereo."""
        if self._power > 0 and self._mean_power < CANCELLED * self._power:
            raise AudioError(
                self._name,
                "phase-inverted channels: they cancel each other, and their mean is silence; read one of them, such as "
                "channel 1",
            )

    def _check(self, mono):
        if not len(mono):
            return
        low, high = mono.min(), mono.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise AudioError(self._name, "NaN or infinite samples")
        if max(high, -low) > LARGEST_SAMPLE:
            raise AudioError(self._name, f"samples out of range: up to {max(high, -low):.4g}, expected within [-1, 1]")
        self.low, self.high = min(self.low, low), max(self.high, high)


class Collector:
    """Joins blocks float32 [n] into one array of int16 or float32 samples, without a second copy.

    Floats are kept while all are below `QUIET`, so that a recording that stays so quiet can be amplified before it is
    rounded.
    """

    def __init__(self, dtype: type):
        self.length = 0
        self._dtype, self._array = dtype, np.empty(0, dtype)
        self._held, self._filled = collections.deque(), 0

    def add(self, block: np.ndarray) -> None:
        """Appends a block."""
        self.length += len(block)
        if self._dtype is not np.int16:
            self._append(block)
        elif self._held is not None and (not len(block) or max(block.max(), -block.min()) < QUIET):
            self._held.append(block)
        else:
            self._release(1.0)
            self._append(to_int16(block))

    def result(self) -> np.ndarray:
        """Returns all samples [L]; a quiet recording is amplified by a power of two, to a peak of -12 to -6 dB."""
        if self._held:
            peak = max((max(block.max(), -block.min()) for block in self._held if len(block)), default=0.0)
            exact = all(np.array_equal(scaled, np.rint(scaled)) for scaled in (FULL_SCALE * b for b in self._held))
            self._release(1.0 if exact or peak < SILENT else 2.0 ** -(np.ceil(np.log2(peak)) + 1))
        self._array.resize(self._filled, refcheck=False)
        return self._array

    def _release(self, gain):
        held, self._held = self._held, None
        while held:
            self._append(to_int16(held.popleft() * np.float32(gain)))

    def _append(self, block):
        end = self._filled + len(block)
        if end > len(self._array):  # realloc, which moves pages instead of copying them on Linux
            self._array.resize(max(end, len(self._array) * 9 // 8), refcheck=False)
        self._array[self._filled : end] = block
        self._filled = end


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Rounds and clips floats of full scale 1 to int16."""
    scaled = samples * np.float32(FULL_SCALE)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1, out=scaled)
    return scaled.astype(np.int16)
