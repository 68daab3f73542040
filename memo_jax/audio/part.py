"""A recording within a file, and the errors of those who look for it."""

from typing import NamedTuple

from memo_jax.audio.error import AudioError
from memo_jax.audio.window import Window


class Part(NamedTuple):
    """A recording within a file, alone there but for tags, or one of several that follow one another.

    Attributes:
      kind: of container, a key of `containers.WALKERS`.
      start, end: its bytes in the file.
      frames: the samples per channel that its frames hold, None where only its decoder can tell.
      prefix: bytes to put before it.
      patches: (position in the file, bytes) to put over it, such as the true length over a placeholder.
      libsndfile: whether that decodes it. If not, or where it turns out not to, ffmpeg does.
    """

    kind: str
    start: int
    end: int
    frames: int | None = None
    prefix: bytes = b""
    patches: tuple[tuple[int, bytes], ...] = ()
    libsndfile: bool = True


def truncated(window: Window, details: str) -> AudioError:
    """The error of a file that ends early."""
    return AudioError(window.name, f"truncated: {details}")


def unreadable(window: Window, what: str) -> AudioError:
    """The error of a file that is no recording but `what`."""
    return AudioError(window.name, f"not readable as audio: it holds {what}")
