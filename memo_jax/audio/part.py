"""A recording within a file, and the errors raised while looking for one."""

from typing import NamedTuple

from memo_jax.audio.error import AudioError
from memo_jax.audio.window import Window


class Part(NamedTuple):
    """A recording within a file: the only one, apart from tags, or one of several in sequence.

    Attributes:
      kind: the container, a key of `containers.WALKERS`.
      start, end: its bytes in the file.
      frames: samples per channel, None if only the decoder knows.
      prefix: bytes to insert before it.
      patches: (position in the file, bytes) that replace what is there, such as a placeholder for the length.
      libsndfile: whether to try libsndfile. ffmpeg decodes the rest, and whatever libsndfile turns out to be unable to
        read.
    """

    kind: str
    start: int
    end: int
    frames: int | None = None
    prefix: bytes = b""
    patches: tuple[tuple[int, bytes], ...] = ()
    libsndfile: bool = True


def truncated(window: Window, details: str) -> AudioError:
    """Returns the error for a file that ends early."""
    return AudioError(window.name, f"truncated: {details}")


def unreadable(window: Window, what: str) -> AudioError:
    """Returns the error for a file that is not a recording but `what`."""
    return AudioError(window.name, f"not readable as audio: it holds {what}")
