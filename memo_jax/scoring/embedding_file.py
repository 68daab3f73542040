"""Files of embeddings with the names of their recordings; the ending of a file's name says which kind it is.

`FILE_KINDS` has them all: npz and parquet, which keep everything, and npy and Kaldi's ark, which other tools read.
"""

import collections
import dataclasses
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memo_jax.files import one_line, replacing

LONGEST_ARK_NAME = 4096  # bytes; a file without a space for longer is not an archive
MOST_NUMBERS = 1 << 20  # of an embedding in an archive: a damaged header must not claim all memory
KALDI_BLANKS = frozenset(" \t\r\n\f\v")  # what separates Kaldi's fields
LINE_PARTS = frozenset("\t\r\n")


@dataclasses.dataclass(frozen=True, eq=False)
class Embeddings:
    """N embeddings.

    Attributes:
      names: of the recordings (or enrolled speakers), N different ones.
      embeddings: float32 [N, D].
      model: fingerprint of the model that they come from (`Model.fingerprint`), "" if unknown.
      times: float64 [N, 2], the seconds of its recording at which each begins and ends; None for whole recordings.
    """

    names: list[str]
    embeddings: np.ndarray
    model: str = ""
    times: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)


class OtherModelError(ValueError):
    """Embeddings of different models were about to be compared."""


def check_same_model(one: str, one_name: str | os.PathLike, other: str, other_name: str | os.PathLike) -> None:
    """Raises OtherModelError when two fingerprints are known and differ; the names say whose they are."""
    if one and other and one != other:
        raise OtherModelError(
            f"{one_name} and {other_name} are from different models ({one} and {other}), so their embeddings cannot be "
            "compared: embed the recordings of both with one model"
        )


def kind_of(path: str | os.PathLike) -> "FileKind":
    """Returns the kind of a file of embeddings; raises ValueError for a name with another ending."""
    kind = FILE_KINDS.get(Path(path).suffix.lower())
    if kind is None:
        *endings, last = FILE_KINDS
        raise ValueError(f"{path}: the name of a file of embeddings ends in {', '.join(endings)} or {last}")
    return kind


def check_output_name(path: str | os.PathLike, *, gallery: bool = False) -> Path:
    """Returns the path; raises ValueError for an unknown ending, or for a gallery one that does not keep the model."""
    if gallery and not kind_of(path).keeps_model:
        endings = " or ".join(ending for ending, kind in FILE_KINDS.items() if kind.keeps_model)
        raise ValueError(f"{path}: a gallery that is written to ends in {endings}, which keep its model")
    kind_of(path)
    return Path(path)


def check_replaces_no_list(path: str | os.PathLike) -> None:
    """Raises ValueError for a new archive beside an scp of its name, which may be Kaldi's list of recordings."""
    path = Path(path)
    if path.suffix.lower() == ".ark" and not path.exists() and (places := path.with_suffix(".scp")).exists():
        raise ValueError(f"{places} would be replaced, and there is no {path} that it belongs to: choose another name")


def check_names(path: str | os.PathLike, names: list[str]) -> None:
    """Raises ValueError for a name that this kind of file cannot hold."""
    refused = kind_of(path).refused
    for name in names:
        if refused & set(name) or (refused and not name):
            raise ValueError(
                f"{path}: {name!r} has white space that names in such a file cannot have (or is empty): write "
                "npz or parquet"
            )


def write_embeddings(path: str | os.PathLike, content: Embeddings) -> Path:
    """Writes a file of embeddings, whole or not at all; returns its path.

    * npz: arrays `names` (text [N]), `embeddings` (float32 [N, D]), `model` and `checksum` (text); with times `start`
      and `end` (float64 [N]).
    * parquet: columns `name` and `embedding` (a list of D float32), with times `start` and `end`; "model" and
      "checksum" in the metadata of the schema.
    * npy: the array, and beside it x.names.txt with a name on each line; with times `name<tab>start<tab>end`.
    * ark or scp: x.ark with Kaldi's binary vectors and x.scp, which says where each is in it; with times also
      x.segments, lines `name recording start end`.

    Raises:
      ValueError: another ending, or a name that the kind cannot hold. OSError: naming the file, when it cannot be
        written.
    """
    path = check_output_name(path)
    check_names(path, content.names)
    content = dataclasses.replace(content, embeddings=np.ascontiguousarray(content.embeddings, np.float32))
    kind_of(path).write(path, content)
    return path


