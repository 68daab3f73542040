"""Which container begins at a position of a file, and which tags stand between containers."""

from memo_jax.audio import mpeg
from memo_jax.audio.window import Window

ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
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


def skip_tags(window: Window, place: int) -> int:
    """Returns the position after any zeros and tags (ID3, APE, Lyrics3) at `place`."""
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
    """Returns the container that begins at a position, a key of `WALKERS`, or None."""
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


def first_frame(window: Window, place: int) -> int | None:
    """Returns the position, within 64 KiB, of the first MP3 or AAC frame followed by two more, or None."""
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


def what_it_holds(window: Window) -> str:
    """Returns what a file holds that is not a recording, in a few words."""
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
    return "nothing known"
