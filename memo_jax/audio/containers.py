"""What a file holds, told by its bytes and never by its name, and whether all of it is there.

`find_parts` names the container, finds where it ends, and goes on behind it: `cat 1.ogg 2.ogg` has two parts. Nothing
else decides what a decoder is given. A playlist, a list of images, subtitles or any other file that makes a decoder
open further files is no container of this list, so no decoder sees it.

The rule for files that end early is one for all containers. A file that holds less than its header promises, or whose
last frame, page or box is incomplete, or that lacks its end mark or index, is refused as truncated. Two things are no
promise: placeholders, which programs that write to a pipe leave in the header (0, all ones, or near 2³¹), and a length
that is up to `SLACK` bytes too long. One loss cannot be noticed: that of whole frames at the end of a container without
any length (raw AAC, AMR, MP3 without a header frame, FLAC and WebM of unknown length).
"""

import functools
import struct
from collections.abc import Callable

from memo_jax.audio import mpeg, ogg
from memo_jax.audio.error import AudioError
from memo_jax.audio.part import Part, truncated, unreadable
from memo_jax.audio.window import CACHED, Window

SLACK = 256  # bytes by which a header may promise too much: common writers count their own header as data
STRAY = 4096  # bytes behind the end of a recording that are ignored when nothing is known that begins like them


def find_parts(window: Window) -> list[Part]:
    """The recordings in a file, at least one.

    Raises:
      AudioError: the file is none of the containers known, truncated, or damaged where its frames are counted.
    """
    parts, place = [], 0
    while (place := skip_tags(window, place)) < window.size:
        kind = kind_at(window, place)
        if kind is None and not parts:
            place = _first_frame(window, place)
            kind = place is not None and kind_at(window, place)
        if not kind:
            if parts and window.size - place <= STRAY:
                break
            if parts:
                raise AudioError(
                    window.name,
                    f"damaged: {window.size - place:,} bytes follow the end of the {parts[-1].kind} data that its "
                    "header tells, and are neither audio nor a tag",
                )
            raise unreadable(window, _described(window))
        found, place = WALKERS[kind](window, place)
        parts += found
    if not parts:
        raise unreadable(window, _described(window))
    return parts


def skip_tags(window: Window, place: int) -> int:
    """The position behind the zeros and tags (ID3, APE, Lyrics3) that stand at `place`."""
    while place < window.size:
        head = window.read(place, 32)
        if head[:1] == b"\0":
            # A box of an MP4 file begins with zeros, too.
            if kind_at(window, place):
                return place
            place = window.first_nonzero(place)
        elif head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 128:
            size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
            place += 10 + size + 10 * (head[5] >> 4 & 1)
        elif head[:3] == b"TAG" and (window.size - place < 128 or head[3:4] != b"+"):
            place += 128
        elif head[:4] == b"TAG+":
            place += 227
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            size, has_header = int.from_bytes(head[12:16], "little"), head[23] & 0x20
            place += 32 + (size if has_header else 0)
        elif head[:11] == b"LYRICSBEGIN" and (end := window.find(b"LYRICS200", place)) < window.size:
            place = end + 9
        else:
            return place
    return window.size


def kind_at(window: Window, place: int) -> str | None:
    """The container that begins at a position, a key of `WALKERS`; None where none does."""
    head = window.read(place, 64)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64"):
        if head[8:12] == b"WAVE":
            return "wav"
        return "avi" if head[8:12] == b"AVI " else None
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    for kind, marks in MARKS.items():
        if head.startswith(marks):
            return kind
    if head[4:8] in MP4_STARTS and int.from_bytes(head[:4], "big") not in range(2, 8):
        return "mp4"
    for kind in ("aac", "mp3"):
        size, family = mpeg.SIZES[kind](head)
        if size:
            following = window.read(place + size, 64)
            if place + size >= window.size or mpeg.SIZES[kind](following)[1] == family:
                return kind
            if skip_tags(window, place + size) != place + size:
                return kind
    return None


