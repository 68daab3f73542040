"""Zip and tar archives, read in place: which files they hold, where their bytes are, and those bytes.

An archive is read to its end or refused. Headers of tars must match their checksums, an end mark must be there, and
only zeros may follow it; a zip must begin with its first file. Otherwise damage, a download that was cut short, or
several archives joined into one file would silently lose recordings.

What a header claims costs nothing by itself: sizes are compared with what is there before anything is allocated or
copied, and headers, decompressed members and temporary copies are all bounded.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import posixpath
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from memo_jax.audio.error import NOT_OF_THE_FILE
from memo_jax.files import one_line

ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}  # by the first bytes
LARGEST_MEMBER = 2 << 30  # bytes of a recording
LARGEST_SKIPPED = 1 << 40  # bytes of any other file in a tar; skipping it in a compressed one takes time
IN_MEMORY = 64 << 20  # bytes; a larger member is decoded from a temporary file
LARGEST_HEADER = 1 << 20  # bytes of all headers of a file in a tar, long names and the like included
MOST_FILLING = 1 << 20  # bytes of zeros after the end mark of a tar, which is padded to a full record
UNIX = 3  # in a zip, the system whose attributes a file has
ZIP_END = (1 << 16) + 256  # most bytes that the records at the end of a zip and its comment take
XZ_MEMORY = 1 << 29  # bytes; xz -9 needs an eighth of it
CHUNK_BYTES = 1 << 20  # bytes that are read or decompressed at a time
SPEAKER_BYTES = 1 << 12  # bytes read, at most, of a member whose content is wanted


class Extent(NamedTuple):
    """Where a member's bytes are in its archive: `stored` bytes from `offset` on yield `size` bytes.

    In a zip, `offset` is that of the member's local header, and `crc` (of the content) and `name_crc` (of the name in
    UTF-8) are set. In a tar, `number` says which file of the archive it is; in a compressed one the offset means
    nothing.
    """

    offset: int
    stored: int
    size: int
    deflated: bool = False
    crc: int | None = None
    name_crc: int | None = None
    number: int | None = None


class Member(NamedTuple):
    """A file in an archive: its path there, its extent or the `problem` with it, and its content if asked for."""

    name: str
    extent: Extent | None
    problem: str = ""
    content: bytes | None = None


def is_archive_name(path: str | os.PathLike) -> bool:
    """Returns whether a file of this name is a zip or a tar, compressed or not."""
    return os.fspath(path).lower().endswith(ZIP_SUFFIXES + TAR_SUFFIXES)


def is_compressed_tar(path: str | os.PathLike) -> bool:
    """Returns whether the file is an archive that can only be read from its beginning."""
    return not os.fspath(path).lower().endswith(ZIP_SUFFIXES) and _compression(path) is not None


def members(path: str | os.PathLike, contents: str | None = None) -> Iterator[Member]:
    """Yields every file of an archive, in its order.

    Args:
      path: a zip or tar.
      contents: suffix of the names of those (small) files in a tar whose content is wanted.

    Raises:
      ValueError: not an archive, or damaged, cut short or joined with another.
      OSError: it cannot be read.
    """
    path = os.fspath(path)
    with _damage_named(path):
        yield from (_zip_members(path) if path.lower().endswith(ZIP_SUFFIXES) else _tar_members(path, contents))


def open_member(path: str | os.PathLike, extent: Extent) -> BinaryIO:
    """Opens the content of a member as a seekable file: in memory, or a temporary file if it is large.

    Raises:
      ValueError: the reason why its content is unavailable: too large, damaged, the archive cannot be read.
      OSError: a temporary file cannot be written.
    """
    if max(extent.size, extent.stored) > LARGEST_MEMBER:
        raise ValueError(_too_large(extent.size))
    content = io.BytesIO() if extent.size <= IN_MEMORY else tempfile.TemporaryFile(prefix="memo-jax-")
    try:
        crc, size = 0, 0
        for data in _unpacked(path, extent):
            size += len(data)
            if size > extent.size:
                break
            crc = zlib.crc32(data, crc)
            content.write(data)
        if size != extent.size or extent.crc not in (None, crc):
            raise ValueError("damaged in its archive: wrong checksum")
    except BaseException:
        content.close()
        raise
    content.seek(0)
    return content


class TarStream:
    """A compressed tar, read once from its beginning to its end."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with _reading(self.path):
            self._tar = _Tar(self.path)

    def copy(self, extent: Extent, file: BinaryIO) -> None:
        """Copies the content of a member, which must come after all those copied before, to `file`.

        Raises:
          ValueError: the archive is damaged, or not the one that the extent belongs to.
        """
        with _reading(self.path):
            while self._tar.number < extent.number:
                info = self._tar.next()
                if info is None:
                    raise EOFError("it has fewer files than before")
            if info.size != extent.size:
                raise ValueError("it has changed")
        chunks = _chunks(self._tar.file, extent.size)
        while True:
            with _reading(self.path):
                data = next(chunks, None)
            if data is None:
                return
            file.write(data)  # an error here is of the output, not of the archive

    def close(self) -> None:
        """Closes the archive."""
        self._tar.close()


