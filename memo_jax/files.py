"""Where files are, in the file system or in a bucket, and files that appear whole or not at all in either."""

import contextlib
import importlib.util
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

URL = re.compile(r"([a-z][a-z0-9]*):/+(.*)")  # with one slash where pathlib had it

SECONDS_BETWEEN_UPLOADS = 60.0
UPLOADING_SHARE = 0.02  # most of the time that uploads in between may take


def as_path(path: str | os.PathLike) -> Path:
    """Returns a pathlib.Path, or for `gs://bucket/…` the etils.epath.Path that is used like one.

    Raises:
      ValueError: a URL of another kind.
      ImportError: gs:// without what the extra `gcs` installs.
    """
    url = URL.match(os.fspath(path))
    if url is None:
        return Path(path)
    scheme, rest = url.groups()
    if scheme != "gs" or not rest.strip("/"):
        raise ValueError(f"{scheme}://{rest}: give a path of the file system, or gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError(f"gs://{rest}: gs:// needs pip install 'memo-jax[gcs]'")
    os.environ.setdefault("EPATH_USE_TF", "0")  # where TensorFlow is installed, epath would take its file functions
    import fsspec
    from etils import epath

    # Other processes write and remove files, too.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    return epath.Path(f"gs://{rest.rstrip('/')}")


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is a URL."""
    return URL.match(os.fspath(path)) is not None


def check_local(path: str | os.PathLike) -> None:
    """Raises ValueError for a URL, where only the file system can be read or written."""
    if in_bucket(path):
        url = URL.sub(r"\1://\2", os.fspath(path))
        raise ValueError(
            f"{url} is no path of the file system, as is needed here: copy it (gcloud storage cp "
            "--recursive) or mount the bucket"
        )


def check_bucket(path: str | os.PathLike) -> None:
    """Raises OSError when the bucket that `path` is in cannot be asked for; of the file system it asks nothing."""
    if not in_bucket(path):
        return
    from google.cloud import storage

    try:  # what orbax asks for, too, when it lists checkpoints
        storage.Client().get_bucket(as_path(path).parts[2])
    except Exception as error:
        raise OSError(
            f"{path}: the bucket cannot be used: {_on_one_line(error)}; check its name, and that this machine has an "
            "account (gcloud auth application-default login) with the roles Storage Object User and Storage Legacy "
            "Bucket Reader on it"
        ) from error


def make_folder(path: str | os.PathLike) -> None:
    """Makes a folder where it is missing; a bucket needs none."""
    if not in_bucket(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def read_text(path: str | os.PathLike, errors: str = "strict") -> str | None:
    """Returns UTF-8 text, None where there is no such file; `errors` as for `bytes.decode`."""
    path = as_path(path)
    with _bucket_errors(path):
        try:
            return path.read_bytes().decode(errors=errors)
        except (FileNotFoundError, NotADirectoryError):
            return None


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path to write to, which becomes `path` when the block ends well and vanishes when it does not.

    It is a path of the file system; in a bucket an object appears when all of it is there.

    Raises:
      OSError: naming `path`, for any failure to write (that of a full disk names no file).
    """
    path = as_path(path)
    if in_bucket(path):
        import tempfile  # here, since it takes longer than all the rest of the command line

        with tempfile.TemporaryDirectory(prefix="memo-jax-") as folder:
            partial = Path(folder) / path.name
            yield partial
            upload(partial, path)
        return
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def upload(file: Path, path: str | os.PathLike) -> None:
    """Copies a file into a bucket, whole or not at all. Raises OSError naming `path`."""
    path = as_path(path)
    with _bucket_errors(path):
        path.write_bytes(file.read_bytes())


class AppendableFolder:
    """A folder whose files can be appended to: itself, or for one in a bucket a temporary copy at `path`.

    `upload` brings the files that have changed into the bucket, each whole or not at all.

    Args:
      folder: in the file system or a bucket.
      *names: of files that may be there already, to be appended to.
    """

    def __init__(self, folder: str | os.PathLike, *names: str):
        self._bucket, self._temporary = as_path(folder), None
        self.path = self._bucket
        if not in_bucket(folder):
            return
        import tempfile

        self._temporary = tempfile.TemporaryDirectory(prefix="memo-jax-")
        self.path = Path(self._temporary.name)
        self._uploaded, self._due = {}, time.monotonic() + SECONDS_BETWEEN_UPLOADS
        for name in names:
            if (text := read_text(self._bucket / name)) is not None:
                (self.path / name).write_text(text, encoding="utf-8")

    def upload(self, only_when_due: bool = False) -> None:
        """Uploads; `only_when_due` once a minute, and less often where that takes long. Raises OSError."""
        began = time.monotonic()
        if self._temporary is None or only_when_due and began < self._due:
            return
        for file in sorted(self.path.rglob("*")):
            state = file.stat()
            state = state.st_size, state.st_mtime_ns
            if file.is_file() and self._uploaded.get(file) != state:
                upload(file, self._bucket / file.relative_to(self.path))
                self._uploaded[file] = state
        ended = time.monotonic()
        self._due = ended + max(SECONDS_BETWEEN_UPLOADS, (ended - began) / UPLOADING_SHARE)

    def close(self) -> None:
        """Uploads, and removes the temporary copy."""
        if self._temporary is not None:
            with self._temporary:
                self.upload()


@contextlib.contextmanager
def _bucket_errors(path):
    """Turns whatever the libraries for buckets raise into an OSError that names the path."""
    try:
        yield
    except Exception as error:
        if not in_bucket(path):
            raise
        raise OSError(f"{path}: {_on_one_line(error)}") from error


def _on_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
