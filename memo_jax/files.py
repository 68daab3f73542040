"""Paths in the file system or in a bucket, and files that appear whole or not at all in either."""

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

URL = re.compile(r"([a-z][a-z0-9]*):/+(.*)")  # pathlib turns the two slashes into one

SECONDS_BETWEEN_UPLOADS = 60.0
UPLOADING_SHARE = 0.02  # of the elapsed time, at most, that uploads may take
LONGEST_REASON = 300  # characters of another library's message that are quoted


def as_json(value: Any, indent: int = 2) -> str:
    """Returns a value as JSON text, with null for NaN and infinities, which JSON does not have."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def parse_json(text: str | bytes) -> Any:
    """Returns the value of JSON text; raises ValueError for any other text, and for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def is_text(name: str) -> bool:
    """Returns whether a name is text, without the surrogates that Python uses for bytes that are not UTF-8."""
    try:
        name.encode()
        return True
    except UnicodeEncodeError:
        return False


def is_zip(path: str | os.PathLike) -> bool:
    """Returns whether a file is a zip archive, perhaps a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # its end record is there and cannot be right
        return True


def as_path(path: str | os.PathLike) -> Path:
    """Returns a pathlib.Path, or for `gs://bucket/…` an etils.epath.Path, which has the same methods.

    Raises:
      ValueError: a URL of another scheme.
      ImportError: gs:// without the packages of the extra `gcs`.
    """
    url = URL.match(os.fspath(path))
    if url is None:
        return Path(path)
    scheme, rest = url.groups()
    if scheme != "gs" or not rest.strip("/"):
        raise ValueError(f"{scheme}://{rest}: give a path of the file system, or gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError(f"gs://{rest}: gs:// needs pip install 'memo-jax[gcs]'")
    os.environ.setdefault("EPATH_USE_TF", "0")  # epath would use TensorFlow's file functions if it is installed
    import fsspec
    from etils import epath

    # Other processes write and remove files too.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    return epath.Path(f"gs://{rest.rstrip('/')}")


def in_bucket(path: str | os.PathLike) -> bool:
    """Returns whether a path is a URL."""
    return URL.match(os.fspath(path)) is not None


def check_local(path: str | os.PathLike) -> None:
    """Raises ValueError for a URL where only the file system will do."""
    if in_bucket(path):
        url = URL.sub(r"\1://\2", os.fspath(path))
        raise ValueError(
            f"{url} is not in the file system, where this must be: copy it (gcloud storage cp --recursive) or mount "
            "the bucket"
        )


def check_bucket(path: str | os.PathLike) -> None:
    """Raises OSError if the bucket of a gs:// path cannot be accessed; does nothing for other paths."""
    if not in_bucket(path):
        return
    from google.cloud import storage

    try:  # orbax makes the same request when it lists checkpoints
        storage.Client().get_bucket(as_path(path).parts[2])
    except Exception as error:
        raise OSError(
            f"{path}: the bucket cannot be used: {one_line(error)}; check its name, and that this machine has an "
            "account (gcloud auth application-default login) with the roles Storage Object User and Storage Legacy "
            "Bucket Reader on it"
        ) from error


