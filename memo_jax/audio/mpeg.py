"""MP3 (MPEG audio, layers I to III) and raw AAC (ADTS): sequences of frames without a container.

If an MP3 states its length at all, it does so in a first frame of silence (Xing, Info or VBRI). Without one, libsndfile
estimates the length from the first bitrate and stops there, which loses most of a recording of variable bitrate. So all
frames are counted here. A Part that lacks such a frame, or whose frame has another count, gets a correct one.
"""

import functools
import re

from memo_jax.audio.error import AudioError
from memo_jax.audio.part import Part, truncated
from memo_jax.audio.window import Window

MPEG_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # Hz, by version
BITRATES = {  # kbit/s, by (is version 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
NO_FRAME = (0, None)
HAS_LENGTH = 1  # flag of a Xing frame: it states the number of frames
MISCOUNTED = 1  # frames: some encoders count the Xing frame itself
READ = 1 << 20  # bytes
HEAD_BYTES = 64  # bytes of a frame that are inspected


def mp3_frame(head: bytes) -> tuple[int, tuple | None]:
    """Returns (bytes, family) of the frame that begins with these bytes, or (0, None).

    The family is what all frames of a stream share: (version, layer, rate in Hz).
    """
    return _mp3_frame(head[1], head[2]) if len(head) > 3 and head[0] == 255 else NO_FRAME


@functools.cache
def _mp3_frame(first, second):
    version, layer = first >> 3 & 3, 4 - (first >> 1 & 3)
    bitrate, rate = second >> 4, second >> 2 & 3
    if first < 0xE0 or version == 1 or layer == 4 or not 0 < bitrate < 15 or rate == 3:
        return NO_FRAME
    rate, padding = MPEG_RATES[version][rate], second >> 1 & 1
    bits = 1000 * BITRATES[version == 3, layer][bitrate - 1]
    size = (12 * bits // rate + padding) * 4 if layer == 1 else _samples(version, layer) // 8 * bits // rate + padding
    return size, (version, layer, rate)


def _samples(version, layer):
    """Samples per channel in a frame."""
    return 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152


def aac_frame(head: bytes) -> tuple[int, tuple | None]:
    """Returns what `mp3_frame` does, for ADTS; the family is (profile, index of the rate)."""
    if len(head) < 7 or head[0] != 255 or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 > 12:
        return NO_FRAME
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return (size, (head[2] >> 6, head[2] >> 2 & 15)) if size > 7 else NO_FRAME


def walk_aac(window: Window, start: int) -> tuple[list[Part], int]:
    """Returns the frames from `start` on as a Part, and the position after them; raises AudioError."""
    place, family = start, aac_frame(window.read(start, 8))[1]
    while place < window.size:
        size, other = aac_frame(window.read(place, 8))
        if other != family:
            _check_end(window, place, window.size, aac_frame, family)
            break
        if place + size > window.size:
            raise truncated(window, "its last frame is incomplete")
        place += size
    return [Part("aac", start, place, libsndfile=False)], place


def walk_mp3(window: Window, start: int, end: int | None = None) -> tuple[list[Part], int]:
    """Returns the frames from `start` on as Parts, perhaps none, and the position after them; raises AudioError."""
    parts, place, end = [], start, window.size if end is None else end
    while place < end and mp3_frame(window.read(place, 4))[0]:
        part, place = _mp3_part(window, place, end)
        parts.append(part)
    return parts, place


def _mp3_part(window, start, end):
    """The frames of one family up to the next that states a length, as a Part, and the position after them."""
    place, count, told, family = start, 0, None, mp3_frame(window.read(start, 4))[1]
    is_layer_3, at_end = family[1] == 3, False
    while place < end and not at_end:
        window.file.seek(place)
        data = window.file.read(min(READ, end - place))
        here = size = 0
        while here + HEAD_BYTES <= len(data) or place + len(data) >= end:
            head = data[here : here + HEAD_BYTES]
            size, other = mp3_frame(head)
            length = _told_length(head) if is_layer_3 and other == family else None
            if other != family or (length and place + here > start):
                at_end = True
                break
            if here + size > len(data):
                break
            if length:
                told, count = length, -1
            here, count = here + size, count + 1
        place += here
        if not at_end and place + size > end:
            raise truncated(window, f"its last frame, of {size} bytes, is incomplete")
    if place < end and mp3_frame(window.read(place, 4))[1] is None:
        _check_end(window, place, end, mp3_frame, family)
    version, layer, _ = family
    frames = count * _samples(version, layer)
    if told is None or not is_layer_3:
        prefix = _length_frame(window.read(start, 4), count, place - start) if is_layer_3 else b""
        return Part("mp3", start, place, frames, prefix), place
    field, value = told
    if count < value - MISCOUNTED:
        raise truncated(window, f"{count:,} of the {value:,} frames that its header promises")
    if field is None:
        behind = start + mp3_frame(window.read(start, 4))[0]
        prefix = _length_frame(window.read(behind, 4), count, place - behind) if behind < place else b""
        return Part("mp3", behind, place, frames, prefix), place
    if count <= value + MISCOUNTED:
        return Part("mp3", start, place), place  # libsndfile also removes the encoder's padding
    return Part("mp3", start, place, patches=((start + field, count.to_bytes(4, "big")),)), place


def _told_length(head):
    """(offset of the count or None, count) of a frame that states how many follow; None for any other frame."""
    place = 4 + _side_bytes(head)
    if len(head) < HEAD_BYTES:
        return None
    if head[place : place + 4] in (b"Xing", b"Info"):
        if not head[place + 7] & HAS_LENGTH:
            return None, 0
        return place + 8, int.from_bytes(head[place + 8 : place + 12], "big")
    if head[36:40] == b"VBRI":
        return None, int.from_bytes(head[50:54], "big")
    return None


def _side_bytes(head):
    """The size of the side information of a layer III frame."""
    is_mono = head[3] >> 6 == 3
    return (17 if is_mono else 32) if head[1] >> 3 & 3 == 3 else (9 if is_mono else 17)


def _length_frame(head, count, size):
    """A frame of silence that states the count and bytes of the frames after it, which begin with `head`."""
    place = 4 + _side_bytes(head)
    for bitrate in range(1, 15):
        header = bytes((255, head[1] | 1, bitrate << 4 | head[2] & 0x0C, head[3]))  # no checksum, no padding
        length = mp3_frame(header)[0]
        if length >= place + 16:
            break
    fields = b"Info" + (3).to_bytes(4, "big") + count.to_bytes(4, "big") + (size + length).to_bytes(4, "big")
    return (header + bytes(place - 4) + fields).ljust(length, b"\0")


def _check_end(window, place, end, frame_of, family):
    """Raises AudioError if, within 1 MiB, more frames of the family follow bytes that are not frames."""
    data = window.read(place, min(READ, end - place))
    if re.match(rb"ID3|TAG|APETAGEX|LYRICSBEGIN|RIFF|\0", data):
        return  # tags, or another part
    for match in re.finditer(rb"\xff", data):
        here = match.start()
        for _ in range(3):
            size, other = frame_of(data[here : here + 8])
            if other != family:
                break
            here += size
        else:
            raise AudioError(
                window.name, f"damaged: {match.start():,} bytes at {place:,} are not a frame, and more frames follow"
            )


SIZES = {"mp3": mp3_frame, "aac": aac_frame}
