"""Files of embeddings: npz, or parquet by the name's ending, with the names and the model that they are of."""

import collections
import dataclasses
import os
import zlib
from pathlib import Path

import numpy as np

from memo_jax.files import one_line, replacing

FORMATS = (".npz", ".parquet")


@dataclasses.dataclass(frozen=True, eq=False)
class Embeddings:
    """N embeddings.

    Attributes:
      names: of the recordings (or enrolled speakers), N different ones.
      embeddings: float32 [N, D].
      model: fingerprint of the model that they are of (`Model.fingerprint`), "" where nobody knows.
    """

    names: list[str]
    embeddings: np.ndarray
    model: str = ""

    def __len__(self) -> int:
        return len(self.names)


class OtherModelError(ValueError):
    """Embeddings of different models were about to be compared."""


def check_same_model(one: str, one_name, other: str, other_name) -> None:
    """Raises OtherModelError when two fingerprints are known and differ; the names say whose they are."""
    if one and other and one != other:
        raise OtherModelError(
            f"{one_name} and {other_name} are of different models ({one} and {other}), so their embeddings cannot be "
            "compared: embed the recordings of both with one model"
        )


def check_output_name(path: str | os.PathLike) -> Path:
    """Returns the path; raises ValueError for an ending that says no format."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the name of a file of embeddings ends in {' or '.join(FORMATS)}")
    return path


def write_embeddings(path: str | os.PathLike, content: Embeddings) -> Path:
    """Writes a file of embeddings, whole or not at all; returns its path.

    npz: arrays `names` (text [N]), `embeddings` (float32 [N, D]), `model` and `checksum` (text). Parquet: columns
    `name` and `embedding` (a list of D float32); "model" and "checksum" in the metadata of the schema.

    Raises:
      ValueError: an ending that is neither. OSError: naming the file, when it cannot be written.
    """
    path = check_output_name(path)
    embeddings = np.ascontiguousarray(content.embeddings, np.float32)
    with replacing(path) as partial:
        if path.suffix.lower() == ".npz":
            with open(partial, "wb") as file:
                arrays = {"names": np.array(content.names, str), "embeddings": embeddings}
                arrays |= {"model": np.array(content.model)}
                arrays |= {"checksum": np.array(_checksum(content.names, embeddings, content.model))}
                np.savez(file, **arrays)
        else:
            _write_parquet(partial, content.names, embeddings, content.model)
    return path


def _write_parquet(path, names, embeddings, model):
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(embeddings.ravel()), embeddings.shape[1])
    table = pyarrow.table({"name": pyarrow.array(names, pyarrow.string()), "embedding": column})
    # Pages are stored uncompressed with their checksums: speech embeddings do not compress.
    parquet.write_table(
        table.replace_schema_metadata({"model": model, "checksum": _checksum(names, embeddings, model)}),
        path,
        write_page_checksum=True,
        compression="none",
    )


def _checksum(names, embeddings, model) -> str:
    """CRC-32 of all that a file holds; those of zip and Parquet do not cover names, lengths and metadata."""
    content = "\0".join([model, *names]).encode("utf-8", "surrogatepass")
    return f"{zlib.crc32(np.ascontiguousarray(embeddings, '<f4').tobytes(), zlib.crc32(content)):08x}"


def read_embeddings(path: str | os.PathLike) -> Embeddings:
    """Reads embeddings that `write_embeddings` wrote, or any npz with `names` [N] and `embeddings` [N, D].

    Raises:
      OSError: naming the file, when it cannot be opened.
      ValueError: naming the file: other content, damage, names that occur twice, an embedding of zeros or not finite.
    """
    path = check_output_name(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of embeddings")
    try:
        read = _read_npz if path.suffix.lower() == ".npz" else _read_parquet
        names, embeddings, model = read(path)
    except PermissionError:
        raise
    except Exception as error:  # NumPy, zipfile and pyarrow raise over a dozen kinds for a damaged file
        raise ValueError(
            f"{path}: not a file of embeddings, or damaged ({one_line(error)}); expected `names` [N] and `embeddings` "
            "[N, D]"
        ) from error
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or len(names) != len(embeddings):
        raise ValueError(
            f"{path}: `embeddings` must be floats [N, D] for the {len(names):,} `names`, not "
            f"{embeddings.dtype} {list(embeddings.shape)}"
        )
    if len(set(names)) < len(names):
        twice = next(name for name, count in collections.Counter(names).items() if count > 1)
        raise ValueError(f"{path}: {twice!r} occurs twice among the names")
    if not np.isfinite(embeddings).all():
        row = int(np.flatnonzero(~np.isfinite(embeddings).all(axis=1))[0])
        raise ValueError(f"{path}: the embedding of {names[row]!r} is not finite")
    zero = np.flatnonzero(~embeddings.any(axis=1))
    if zero.size:
        raise ValueError(f"{path}: the embedding of {names[zero[0]]!r} is zero, so it has no direction to compare")
    return Embeddings(names, np.asarray(embeddings, np.float32), model)


def _read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        # zipfile does not compare its directory with the number of entries, so a torn one could hide `checksum`.
        with open(path, "rb") as raw:
            raw.seek(-22, os.SEEK_END)
            end = raw.read()
        if end[:4] == b"PK\x05\x06" and int.from_bytes(end[10:12], "little") != len(file.files):
            raise ValueError("its directory is damaged")
        names, embeddings = file["names"], file["embeddings"]
        model, checksum = (
            str(file[key]) if key in file.files and file[key].ndim == 0 else "" for key in ("model", "checksum")
        )
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist()]
    _check(names, embeddings, model, checksum)
    return names, embeddings, model


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
    embeddings = np.asarray(column.flatten()).reshape(len(names), -1)
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    model = metadata.get("model", "")
    _check(names, embeddings, model, metadata.get("checksum", ""))
    return names, embeddings, model


def _check(names, embeddings, model, checksum):
    """Raises ValueError where a file has a checksum and its content another one."""
    if checksum and checksum != _checksum(names, embeddings, model):
        raise ValueError("its checksum differs: it has changed since it was written")