def _first_frame(window, place):
    """The position of the first MP3 or AAC frame within 64 KiB that two more follow: streams begin anywhere."""
    data = window.read(place, 1 << 16)
    start = data.find(b"\xff")
    while start >= 0:
        for kind in ("mp3", "aac"):
            here, count, families = place + start, 0, set()
            while count < 3:
                size, family = mpeg.SIZES[kind](window.read(here, 8))
                families.add(family)
                if not size or len(families) > 1:
                    break
                here, count = here + size, count + 1
            else:
                return place + start
        start = data.find(b"\xff", start + 1)
    return None


# Containers of chunks with a length each -----------------------------------------------------------------------------


def _wav(window, start):
    """RIFF, RIFX, RF64 and BW64; the data may be MPEG frames."""
    order = "big" if window.read(start, 4) == b"RIFX" else "little"
    place, codec, long_size = start + 12, None, None
    while (head := window.read(place, 8))[:4] != b"data":
        size = int.from_bytes(head[4:8], order)
        if len(head) < 8 or not _is_name(head[:4]):
            raise (
                truncated(window, "it ends before its samples")
                if window.size - place < 8
                else unreadable(window, "a wav file without samples")
            )
        if head[:4] == b"fmt ":
            body = window.read(place + 8, 26)
            codec = int.from_bytes(body[:2], order)
            if codec == 0xFFFE:
                codec = int.from_bytes(body[24:26], order)
        elif head[:4] == b"ds64":
            long_size = (place + 16, int.from_bytes(window.read(place + 16, 8), order))
        place += 8 + size + size % 2
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
    """The position behind the chunks that follow the samples."""
    if (place - begin) % 2 and not _is_name(window.read(place, 4)):
        place += 1  # chunks begin at even places
    while len(head := window.read(place, 8)) == 8 and _is_name(head[:4]) and not kind_at(window, place):
        size = int.from_bytes(head[4:8], order)
        place += 8 + size + size % 2
    return min(place, window.size)


def _is_chain_of_chunks(window, place, order):
    while len(head := window.read(place, 8)) == 8 and _is_name(head[:4]):
        size = int.from_bytes(head[4:8], order)
        place += 8 + size + size % 2
    return 0 <= place - window.size <= 1


def _is_name(name):
    return len(name) == 4 and all(32 <= letter < 127 for letter in name)


def _w64(window, start):
    place = start + 40
    while (head := window.read(place, 24))[:4] != b"data":
        size = int.from_bytes(head[16:24], "little")
        if len(head) < 24 or size < 24:
            raise truncated(window, "it ends before its samples")
        place += (size + 7) // 8 * 8
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


def _aiff(window, start):
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


def _au(window, start):
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


def _caf(window, start):
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


def _sph(window, start):
    """NIST SPHERE: a header of text, whose second line tells how long it is."""
    try:
        size = int(window.read(start, 16).split(b"\n")[1])
        lines = window.read(start, min(size, 1 << 16)).split(b"end_head")[0].decode("latin-1").split("\n")
    except (ValueError, IndexError):
        raise unreadable(window, "a damaged NIST SPHERE header") from None
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


def _avi(window, start):
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
    """How much of the data promised there is."""
    if promised - available > SLACK:
        raise truncated(window, f"{max(0, available):,} of the {promised:,} bytes that its header promises")
    return min(promised, available)


def _mp4(window, start):
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


def _matroska(window, start):
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
    """(bytes, value) of a number of variable length; a value of None is "unknown", 0 bytes a damaged one."""
    first = window.read(place, 1)
    if not first or not first[0]:
        return 0, 0
    length = 9 - first[0].bit_length()
    data = window.read(place, length)
    value = int.from_bytes(data, "big") & ((1 << 7 * length) - 1)
    return (length, None if value == (1 << 7 * length) - 1 else value) if len(data) == length else (0, 0)


def _asf(window, start):
    place, is_live = start, False
    while len(head := window.read(place, 30)) >= 24:
        size = int.from_bytes(head[16:24], "little")
        if head[:16] == ASF_HEADER:
            if place > start:
                break
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


