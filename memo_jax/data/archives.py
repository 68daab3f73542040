"""Zip and tar archives, read in place: what lies where in them, and the bytes there."""

import bz2
import contextlib
import gzip
import lzma
import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from typing import NamedTuple

ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
LARGEST_MEMBER = 2 << 30  # bytes; a member is decoded from memory
# After its end mark an archive is filled with zeros to a whole record. More is no filling but another archive, or damage.
MOST_FILLING = 1 << 20
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    struct.error,
    NotImplementedError,
    UnicodeDecodeError,
)


class Extent(NamedTuple):
    """Where a member's bytes lie in its archive: `stored` bytes from `offset` on give `size` bytes.

    In a zip, `offset` is that of the member's local header, and `crc` is there. In a compressed tar nothing has an
    offset: it is -1, and `number` says which file of the archive it is.
    """

    offset: int
    stored: int
    size: int
    deflated: bool = False
    crc: int = -1
    number: int = -1


class Member(NamedTuple):
    """A file in an archive: its path there; its extent, or the `problem` that it has; `content` where asked for."""

    name: str
    extent: Extent | None
    problem: str = ""
    content: bytes = b""


def is_archive_name(path) -> bool:
    """Whether a file of this name is a zip or a tar, compressed or not."""
    return os.fspath(path).lower().endswith(ZIP_SUFFIXES + TAR_SUFFIXES)


def is_compressed_tar(path) -> bool:
    """Whether it is an archive that can be read from its beginning only."""
    return not os.fspath(path).lower().endswith(ZIP_SUFFIXES) and _compression(path) is not None


def members(path, contents: str = "\0"):
    """Yields every file of an archive, in its order; with its content where its name ends in `contents`.

    Raises:
      ValueError: it is no archive, or is damaged or cut short somewhere (a download that was interrupted, mostly).
      OSError: it cannot be read.
    """
    path = os.fspath(path)
    with _damage_named(path):
        yield from (_zip_members(path) if path.lower().endswith(ZIP_SUFFIXES) else _tar_members(path, contents))


def stored_bytes(path, extent: Extent) -> bytes:
    """The content of a member; ValueError with the reason when it cannot be had."""
    if max(extent.size, extent.stored) > LARGEST_MEMBER:
        raise ValueError(f"too large to be read from an archive: {extent.size / 1e9:.1f} GB, unpack it")
    with open(path, "rb") as file:
        file.seek(extent.offset)
        if extent.crc >= 0:  # a zip: 26 bytes into the local header stand the lengths of the two fields that end it
            header = file.read(30)
            if len(header) < 30 or not header.startswith(b"PK\3\4"):
                raise ValueError("damaged in its archive: no header")
            file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
        data = file.read(extent.stored)
    if len(data) < extent.stored:
        raise ValueError(f"truncated in its archive: {len(data)} of {extent.stored} bytes")
    if extent.deflated:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, extent.size + 1)
        except zlib.error as error:
            raise ValueError(f"damaged in its archive: {error}") from None
    if extent.crc >= 0 and (len(data) != extent.size or zlib.crc32(data) != extent.crc):
        raise ValueError("damaged in its archive: wrong checksum")
    return data


class TarStream:
    """A compressed tar, read once from its beginning to its end."""

    def __init__(self, path):
        self.path, self._number = os.fspath(path), -1
        self._files = contextlib.ExitStack()
        with _damage_named(self.path):
            self._tar = self._files.enter_context(_opened_tar(self.path, self._files))

    def copy(self, number: int, file) -> int:
        """Copies the content of the file with this number, greater than any before, to `file`; returns its bytes."""
        with _damage_named(self.path):
            while self._number < number:
                info = _next(self._tar)
                if info is None:
                    raise EOFError
                self._number += not info.isdir()
            source, copied = self._tar.extractfile(info), 0
            while data := source.read(1 << 20):
                file.write(data)
                copied += len(data)
            return copied

    def close(self):
        self._files.close()


def _zip_members(path):
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            problem = ""
            if info.flag_bits & 1:
                problem = "encrypted in its archive"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                problem = "compressed in an unusual way: unpack the archive"
            yield Member(
                _clean(info.filename),
                None
                if problem
                else Extent(
                    info.header_offset,
                    info.compress_size,
                    info.file_size,
                    info.compress_type == zipfile.ZIP_DEFLATED,
                    info.CRC,
                ),
                problem,
            )


def _tar_members(path, contents):
    streamed, number = is_compressed_tar(path), -1
    with contextlib.ExitStack() as files:
        tar = _opened_tar(path, files)
        while (info := _next(tar)) is not None:
            if info.isdir():
                continue
            number += 1
            problem = (
                "a link in its archive"
                if info.issym() or info.islnk()
                else "not a file"
                if not info.isreg()
                else "a sparse file in its archive: unpack it"
                if info.issparse()
                else ""
            )
            content = tar.extractfile(info).read(1 << 12) if not problem and info.name.endswith(contents) else b""
            extent = Extent(-1 if streamed else info.offset_data, info.size, info.size, number=number)
            yield Member(_clean(info.name), None if problem else extent, problem, content)
        if not streamed and os.path.getsize(path) - tar.offset > MOST_FILLING:
            raise tarfile.ReadError(f"its end mark is at byte {tar.offset:,} of {os.path.getsize(path):,}")


def _opened_tar(path, files):
    opened = _compression(path)
    if opened is None:
        return files.enter_context(tarfile.open(path, "r:"))
    return files.enter_context(tarfile.open(fileobj=files.enter_context(opened(path)), mode="r|"))


def _next(tar):
    info = tar.next()
    tar.members.clear()  # a million of them would fill the memory
    return info


def _compression(path):
    with open(path, "rb") as file:
        start = file.read(8)
    return next((opened for magic, opened in COMPRESSIONS.items() if start.startswith(magic)), None)


def _clean(name):
    """A member's name without "./" before it."""
    return posixpath.normpath(name).lstrip("/")


@contextlib.contextmanager
def _damage_named(path):
    try:
        yield
    except DAMAGE as error:
        reason = str(error).strip().rstrip(".") or "it ends early"
        raise ValueError(
            f"{path}: not an archive, damaged or cut short ({reason}): get the file again, or unpack what "
            "is left of it and prepare that folder"
        ) from None
