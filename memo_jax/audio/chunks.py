"""Containers made of chunks that state their length: where each ends, and whether all of it is there.

Each function takes a window and the position where a container begins, and returns its Parts and the position after it.
It raises AudioError for a container that is truncated or damaged.
"""

import struct

from memo_jax.audio import mpeg
from memo_jax.audio.error import AudioError
from memo_jax.audio.kinds import ASF_HEADER, kind_at
from memo_jax.audio.part import Part, truncated, unreadable
from memo_jax.audio.window import Window

SLACK = 256  # bytes that a header may promise in excess: some writers count the header itself as data
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")


def walk_wav(window: Window, start: int) -> tuple[list[Part], int]:
    """Walks RIFF, RIFX, RF64 and BW64, whose data may be MPEG frames; raises AudioError."""
    order = "big" if window.read(start, 4) == b"RIFX" else "little"
    place, codec, long_size = start + 12, None, None
    while (head := window.read(place, 8))[:4] != b"data":
        size = int.from_bytes(head[4:8], order)
        if len(head) < 8:
            raise truncated(window, "it ends before its samples")
        if not _is_name(head[:4]):
            raise unreadable(window, "a damaged wav header")
        if head[:4] == b"fmt ":
            body = window.read(place + 8, 26)
            codec = int.from_bytes(body[:2], order)
            if codec == 0xFFFE:
                codec = int.from_bytes(body[24:26], order)
        elif head[:4] == b"ds64":
            long_size = (place + 16, int.from_bytes(window.read(place + 16, 8), order))
        place += 8 + size + size % 2
    if len(head) < 8:
        raise truncated(window, "it ends before its samples")
    begin, promised, patches = place + 8, int.from_bytes(head[4:8], order), ()
    available = window.size - begin
    if promised == 0xFFFFFFFF and long_size:
        promised, width, field = long_size[1], 8, long_size[0]
    else:
        width, field = 4, place + 4
    is_placeholder = promised > available and promised >= 2**31 - 2**16 and (width == 4 or promised >= 2**62)
    if promised == 0 and available and not _is_chain_of_chunks(window, begin, order):
        is_placeholder = True
    if is_placeholder or 0 < promised - available <= SLACK:
        promised = available
        if available < 1 << 8 * width - 1:
            riff = start + (20 if width == 8 else 4)
            patches = (
                (field, available.to_bytes(width, order)),
                (riff, (window.size - start - 8).to_bytes(width, order)),
            )
    end = begin + _checked(window, promised, available)
    if codec in (0x50, 0x55) and end > begin:
        inside, _ = mpeg.walk_mp3(window, begin, end)
        if inside:
            return inside, _after_chunks(window, end, begin, order)
    behind = _after_chunks(window, end, begin, order)
    return [Part("wav", start, max(behind, end), patches=patches)], max(behind, end)


def _after_chunks(window, place, begin, order):
    """The position after the chunks that follow the samples."""
    if (place - begin) % 2 and not _is_name(window.read(place, 4)):
        place += 1  # chunks begin at even places
    while len(head := window.read(place, 8)) == 8 and _is_name(head[:4]) and not kind_at(window, place):
        size = int.from_bytes(head[4:8], order)
        if head[:4] == b"data" and size:
            raise AudioError(window.name, f"damaged: a second chunk of samples at byte {place:,}")
        place += 8 + size + size % 2
    return min(place, window.size)


def _is_chain_of_chunks(window, place, order):
    while len(head := window.read(place, 8)) == 8 and _is_name(head[:4]):
        size = int.from_bytes(head[4:8], order)
        place += 8 + size + size % 2
    return 0 <= place - window.size <= 1


def _is_name(name):
    return len(name) == 4 and all(32 <= letter < 127 for letter in name)


def walk_w64(window: Window, start: int) -> tuple[list[Part], int]:
    """Walks Sony Wave64; raises AudioError."""
    place = start + 40
    while (head := window.read(place, 24))[:4] != b"data":
        size = int.from_bytes(head[16:24], "little")
        if len(head) < 24 or size < 24:
            raise truncated(window, "it ends before its samples")
        place += (size + 7) // 8 * 8
    if len(head) < 24:
        raise truncated(window, "it ends before its samples")
    begin, promised, patches = place + 24, int.from_bytes(head[16:24], "little") - 24, ()
    available = window.size - begin
    if promised <= 0 < available or promised >= 2**62:
        promised = available
        patches = (
            (start + 16, (window.size - start).to_bytes(8, "little")),
            (place + 16, (available + 24).to_bytes(8, "little")),
        )
    end = place = begin + _checked(window, promised, available)
    place = start + (place - start + 7) // 8 * 8
    while len(head := window.read(place, 24)) == 24 and kind_at(window, place) is None:
        size = int.from_bytes(head[16:24], "little")
        if size < 24 or not head[:4].isalpha():
            break
        place += (size + 7) // 8 * 8
    end = min(window.size, place if place > end + 7 else end)
    return [Part("w64", start, end, patches=patches)], end