def _write_npz(path, content):
    arrays = {"names": np.array(content.names, str), "embeddings": content.embeddings}
    arrays |= {"model": np.array(content.model), "checksum": np.array(_checksum(content))}
    if content.times is not None:
        arrays |= {"start": content.times[:, 0], "end": content.times[:, 1]}
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def _write_parquet(path, content):
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.FixedSizeListArray.from_arrays(
        pyarrow.array(content.embeddings.ravel()), content.embeddings.shape[1]
    )
    columns = {"name": pyarrow.array(content.names, pyarrow.string()), "embedding": column}
    if content.times is not None:
        columns |= {"start": content.times[:, 0], "end": content.times[:, 1]}
    table = pyarrow.table(columns)
    with replacing(path) as partial:
        # Pages are stored uncompressed with their checksums: speech embeddings do not compress.
        parquet.write_table(
            table.replace_schema_metadata({"model": content.model, "checksum": _checksum(content)}),
            partial,
            write_page_checksum=True,
            compression="none",
        )


def _write_npy(path, content):
    companion = _names_file(path)
    lines = content.names
    if content.times is not None:
        lines = [f"{name}\t{start!r}\t{end!r}" for name, (start, end) in zip(lines, content.times.tolist())]
    with replacing(companion) as partial_names, replacing(path) as partial:
        partial_names.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        with open(partial, "wb") as file:
            np.save(file, content.embeddings)
        # The names of other embeddings must never lie beside these. A link to them stays.
        Path(os.path.realpath(companion)).unlink(missing_ok=True)


def _names_file(path: Path) -> Path:
    return path.with_suffix(".names.txt")


def _write_ark(path, content):
    ark, scp, segments = (path.with_suffix(suffix) for suffix in (".ark", ".scp", ".segments"))
    if path.suffix.lower() == ".ark":
        ark = path
    else:
        scp = path
    vector, places = struct.pack("<3sbi", b"FV ", 4, content.embeddings.shape[1]), []
    with replacing(scp) as partial_scp, replacing(ark) as partial:
        with open(partial, "wb") as file:
            for name, row in zip(content.names, content.embeddings, strict=True):
                file.write(name.encode() + b" ")
                places.append(f"{name} {ark.absolute()}:{file.tell()}\n")
                file.write(b"\0B" + vector + row.astype("<f4").tobytes())
        partial_scp.write_text("".join(places), encoding="utf-8", newline="\n")
        Path(os.path.realpath(scp)).unlink(missing_ok=True)  # places in another archive must never lie beside this one
        segments.unlink(missing_ok=True)
    if content.times is not None:
        rows = zip(content.names, content.times.tolist(), strict=True)
        with replacing(segments) as partial:
            lines = [f"{name} {name.rpartition(':')[0]} {start!r} {end!r}\n" for name, (start, end) in rows]
            partial.write_text("".join(lines), encoding="utf-8", newline="\n")


def _checksum(content: Embeddings) -> str:
    """CRC-32 of all that a file holds; those of zip and Parquet do not cover names, lengths and metadata."""
    checksum = zlib.crc32("\0".join([content.model, *content.names]).encode("utf-8", "surrogatepass"))
    for array, dtype in ((content.embeddings, "<f4"), (content.times, "<f8")):
        if array is not None:
            with np.errstate(over="ignore", under="ignore"):  # of float64 in files of other programs
                checksum = zlib.crc32(np.ascontiguousarray(array, dtype).tobytes(), checksum)
    return f"{checksum:08x}"