def _flac(window, start):
    """Its header may leave the number of samples at 0, "unknown", as encoders that write to a pipe do."""
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
    """Where the zeros and tags begin that stand at the end of a FLAC file."""
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
    """Whether the last bytes before `end` are a frame whose checksum is right."""
    begin = max(start, end - LAST_FLAC)
    data = window.read(begin, end - begin)
    place, told = len(data), int.from_bytes(data[-2:], "big")
    while (place := data.rfind(b"\xff", 0, place)) >= 0:
        if data[place + 1 : place + 2] in (b"\xf8", b"\xf9") and _crc16(data[place:-2]) == told:
            return True
    return False


def _crc16(data):
    crc = 0
    for value in data:
        crc = crc << 8 & 0xFFFF ^ CRC16[crc >> 8 ^ value]
    return crc


# Containers of frames ------------------------------------------------------------------------------------------------


def _amr(window, start):
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


def _described(window):
    """What a file that is no recording holds, in a word or two."""
    head = window.read(0, 1024)
    stripped = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for what, marks in FOREIGN.items():
        if stripped.startswith(marks):
            return what
    if not head.strip(b"\0"):
        return "zeros"
    if head[:1] == b"G" and head[188:189] == b"G" and len(head) > 376 and head[376:377] == b"G":
        return "an MPEG transport stream: convert it to wav or flac"
    if all(letter >= 32 or letter in b"\t\r\n\f\x1b" for letter in head):
        return "text"
    return "nothing that is known"


LAST_FLAC = 1 << 18  # bytes in which the last frame of FLAC is looked for: 65,535 samples of two channels take as much
CRC16 = [
    functools.reduce(lambda crc, _: crc << 1 & 0xFFFF ^ (0x8005 if crc & 0x8000 else 0), range(8), value << 8)
    for value in range(256)
]
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
AMR_NARROW = (13, 14, 16, 18, 20, 21, 27, 32, 6, 0, 0, 0, 0, 0, 0, 1)
AMR_WIDE = (18, 24, 33, 37, 41, 47, 51, 59, 61, 6, 0, 0, 0, 0, 1, 1)
MARKS = {
    "w64": (b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00",),
    "au": (b".snd", b"dns."),
    "caf": (b"caff\0\1",),
    "sph": (b"NIST_1A\n",),
    "flac": (b"fLaC",),
    "ogg": (b"OggS",),
    "webm": (b"\x1a\x45\xdf\xa3",),
    "wma": (ASF_HEADER,),
    "amr": (b"#!AMR",),
}
MP4_STARTS = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp", b"moof", b"sidx"}
FOREIGN = {
    "an HLS playlist, which names other files": (b"#EXTM3U",),
    "a list of files for ffmpeg": (b"ffconcat",),
    "a DASH manifest or other XML, which can name other files": (b"<?xml", b"<MPD"),
    "a playlist, which names other files": (b"[playlist]", b"[Reference]", b"<asx", b"<ASX", b"ASF http"),
    "a web page": (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML"),
    "a description of a session (SDP), which names other hosts": (b"v=0\n", b"v=0\r"),
    "subtitles": (b"WEBVTT", b"[Script Info]"),
    "a picture": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM"),
    "a PDF": (b"%PDF",),
    "an archive": (b"PK\3\4", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ"),
    "MIDI notes": (b"MThd",),
    "Shorten: convert it to wav or flac": (b"ajkg",),
    "WavPack: convert it to wav or flac": (b"wvpk",),
    "Monkey's Audio: convert it to wav or flac": (b"MAC ",),
    "a Flash film: convert it to wav or flac": (b"FLV\1",),
    "an MPEG program stream: convert it to wav or flac": (b"\0\0\1\xba", b"\0\0\1\xb3"),
    "a pointer to a file of Git LFS, not the file": (b"version https://git-lfs",),
}

WALKERS: dict[str, Callable[[Window, int], tuple[list[Part], int]]] = {
    "wav": _wav,
    "w64": _w64,
    "aiff": _aiff,
    "au": _au,
    "caf": _caf,
    "sph": _sph,
    "avi": _avi,
    "mp4": _mp4,
    "webm": _matroska,
    "wma": _asf,
    "flac": _flac,
    "amr": _amr,
    "ogg": ogg.walk_ogg,
    "mp3": mpeg.walk_mp3,
    "aac": mpeg.walk_aac,
}