def walk_aiff(window: Window, start: int) -> tuple[list[Part], int]:
    """Walks AIFF and AIFF-C; raises AudioError."""
    place, frame_bytes, frames_at, behind = start + 12, 0, 0, None
    found = None
    while (
        len(head := window.read(place, 8)) == 8
        and _is_name(head[:4])
        and (place == start or not kind_at(window, place))
    ):
        size = int.from_bytes(head[4:], "big")
        if head[:4] == b"COMM":
            channels, _, bits = struct.unpack(">HIH", window.read(place + 8, 8).ljust(8, b"\0"))
            frame_bytes, frames_at = channels * ((bits + 7) // 8), place + 10
        if head[:4] == b"SSND":
            found, available = place, window.size - place - 8
            if (size == 0 and available > 8) or (size > available and size >= 0x7F000000):
                size = available
            behind = place + 8 + _checked(window, size, available)
        place += 8 + size + size % 2
    if found is None:
        raise truncated(window, "it ends before its samples")
    end = max(behind, min(place, window.size))
    promised = int.from_bytes(window.read(found + 4, 4), "big")
    patches = ()
    if promised != behind - found - 8 and frame_bytes and not 0 < promised - (behind - found - 8) <= SLACK:
        patches = (
            (start + 4, (end - start - 8).to_bytes(4, "big")),
            (found + 4, (behind - found - 8).to_bytes(4, "big")),
            (frames_at, ((behind - found - 16) // frame_bytes).to_bytes(4, "big")),
        )
    return [Part("aiff", start, end, patches=patches)], end


def walk_au(window: Window, start: int) -> tuple[list[Part], int]:
    """Walks AU, of either byte order; raises AudioError."""
    order = "big" if window.read(start, 4) == b".snd" else "little"
    header = window.read(start, 24)
    if len(header) < 24:
        raise truncated(window, "it ends within its header")
    offset, promised = (int.from_bytes(header[place : place + 4], order) for place in (4, 8))
    available, patches = max(0, window.size - start - offset), ()
    if promised in (0, 0xFFFFFFFF) or (promised > available and promised >= 2**31 - 2**16):
        promised = available
        patches = ((start + 8, min(available, 2**31 - 1).to_bytes(4, order)),)
    end = start + offset + _checked(window, promised, available)
    return [Part("au", start, min(end, window.size), patches=patches)], min(end, window.size)


def walk_caf(window: Window, start: int) -> tuple[list[Part], int]:
    """Walks CAF; raises AudioError."""
    place, end, patches = start + 8, None, ()
    while len(head := window.read(place, 12)) == 12 and _is_name(head[:4]) and not kind_at(window, place):
        size, available = int.from_bytes(head[4:], "big", signed=True), window.size - place - 12
        if head[:4] == b"data":
            if size < 0 or 0 < size - available <= SLACK:
                size, patches = available, ((place + 4, available.to_bytes(8, "big")),)
            end = place + 12 + _checked(window, size, available)
        elif size < 0:
            break
        place += 12 + size
    if end is None:
        raise truncated(window, "it ends before its samples")
    end = max(end, min(place, window.size))
    return [Part("caf", start, end, patches=patches)], end


def walk_sph(window: Window, start: int) -> tuple[list[Part], int]:
    """Walks NIST SPHERE, which has a text header whose second line is its length; raises AudioError."""
    try:
        size = int(window.read(start, 16).split(b"\n")[1])
        lines = window.read(start, min(size, 1 << 16)).split(b"end_head")[0].decode("latin-1").split("\n")
    except (ValueError, IndexError):
        size, lines = 0, []
    if size < 16:
        raise unreadable(window, "a damaged NIST SPHERE header")
    fields = {
        name: value for name, _, value in (line.split(None, 2) for line in lines if len(line.split(None, 2)) == 3)
    }
    coding = fields.get("sample_coding", "pcm").strip().lower()
    for name, program in (("shorten", "sph2pipe -f wav"), ("wavpack", "w_decode"), ("shortpack", "w_decode")):
        if name in coding:
            raise AudioError(window.name, f"compressed with {name} inside NIST SPHERE: convert it with {program}")
    try:
        promised = int(fields["sample_count"]) * int(fields.get("channel_count", 1)) * int(fields["sample_n_bytes"])
    except (KeyError, ValueError):
        promised = 0
    available = max(0, window.size - start - size)
    end = start + size + _checked(window, promised, available) if promised > 0 else window.size
    return [Part("sph", start, min(end, window.size))], min(end, window.size)


def walk_avi(window: Window, start: int) -> tuple[list[Part], int]:
    """Walks AVI, including several RIFF chunks; raises AudioError."""
    place = start
    while len(head := window.read(place, 12)) == 12 and head[:4] == b"RIFF":
        if place > start and head[8:12] != b"AVIX":
            break
        size, available = int.from_bytes(head[4:8], "little"), window.size - place - 8
        if size == 0 or (size > available and size >= 2**31 - 2**16):
            size = available
        place += 8 + _checked(window, size, available)
        place += place % 2 if place < window.size else 0
    return [Part("avi", start, place, libsndfile=False)], place


def _checked(window, promised, available):
    """Returns the bytes of data that are present, of those promised; raises AudioError where too few are."""
    if promised - available > SLACK:
        raise truncated(window, f"{max(0, available):,} of the {promised:,} bytes that its header promises")
    return min(promised, available)


def walk_mp4(window: Window, start: int) -> tuple[list[Part], int]:
    """Walks MP4, M4A and QuickTime, made of boxes and perhaps fragmented; raises AudioError."""
    place, seen = start, set()
    while len(head := window.read(place, 16)) >= 8:
        size, name = int.from_bytes(head[:4], "big"), head[4:8]
        if (name == b"ftyp" and seen & {b"moov", b"mdat"}) or not all(letter >= 32 for letter in name):
            break
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        elif size == 0:
            size = window.size - place
        if size < 8:
            break
        if place + size > window.size:
            raise truncated(
                window, f"{window.size - place:,} of the {size:,} bytes of its {name.decode('latin-1')} box"
            )
        seen.add(name)
        place += size
    if b"moov" not in seen:
        raise truncated(window, "its index (moov) is missing")
    return [Part("mp4", start, place, libsndfile=False)], place


def walk_matroska(window: Window, start: int) -> tuple[list[Part], int]:
    """Walks Matroska and WebM, made of EBML elements; raises AudioError."""
    place = start
    for expected in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # EBML, Segment
        while True:
            name_size, _ = _ebml_number(window, place)
            name = window.read(place, name_size)
            length, size = _ebml_number(window, place + name_size)
            if not name_size or not length:
                raise truncated(window, "it ends within its header")
            begin = place + name_size + length
            if name == expected:
                break
            if name != b"\xec" or size is None:  # a void element
                raise unreadable(window, "a damaged Matroska header")
            place = begin + size
        if size is None:  # as written to a pipe
            end = begin
            while (end := window.find(b"\x1a\x45\xdf\xa3", end)) < window.size:
                head = window.read(end, 64)
                if b"webm" in head or b"matroska" in head:
                    break
                end += 4
        else:
            end = begin + size
        if end > window.size:
            raise truncated(window, f"{window.size - begin:,} of the {size:,} bytes that its header promises")
        place = end
    return [Part("webm", start, place, libsndfile=False)], place


def _ebml_number(window, place):
    """(bytes, value) of a variable-length number; a value of None means unknown, 0 bytes mean damaged."""
    first = window.read(place, 1)
    if not first or not first[0]:
        return 0, 0
    length = 9 - first[0].bit_length()
    data = window.read(place, length)
    value = int.from_bytes(data, "big") & ((1 << 7 * length) - 1)
    return (length, None if value == (1 << 7 * length) - 1 else value) if len(data) == length else (0, 0)


def walk_asf(window: Window, start: int) -> tuple[list[Part], int]:
    """Walks ASF, of WMA and WMV; raises AudioError."""
    place, is_live = start, False
    while len(head := window.read(place, 30)) >= 24:
        size = int.from_bytes(head[16:24], "little")  # of an object with its 24 bytes of name and size
        if head[:16] == ASF_HEADER:
            if place > start:
                break
            if size < 24:
                raise unreadable(window, "a damaged ASF header")
            header = window.read(place, min(size, 1 << 20))
            properties = header.find(ASF_PROPERTIES)
            if properties >= 0:
                is_live = bool(int.from_bytes(header[properties + 88 : properties + 92], "little") & 1)
        elif place == start or size < 24:
            break
        if place + size > window.size:
            if not is_live:
                raise truncated(window, f"{window.size - place:,} of the {size:,} bytes of an object")
            size = window.size - place
        place += size
        if is_live and head[:16] == ASF_DATA:
            place = window.size
    return [Part("wma", start, max(place, start + 24), libsndfile=False)], max(place, start + 24)
