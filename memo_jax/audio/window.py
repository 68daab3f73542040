"""Random access to the bytes of an open file, and a view of part of it as a file of its own."""

import os
from typing import BinaryIO

CACHED = 1 << 16  # bytes read at a time


class Window:
    """Bytes [0, size) of an open, seekable, binary file, by position."""

    def __init__(self, name: str, file: BinaryIO):
        self.name, self.file = name, file
        self.size = file.seek(0, os.SEEK_END)
        self._start, self._cached = 0, b""

    def read(self, start: int, count: int) -> bytes:
        """Bytes [start, start + count), fewer at the end of the file, none outside it."""
        if not 0 <= start < self.size:
            return b""
        begin = start - self._start
        if begin < 0 or begin + count > len(self._cached):
            self.file.seek(start)
            self._start, self._cached, begin = start, self.file.read(max(count, CACHED)), 0
        return self._cached[begin : begin + count]

    def find(self, pattern: bytes, start: int) -> int:
        """Returns the first position of `pattern` at or after `start`; the size if there is none."""
        step, overlap = 1 << 20, len(pattern) - 1
        while start < self.size:
            self.file.seek(start)
            place = self.file.read(step + overlap).find(pattern)
            if place >= 0:
                return start + place
            start += step
        return self.size

    def first_nonzero(self, start: int) -> int:
        """Returns the first position at or after `start` of a byte that is not zero; the size if there is none."""
        while start < self.size:
            data = self.read(start, CACHED)
            if rest := data.lstrip(b"\0"):
                return start + len(data) - len(rest)
            start += len(data) or self.size
        return self.size


class View:
    """A read-only file: `prefix`, then bytes [start, end) of another file, some of them replaced.

    A damaged header can make libsndfile seek to positions that do not exist. Such a seek changes nothing.
    """

    def __init__(
        self, file: BinaryIO, start: int, end: int, prefix: bytes = b"", patches: tuple[tuple[int, bytes], ...] = ()
    ):
        self._file, self._start, self._prefix = file, start, prefix
        self._patches = [(place - start, data) for place, data in patches]  # given by position in the file
        self._size, self._place = end - start + len(prefix), 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves as in any file, except that positions that do not exist are ignored."""
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if 0 <= place < 1 << 62:
            self._place = place
        return self._place

    def tell(self) -> int:
        """Returns the position."""
        return self._place

    def read(self, count: int = -1) -> bytes:
        """Returns at most `count` bytes; all up to the end if negative."""
        left = max(0, self._size - self._place)
        count = left if count < 0 else min(count, left)
        data = self._prefix[self._place : self._place + count]
        begin = self._place + len(data) - len(self._prefix)  # in the other file, from `start`
        if len(data) < count:
            self._file.seek(self._start + begin)
            data += self._patched(begin, self._file.read(count - len(data)))
        self._place += len(data)
        return data

    def _patched(self, begin, data):
        for place, new in self._patches:
            if place < begin + len(data) and place + len(new) > begin:
                changed = bytearray(data)
                for index, value in enumerate(new, place - begin):
                    if 0 <= index < len(changed):
                        changed[index] = value
                data = bytes(changed)
        return data


def file_number(file: BinaryIO) -> int | None:
    """Returns the file descriptor of an open file; None for a file in memory or inside an archive."""
    try:
        return file.fileno()
    except (AttributeError, OSError):
        return None
