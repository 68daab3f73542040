"""The error for a recording that cannot be used, and the limits that all decoders share."""

import errno
import os

SAMPLE_RATE = 16000  # Hz; everything in this project is computed at this rate
# Hz; a header with any other rate is wrong, and resampling by its ratio could exhaust memory.
SAMPLE_RATES = (4000, 768000)
BLOCK_SAMPLES = 1 << 20  # samples over all channels decoded at a time


# Errors of the machine, not of a recording: a full disk, no more open files, memory or processes.
NOT_OF_THE_FILE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


class AudioError(ValueError):
    """A recording that cannot be used: the message is "file: reason", and a reason is "kind" or "kind: details"."""

    def __init__(self, name: str | os.PathLike, reason: str):
        super().__init__(f"{_printable(name)}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):  # lets the error travel between processes
        return type(self), (self.name, self.reason)


def check_rate(name: str | os.PathLike, rate: int) -> None:
    """Raises AudioError for a sample rate outside `SAMPLE_RATES`."""
    low, high = SAMPLE_RATES
    if isinstance(rate, bool) or not low <= rate <= high:
        raise AudioError(name, f"sample rate out of range: {rate} Hz, expected {low} to {high}")


def _printable(name) -> str:
    return os.fsencode(name).decode(errors="backslashreplace") if isinstance(name, (str, os.PathLike)) else str(name)