def read_embeddings(path: str | os.PathLike) -> Embeddings:
    """Reads what `write_embeddings` wrote, or files of other programs.

    These may be any npz with `names` [N] and `embeddings` [N, D], any npy [N, D] with its file of names, and any
    archive or scp of Kaldi with binary vectors. npy and ark do not say which model they come from; ark and scp have no
    times.

    Raises:
      OSError: naming the file, when it cannot be opened.
      ValueError: naming the file: other content, damage, names that occur twice, an embedding of zeros or not finite.
    """
    path = check_output_name(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of embeddings")
    try:
        content = kind_of(path).read(path)
    except PermissionError:
        raise
    except Exception as error:  # NumPy, zipfile and pyarrow raise over a dozen kinds for a damaged file
        raise ValueError(
            f"{path}: not a file of embeddings, or damaged ({one_line(error)}); expected `names` [N] and `embeddings` "
            "[N, D]"
        ) from error
    names, embeddings = content.names, content.embeddings
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or len(names) != len(embeddings):
        raise ValueError(
            f"{path}: `embeddings` must be floats [N, D] for the {len(names):,} `names`, not "
            f"{embeddings.dtype} {list(embeddings.shape)}"
        )
    if len(set(names)) < len(names):
        twice = next(name for name, count in collections.Counter(names).items() if count > 1)
        raise ValueError(f"{path}: {twice!r} occurs twice among the names")
    with np.errstate(over="ignore", under="ignore"):
        embeddings = np.asarray(embeddings, np.float32)  # in which 1e300 is infinite and 1e-300 zero
    if not np.isfinite(embeddings).all():
        row = int(np.flatnonzero(~np.isfinite(embeddings).all(axis=1))[0])
        raise ValueError(f"{path}: the embedding of {names[row]!r} is not finite")
    zero = np.flatnonzero(~embeddings.any(axis=1))
    if zero.size:
        raise ValueError(f"{path}: the embedding of {names[zero[0]]!r} is zero, so it has no direction to compare")
    return dataclasses.replace(content, embeddings=embeddings)


def _read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        # zipfile does not compare its directory with the number of entries, so a truncated one could hide `checksum`.
        with open(path, "rb") as raw:
            raw.seek(-22, os.SEEK_END)
            end = raw.read()
        if end[:4] == b"PK\x05\x06" and int.from_bytes(end[10:12], "little") != len(file.files):
            raise ValueError("its directory is damaged")
        names, embeddings = file["names"], file["embeddings"]
        model, checksum = (
            str(file[key]) if key in file.files and file[key].ndim == 0 else "" for key in ("model", "checksum")
        )
        times = np.stack([file["start"], file["end"]], axis=1) if {"start", "end"} <= set(file.files) else None
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist()]
    return _checked(Embeddings(names, embeddings, model, times), checksum)


def _read_parquet(path):
    import pyarrow
    import pyarrow.compute
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, page_checksum_verification=True)
        table.validate(full=True)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error
    names = table["name"].to_pylist()
    if not all(isinstance(name, str) for name in names):
        raise ValueError("`name` must be text")
    column = table["embedding"].combine_chunks()
    if column.null_count or len(set(pyarrow.compute.list_value_length(column).to_pylist())) > 1:
        raise ValueError("the rows of `embedding` have different lengths")
    embeddings = np.asarray(column.flatten()).reshape(len(names), -1 if names else 1)  # no rows: an empty gallery
    times = None
    if {"start", "end"} <= set(table.column_names):
        times = np.stack([table[key].to_numpy() for key in ("start", "end")], axis=1)
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return _checked(Embeddings(names, embeddings, metadata.get("model", ""), times), metadata.get("checksum", ""))


def _checked(content: Embeddings, checksum: str) -> Embeddings:
    """Returns the content of a file; raises ValueError if the file's checksum, where it has one, differs."""
    if content.embeddings.dtype.kind != "f":
        raise ValueError(f"`embeddings` must be floats, not {content.embeddings.dtype}")
    if checksum and checksum != _checksum(content):
        raise ValueError("its checksum differs: it has changed since it was written")
    return content


