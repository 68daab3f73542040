"""What a file holds, judged by its bytes and never by its name, and whether it is complete.

`find_parts` identifies the container, finds where it ends, and continues after it: `cat 1.ogg 2.ogg` has two parts.
Nothing else decides what a decoder is given. Playlists, lists of images, subtitles and other files that make a decoder
open further files are not among the known containers, so no decoder ever sees one.

One rule covers truncated files of every container. A file is refused if it holds less than its header promises, if its
last frame, page or box is incomplete, or if its end mark or index is missing. Two things do not count as a promise: the
placeholders that programs leave in the header when they write to a pipe (0, all ones, or close to 2³¹), and a length
that is at most `chunks.SLACK` bytes too long. One loss goes unnoticed: whole frames missing from the end of a container
that states no length (raw AAC, AMR, MP3 without a header frame, FLAC and WebM of unknown length).
"""

from collections.abc import Callable

from memo_jax.audio import chunks, flac, mpeg, ogg
from memo_jax.audio.error import AudioError
from memo_jax.audio.kinds import first_frame, kind_at, skip_tags, what_it_holds
from memo_jax.audio.part import Part, truncated, unreadable
from memo_jax.audio.window import Window

MAX_PARTS = 10_000
STRAY = 4096  # bytes; unknown data of at most this size after the end of a recording is ignored
AMR_NARROW = (13, 14, 16, 18, 20, 21, 27, 32, 6, 0, 0, 0, 0, 0, 0, 1)  # bytes of a frame by its type
AMR_WIDE = (18, 24, 33, 37, 41, 47, 51, 59, 61, 6, 0, 0, 0, 0, 1, 1)


def find_parts(window: Window) -> list[Part]:
    """Returns the recordings in a file, at least one.

    Raises:
      AudioError: not a known container, truncated, or damaged so that its frames cannot be counted.
    """
    parts, place = [], 0
    while (place := skip_tags(window, place)) < window.size:
        kind = kind_at(window, place)
        if kind is None and not parts:
            place = first_frame(window, place)
            kind = place is not None and kind_at(window, place)
        if not kind:
            if parts and window.size - place <= STRAY:
                break
            if parts:
                raise AudioError(
                    window.name,
                    f"damaged: {window.size - place:,} bytes follow the end of the {parts[-1].kind} data according to "
                    "its header, and are neither audio nor a tag",
                )
            raise unreadable(window, what_it_holds(window))
        found, behind = WALKERS[kind](window, place)
        if behind <= place:
            raise unreadable(window, f"a damaged {kind} header, in which it ends where it begins")
        parts += found
        place = behind
        if len(parts) > MAX_PARTS:
            raise AudioError(window.name, f"more than {MAX_PARTS:,} recordings in one file")
    if not parts:
        raise unreadable(window, what_it_holds(window))
    return parts


def walk_amr(window: Window, start: int) -> tuple[list[Part], int]:
    """Returns the frames of AMR from `start` on as a Part, and the position after them; raises AudioError."""
    is_wide, sizes = window.read(start, 9) == b"#!AMR-WB\n", AMR_NARROW
    place = start + 6
    if is_wide:
        place, sizes = start + 9, AMR_WIDE
    elif window.read(start, 6) != b"#!AMR\n":
        raise unreadable(window, "AMR of several channels")
    while place < window.size and window.read(place, 5) != b"#!AMR":
        size = sizes[window.read(place, 1)[0] >> 3 & 15]
        if not size:
            raise AudioError(window.name, f"damaged: no AMR frame at byte {place:,}")
        if place + size > window.size:
            raise truncated(window, "its last frame is incomplete")
        place += size
    return [Part("amr", start, place, libsndfile=False)], place


WALKERS: dict[str, Callable[[Window, int], tuple[list[Part], int]]] = {
    "wav": chunks.walk_wav,
    "w64": chunks.walk_w64,
    "aiff": chunks.walk_aiff,
    "au": chunks.walk_au,
    "caf": chunks.walk_caf,
    "sph": chunks.walk_sph,
    "avi": chunks.walk_avi,
    "mp4": chunks.walk_mp4,
    "webm": chunks.walk_matroska,
    "wma": chunks.walk_asf,
    "flac": flac.walk_flac,
    "amr": walk_amr,
    "ogg": ogg.walk_ogg,
    "mp3": mpeg.walk_mp3,
    "aac": mpeg.walk_aac,
}