class _Tar:
    """The files of a tar one after another; with each, `file` is at the beginning of its content."""

    def __init__(self, path):
        self.file = _open_tar(path)
        self.number = -1  # of the file that `next` returned last
        try:
            self._headers = _Headers(self.file)
            self._tar = tarfile.TarFile(fileobj=self._headers, tarinfo=_CheckedTarInfo)  # reads the first header
        except BaseException:
            self.file.close()
            raise
        self._offset = -1

    def next(self) -> tarfile.TarInfo | None:
        """Returns the next member that is not a folder; None at the end mark, after which only padding may follow."""
        while True:
            self._headers.allowed = LARGEST_HEADER
            info = self._tar.next()
            self._tar.members.clear()  # a million of them would fill the memory
            if info is None:
                self._check_end()
                return None
            if self._tar.offset <= self._offset or info.size < 0:
                raise tarfile.ReadError(f"a negative size in the header at byte {info.offset:,}")
            if info.size > LARGEST_SKIPPED:
                raise tarfile.ReadError(f"a size of {info.size:,} bytes in the header at byte {info.offset:,}")
            self._offset = self._tar.offset
            if not info.isdir():
                self.number += 1
                return info

    def close(self):
        self.file.close()

    def _check_end(self):
        rest = self.file.read(MOST_FILLING + 1)  # to the end, where the checksum of a gzip is
        if len(rest) > MOST_FILLING or rest.strip(b"\0"):
            raise tarfile.ReadError(f"its end mark is at byte {self._tar.offset:,}, but more follows: two archives?")


class _Decompressed:
    """The content of a bzip2 or xz file, read forwards; unlike bz2.open, it does not ignore what is not a stream."""

    def __init__(self, path, make):
        self._file, self._make, self._stream = open(path, "rb"), make, make()
        self._place = 0
        self.close = self._file.close

    def tell(self):
        return self._place

    def seek(self, place):
        while self._place < place and self.read(min(CHUNK_BYTES, place - self._place)):
            pass
        return self._place

    def read(self, size):
        pieces = []
        while size and (data := self._next(size)):
            pieces.append(data)
            size -= len(data)
            self._place += len(data)
        return b"".join(pieces)

    def _next(self, size):
        """At most `size` bytes; none at the end of the last stream."""
        while True:
            given = b""
            if self._stream.eof:
                given = self._stream.unused_data or self._file.read(CHUNK_BYTES)
                if not given.strip(b"\0"):
                    return b""
                self._stream = self._make()
            elif self._stream.needs_input:
                given = self._file.read(CHUNK_BYTES)
                if not given:
                    raise EOFError
            if data := self._stream.decompress(given, size):
                return data


class _Headers:
    """The file that `tarfile` reads headers from, of which it gets no more than `allowed` bytes."""

    def __init__(self, file):
        self._file, self.allowed = file, LARGEST_HEADER
        self.tell, self.seek = file.tell, file.seek

    def read(self, size):
        self.allowed -= size
        if size < 0 or self.allowed < 0:
            raise tarfile.ReadError(f"a header of more than {LARGEST_HEADER:,} bytes at byte {self.tell():,}")
        return self._file.read(size)