def _read_npy(path):
    embeddings = np.load(path, allow_pickle=False)
    companion = _names_file(path)
    if not companion.is_file():
        raise ValueError(f"{companion} is missing, which has the name of each row on a line")
    rows = [line.split("\t") for line in _lines(companion)]
    if {len(row) for row in rows} == {3}:
        times = np.array([[float(number) for number in row[1:]] for row in rows])
    elif any(len(row) > 1 for row in rows):
        raise ValueError(f"{companion}: expected a name on each line, or name, start and end between tabs")
    else:
        times = None
    return Embeddings([row[0] for row in rows], embeddings, "", times)


def _lines(path: Path) -> list[str]:
    """Returns the lines of a text file; unlike str.splitlines, only at line breaks."""
    return path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n") if path.stat().st_size else []


def _read_ark(path):
    names, rows = [], []
    with open(path, "rb") as file:
        while name := _ark_name(file):
            names.append(name)
            rows.append(_ark_vector(file, name))
    return _of_rows(names, rows)


def _read_scp(path):
    names, rows, opened = [], [], {}
    try:
        for number, line in enumerate(_lines(path), 1):
            name, _, place = line.strip().partition(" ")
            ark, colon, offset = place.strip().rpartition(":")
            if not colon or not offset.isdecimal():
                raise ValueError(f"line {number}: expected `name file.ark:offset`, not {line.strip()[:200]!r}")
            if ark not in opened:
                beside = path.with_name(Path(ark).name)  # where a pair was moved to another folder
                opened[ark] = open(ark if os.path.exists(ark) else beside, "rb")
            opened[ark].seek(int(offset))
            names.append(name)
            rows.append(_ark_vector(opened[ark], name))
    finally:
        for file in opened.values():
            file.close()
    return _of_rows(names, rows)


def _ark_name(file) -> str:
    """Reads the name before a vector of an archive; returns "" at the end of the file."""
    name = bytearray()
    while (letter := file.read(1)) not in (b"", b" "):
        name += letter
        if len(name) > LONGEST_ARK_NAME:
            raise ValueError("not a Kaldi archive")
    if name and not letter:
        raise ValueError("truncated")
    found = name.decode().lstrip("\n")
    if letter and not found:
        raise ValueError("damaged: a vector without a name")
    return found


def _ark_vector(file, name: str) -> np.ndarray:
    """Reads a binary vector of float32 or float64."""
    head = file.read(10)
    dtype = {b"FV ": "<f4", b"DV ": "<f8"}.get(head[2:5])
    if head[:2] != b"\0B" or dtype is None or len(head) < 10 or head[5] != 4:
        raise ValueError(f"{name!r} is not a binary vector (copy-vector turns a text archive into a binary one)")
    count = int.from_bytes(head[6:10], "little", signed=True)
    if not 0 < count <= MOST_NUMBERS:
        raise ValueError(f"{name!r} claims {count:,} numbers")
    data = file.read(count * np.dtype(dtype).itemsize)
    if len(data) < count * np.dtype(dtype).itemsize:
        raise ValueError(f"truncated within {name!r}")
    return np.frombuffer(data, dtype)


def _of_rows(names, rows):
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(f"vectors of different lengths: {lengths[0]} and {lengths[-1]}")
    return Embeddings(names, np.stack(rows) if rows else np.zeros((0, 1), np.float32))


class FileKind(NamedTuple):
    """A kind of file of embeddings.

    Attributes:
      write: writes embeddings to a path.
      read: returns what is at a path.
      keeps_model: whether the fingerprint of the model is in it.
      refused: characters that names in it cannot have.
    """

    write: Callable[[Path, Embeddings], None]
    read: Callable[[Path], Embeddings]
    keeps_model: bool = False
    refused: frozenset[str] = frozenset()


FILE_KINDS = {
    ".npz": FileKind(_write_npz, _read_npz, keeps_model=True),
    ".parquet": FileKind(_write_parquet, _read_parquet, keeps_model=True),
    ".npy": FileKind(_write_npy, _read_npy, refused=LINE_PARTS),
    ".ark": FileKind(_write_ark, _read_ark, refused=KALDI_BLANKS),
    ".scp": FileKind(_write_ark, _read_scp, refused=KALDI_BLANKS),
}
