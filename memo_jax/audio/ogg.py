"""Ogg: where a stream ends and the next in a chain begins, and whether all pages are present."""

import functools

from memo_jax.audio.error import AudioError
from memo_jax.audio.part import Part, truncated
from memo_jax.audio.window import Window

CODECS = {  # by the first bytes of the first packet
    b"\x01vorbis": "vorbis",
    b"OpusHead": "opus",
    b"\x7fFLAC": "flac",
    b"Speex   ": "speex",
}
LIBSNDFILE = {"vorbis", "opus"}
BEGINS, ENDS = 2, 4  # flags of a page


def walk_ogg(window: Window, start: int) -> tuple[list[Part], int]:
    """Returns the first link of a chain, one stream or several multiplexed, as a Part, and the position after it.

    Raises:
      AudioError: truncated, or pages are damaged or missing.
    """
    place, streams, has_data = start, {}, False
    while len(head := window.read(place, 27)) == 27 and head[:4] == b"OggS":
        flags, serial, number = head[5], head[14:18], int.from_bytes(head[18:22], "little")
        begin = place + 27 + head[26]
        segments = window.read(place + 27, head[26])
        behind = begin + sum(segments)
        if flags & BEGINS and has_data:
            break  # the next link
        if len(segments) < head[26] or behind > window.size:
            raise truncated(window, "its last page is incomplete")
        if flags & BEGINS:
            streams[serial] = [_codec(window.read(begin, 8)), number, flags & ENDS, 0]
        elif serial not in streams:
            raise AudioError(window.name, f"damaged: the page at byte {place:,} belongs to no stream")
        else:
            has_data, stream = True, streams[serial]
            if number != stream[1] + 1:
                raise AudioError(window.name, f"damaged: pages are missing before byte {place:,}")
            ticks = int.from_bytes(head[6:14], "little", signed=True)  # -1: no packet ends in this page
            if ticks != -1 and stream[0] in LIBSNDFILE and ticks < stream[3]:
                raise AudioError(
                    window.name, f"damaged: the time of the page at byte {place:,} is before that of others"
                )
            stream[1:] = number, flags & ENDS, max(ticks, stream[3])
        place = behind
    else:
        if head[:4] == b"OggS"[: len(head)] and window.size > place:
            raise truncated(window, "its last page is incomplete")
        if window.find(b"OggS\0", place) < window.size:
            raise AudioError(window.name, f"damaged: no page at byte {place:,}, and more pages follow")
    if not all(ends for _, _, ends, _ in streams.values()):
        raise truncated(
            window,
            "its last page is not marked as the last (if nothing is missing, fix it with: ffmpeg -i IN -c copy OUT)",
        )
    codecs = [codec for codec, *_ in streams.values()]
    return [Part("ogg", start, place, libsndfile=len(codecs) == 1 and codecs[0] in LIBSNDFILE)], place


@functools.cache
def _codec(packet):
    return next((name for mark, name in CODECS.items() if packet.startswith(mark)), None)
