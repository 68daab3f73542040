"""FLAC: where it ends, which its header does not state, and whether its last frame is complete."""

import functools

from memo_jax.audio.part import Part, truncated
from memo_jax.audio.window import CACHED, Window

LAST_FLAC = 1 << 18  # bytes searched for the last FLAC frame: 65,535 samples of two channels take as much
CRC16 = [
    functools.reduce(lambda crc, _: crc << 1 & 0xFFFF ^ (0x8005 if crc & 0x8000 else 0), range(8), value << 8)
    for value in range(256)
]


def walk_flac(window: Window, start: int) -> tuple[list[Part], int]:
    """Returns the FLAC file at `start` as a Part, and the position after it.

    The number of samples in its header may be 0, unknown, as encoders that write to a pipe leave it.

    Raises:
      AudioError: truncated.
    """
    info, place = window.read(start + 8, 34), start + 4
    while len(head := window.read(place, 4)) == 4:  # blocks of metadata; the first bit marks the last of them
        place += 4 + int.from_bytes(head[1:], "big")
        if head[0] & 0x80:
            break
    if len(info) < 34 or place >= window.size or len(head) < 4:
        raise truncated(window, "it ends within its header")
    frames = int.from_bytes(info[13:18], "big") & (1 << 36) - 1
    end = behind = min(window.find(mark, place) for mark in (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22"))
    if end == window.size:
        end = _without_tags_behind(window, place, end)
    if not frames and not _ends_with_flac_frame(window, place, end):
        raise truncated(window, "its last frame is incomplete")
    return [Part("flac", start, end, frames=frames or None)], behind


def _without_tags_behind(window, start, end):
    """The end of a FLAC file without the zeros and tags after it."""
    if window.read(end - 128, 3) == b"TAG":
        end -= 128
    tag = window.read(max(start, end - 32), 32)
    if tag[:8] == b"APETAGEX":
        end -= int.from_bytes(tag[12:16], "little") + (32 if tag[23] & 0x80 else 0)
    zeros = 0
    while (count := min(CACHED, end - zeros - start)) > 0:
        data = window.read(end - zeros - count, count)
        zeros += count - len(data.rstrip(b"\0"))
        if data.strip(b"\0"):
            break
    if zeros < 16:
        return max(start, end)
    # The last bytes of a frame may be zeros, too.
    ends = range(end - zeros, end - zeros + 16)
    return next((place for place in ends if _ends_with_flac_frame(window, start, place)), end)


def _ends_with_flac_frame(window, start, end):
    """Whether the bytes before `end` are a complete frame, by its checksum."""
    begin = max(start, end - LAST_FLAC)
    data = window.read(begin, end - begin)
    place, told, tried = len(data), int.from_bytes(data[-2:], "big"), 0
    while tried < 16 and (place := data.rfind(b"\xff", 0, place)) >= 0:
        if data[place + 1 : place + 2] in (b"\xf8", b"\xf9"):
            tried += 1
            if _crc16(data[place:-2]) == told:
                return True
    return False


def _crc16(data):
    crc = 0
    for value in data:
        crc = crc << 8 & 0xFFFF ^ CRC16[crc >> 8 ^ value]
    return crc
