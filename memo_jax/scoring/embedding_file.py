"""Files of embeddings: npz, or parquet by the name's ending, with the names and the model that they are of."""

import dataclasses
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from memo_jax.files import replacing

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

    npz: arrays `names` (text [N]), `embeddings` (float32 [N, D]) and `model` (text). Parquet: columns `name` and
    `embedding` (a list of D float32), the model in the metadata of the schema under "model".

    Raises:
      ValueError: an ending that is neither. OSError: naming the file, when it cannot be written.
    """
    path = check_output_name(path)
    embeddings = np.ascontiguousarray(content.embeddings, np.float32)
    with replacing(path) as partial:
        if path.suffix.lower() == ".npz":
            with open(partial, "wb") as file:
                np.savez(file, names=np.array(content.names, str), embeddings=embeddings, model=np.array(content.model))
        else:
            _write_parquet(partial, content.names, embeddings, content.model)
    return path


def _write_parquet(path, names, embeddings, model):
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(embeddings.ravel()), embeddings.shape[1])
    table = pyarrow.table({"name": pyarrow.array(names, pyarrow.string()), "embedding": column})
    parquet.write_table(table.replace_schema_metadata({"model": model}), path)


def read_embeddings(path: str | os.PathLike) -> Embeddings:
    """Reads embeddings that `write_embeddings` wrote, or any npz with `names` [N] and `embeddings` [N, D].

    Raises:
      OSError: naming the file, when it cannot be opened.
      ValueError: naming the file: another content, names that occur twice, numbers that are not finite.
    """
    path = check_output_name(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of embeddings")
    try:
        read = _read_npz if path.suffix.lower() == ".npz" else _read_parquet
        names, embeddings, model = read(path)
    except (ValueError, KeyError, zipfile.BadZipFile, EOFError, TypeError) as error:
        reason = json.dumps(str(error).splitlines()[0][:200] if str(error) else type(error).__name__)
        raise ValueError(
            f"{path}: not a file of embeddings, or damaged ({reason}); expected `names` [N] and `embeddings` [N, D]"
        ) from error
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or len(names) != len(embeddings):
        raise ValueError(
            f"{path}: `embeddings` must be floats [N, D] for the {len(names):,} `names`, not "
            f"{embeddings.dtype} {list(embeddings.shape)}"
        )
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"{path}: {twice!r} occurs twice among the names")
    if not np.isfinite(embeddings).all():
        row = int(np.flatnonzero(~np.isfinite(embeddings).all(axis=1))[0])
        raise ValueError(f"{path}: the embedding of {names[row]!r} is not finite")
    return Embeddings(names, np.asarray(embeddings, np.float32), model)


def _read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        names, embeddings = file["names"], file["embeddings"]
        model = str(file["model"]) if "model" in file.files and file["model"].ndim == 0 else ""
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist()], embeddings, model


def _read_parquet(path):
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error
    names = table["name"].to_pylist()
    column = table["embedding"].combine_chunks()
    embeddings = np.asarray(column.flatten()).reshape(len(names), -1)
    return names, embeddings, (table.schema.metadata or {}).get(b"model", b"").decode()