class _CheckedTarInfo(tarfile.TarInfo):
    """A header of a tar; unlike TarInfo, a damaged one is an error and not the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # the end mark
            raise
        except tarfile.EmptyHeaderError:
            raise tarfile.ReadError("it ends without an end mark" if tar.offset else "it is empty") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from None


def _tar_members(path, contents):
    with contextlib.closing(_Tar(path)) as tar:
        while (info := tar.next()) is not None:
            extent, problem, content = None, _tar_problem(info), None
            if not problem:
                extent = Extent(info.offset_data, info.size, info.size, number=tar.number)
                if contents is not None and info.name.endswith(contents):
                    content = tar.file.read(min(info.size, SPEAKER_BYTES))
            yield Member(_clean(info.name), extent, problem, content)


def _tar_problem(info):
    if info.issym() or info.islnk():
        return "a link in its archive"
    if not info.isreg():
        return "not a file"
    if info.issparse():
        return "a sparse file in its archive: unpack it"
    return _too_large(info.size) if info.size > LARGEST_MEMBER else ""


def _zip_members(path):
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        _check_zip(archive.fp, infos)
        for info in infos:
            if not info.is_dir():
                problem = _zip_problem(info)
                yield Member(_clean(info.filename), None if problem else _zip_extent(info), problem)


def _check_zip(file, infos):
    """Raises BadZipFile for what zipfile accepts: several archives in a file, lost entries, overlapping files."""
    places = sorted((info.header_offset, info.compress_size) for info in infos)
    file.seek(0)
    if places and places[0][0] > 0 and file.read(4) == b"PK\3\4":
        raise zipfile.BadZipFile(f"its first file is at byte {places[0][0]:,}, but another archive begins at byte 0")
    if any(offset + 30 + size > following for (offset, size), (following, _) in zip(places, places[1:])):
        raise zipfile.BadZipFile("files in it overlap")
    file.seek(max(0, file.seek(0, os.SEEK_END) - ZIP_END))
    end = file.read()
    record = end.rindex(b"PK\5\6")
    count, comment = (int.from_bytes(end[record + at : record + at + 2], "little") for at in (10, 20))
    if end[record + 22 + comment :].strip(b"\0"):
        raise zipfile.BadZipFile("more follows its end: two archives?")
    large = end.rfind(b"PK\6\6", 0, record)  # of Zip64, for which the other count is filled with ones
    if count == 0xFFFF and large >= 0:
        count = int.from_bytes(end[large + 32 : large + 40], "little")
    if count not in (len(infos), len(infos) % 65536):  # some writers count modulo 2^16
        raise zipfile.BadZipFile(f"its directory has {len(infos):,} of {count:,} entries")


def _zip_problem(info):
    if info.create_system == UNIX and stat.S_ISLNK(info.external_attr >> 16):
        return "a link in its archive"
    if info.flag_bits & 1:
        return "encrypted in its archive"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed in an unusual way: unpack the archive"
    if info.header_offset < 0:
        return "damaged in its archive: no header"
    return _too_large(info.file_size) if max(info.file_size, info.compress_size) > LARGEST_MEMBER else ""


def _zip_extent(info):
    return Extent(
        info.header_offset,
        info.compress_size,
        info.file_size,
        info.compress_type == zipfile.ZIP_DEFLATED,
        info.CRC,
        zlib.crc32(info.orig_filename.encode(errors="surrogateescape")),
    )


def _unpacked(path, extent):
    """Yields the content of a member in pieces; ValueError if the archive cannot be read or is damaged there."""
    try:
        with open(path, "rb") as file:
            file.seek(extent.offset)
            if extent.crc is not None:
                _skip_zip_header(file, extent.name_crc)
            chunks = _chunks(file, extent.stored)
            yield from _inflated(chunks) if extent.deflated else chunks
    except EOFError as error:
        raise ValueError(f"truncated in its archive: {error}") from None
    except zlib.error as error:
        raise ValueError(f"damaged in its archive: {error}") from None
    except OSError as error:
        if error.errno in NOT_OF_THE_FILE:
            raise
        raise ValueError(f"cannot be opened: {error.strerror}") from None


def _inflated(chunks):
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    for data in chunks:
        while data:
            yield inflate.decompress(data, CHUNK_BYTES)
            data = inflate.unconsumed_tail
    yield inflate.flush()


def _skip_zip_header(file, name_crc):
    """Skips from the local header of a member in a zip to its data; the header repeats the name in the directory."""
    header = file.read(30)
    if len(header) < 30 or not header.startswith(b"PK\3\4"):
        raise ValueError("damaged in its archive: no header")
    flags, name_bytes, extra_bytes = (int.from_bytes(header[at : at + 2], "little") for at in (6, 26, 28))
    name = file.read(name_bytes).decode("utf-8" if flags & 0x800 else "cp437", errors="replace")
    if zlib.crc32(name.encode()) != name_crc:
        raise ValueError("damaged in its archive: a different name in its header")
    file.seek(extra_bytes, os.SEEK_CUR)


def _chunks(file, size):
    """Yields the next `size` bytes of a file; EOFError if there are fewer."""
    left = size
    while left:
        data = file.read(min(CHUNK_BYTES, left))
        if not data:
            raise EOFError(f"{size - left:,} of {size:,} bytes")
        left -= len(data)
        yield data


def _compression(path):
    with open(path, "rb") as file:
        start = file.read(8)
    return next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)


def _open_tar(path):
    """A tar, open for reading and decompressed; it seeks forwards."""
    compression = _compression(path)
    if compression == "gzip":
        return gzip.open(path)
    if compression == "bzip2":
        return _Decompressed(path, bz2.BZ2Decompressor)
    if compression == "xz":
        return _Decompressed(path, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY))
    return open(path, "rb")


def _clean(name):
    """A member's name as a path below the archive, whatever "/", "./" and "../" are in it."""
    return posixpath.normpath("/" + name).lstrip("/")


def _too_large(size):
    return f"too large to be read from an archive: {size / 1e9:.1f} GB, unpack it"


@contextlib.contextmanager
def _reading(path):
    """As `_damage_named`; names the archive also where its disk fails."""
    try:
        with _damage_named(path):
            yield
    except OSError as error:
        if error.errno in NOT_OF_THE_FILE:
            raise
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}): make it available and repeat the command"
        ) from None


@contextlib.contextmanager
def _damage_named(path):
    """Names the archive in whatever the libraries raise about its content, which is of many kinds."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; gzip's own errors have none
            raise
        reason = one_line(error) if str(error) else "it ends early"
    else:
        return
    raise ValueError(
        f"{path}: not an archive, damaged or cut short ({reason}): get the file again, or unpack what is left of it "
        "and prepare that folder"
    ) from None