def make_folder(path: str | os.PathLike) -> None:
    """Creates a folder if it is missing; a bucket needs none."""
    if not in_bucket(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def read_text(path: str | os.PathLike, errors: str = "strict") -> str | None:
    """Returns the UTF-8 text of a file, or None if there is no such file; `errors` as for `bytes.decode`."""
    path = as_path(path)
    with _bucket_errors(path):
        try:
            return path.read_bytes().decode(errors=errors)
        except (FileNotFoundError, NotADirectoryError):
            return None


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, fsync: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to, which replaces `path` if the block succeeds and is removed if it fails.

    The temporary path is in the file system; in a bucket the object appears once all of it has been uploaded. If `path`
    is a link, the file that it leads to is replaced. A device or a pipe is not replaced, nor is a file that this
    process has as its standard output or error, as /dev/stdout may be: what was written is copied into it.

    Args:
      path: of the file system, or gs://…
      fsync: also survive a power failure: flush the file, and then its folder, to the disk.

    Raises:
      OSError: naming `path` and not the temporary file, for any failure to write.
    """
    path = as_path(path)
    if in_bucket(path):
        import tempfile  # slow to import, so not where every command line would pay for it

        with tempfile.TemporaryDirectory(prefix="memo-jax-") as folder:
            partial = Path(folder) / path.name
            yield partial
            upload(partial, path)
        return
    stream = _standard_stream(path)
    if stream is not None or (path.exists() and not path.is_file() and not path.is_dir()):
        with _copied_into(path, stream) as partial:
            yield partial
        return
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target is path:  # a link into a missing folder is more likely a mistake
        make_folder(path.parent)
    partial = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield partial
        if fsync:
            flush_to_disk(partial)
        os.replace(partial, target)
        if fsync:
            flush_to_disk(target.parent)
    except OSError as error:
        # C++ libraries have messages of their own, with the name of the temporary file.
        text = os.strerror(error.errno) if error.errno else str(error).replace(str(partial), str(path))
        raise OSError(error.errno, text, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # on a failing disk the error above is the one to report
            partial.unlink(missing_ok=True)


def _standard_stream(path) -> int | None:
    """Returns the descriptor of standard output or standard error, if `path` leads to one of them."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # closed, or no such file
            if os.path.samestat(os.stat(path), os.fstat(stream)):
                return stream
    return None


@contextlib.contextmanager
def _copied_into(path, stream):
    """Yields a path to write to; what is there after the block is copied into `stream`, or else the device `path`."""
    import tempfile

    try:
        with tempfile.TemporaryDirectory(prefix="memo-jax-") as folder:
            partial = Path(folder) / path.name
            yield partial
            print(end="", flush=True)  # what was printed before comes before
            place = path if stream is None else os.dup(stream)
            with open(partial, "rb") as source, open(place, "wb", buffering=0) as device:
                shutil.copyfileobj(source, device)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def flush_to_disk(path: str | os.PathLike) -> None:
    """Makes a file, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text, whole or not at all; errors as for `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(path: str | os.PathLike) -> None:
    """Raises OSError, naming `path`, unless a file can be written there; leaves nothing behind.

    Called before long work whose result goes there. For a bucket it does nothing: `check_bucket` does that.
    """
    if in_bucket(path):
        return
    import tempfile

    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file")
    if path.exists() and not path.is_file():
        return  # a device or a pipe
    if path.is_symlink():
        path = Path(os.path.realpath(path))
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent}: no such folder, the target of a link")
    folder = next(folder for folder in path.parents if folder.exists())  # those below it can be created
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def one_line(error: BaseException, longest: int | None = LONGEST_REASON) -> str:
    """Returns what an exception says as one line, without Python's decoration and the full stop.

    Args:
      error: an exception; one without a message yields the name of its class.
      longest: number of characters after which to cut; None for the entire text.
    """
    if isinstance(error, OSError) and error.strerror:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror
    else:
        text = " ".join(str(error).split())
    return text[:longest].rstrip(".") or type(error).__name__


def upload(file: Path, path: str | os.PathLike) -> None:
    """Copies a file into a bucket, whole or not at all; raises OSError naming `path`."""
    path = as_path(path)
    with _bucket_errors(path):
        path.write_bytes(file.read_bytes())


class AppendableFolder:
    """A folder whose files can be appended to: the folder itself or, for one in a bucket, a temporary copy.

    `path` is where to write; `upload` copies the files that have changed into the bucket, each whole or not at all.

    Args:
      folder: in the file system or a bucket.
      *names: files to append to, if they exist already.
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
        """Uploads what has changed; raises OSError.

        Args:
          only_when_due: do so once a minute, and less often if uploading is slow.
        """
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
        """Uploads what has changed and removes the temporary copy."""
        if self._temporary is not None:
            with self._temporary:
                self.upload()


@contextlib.contextmanager
def _bucket_errors(path):
    """Turns any exception of the libraries for buckets into an OSError that names the path."""
    try:
        yield
    except Exception as error:
        if not in_bucket(path):
            raise
        raise OSError(f"{path}: {one_line(error)}") from error
