"""A checkpoint on disk: where it is, the manifest that reveals any damage, and how it is read.

Layout: `<workdir>/checkpoints/<step>/` with orbax's files and `manifest.json`: the names, shapes and types of the
arrays, the checksum of every file, and the caller's JSON. In a bucket, where folders cannot be renamed, a checkpoint is
complete once its folder has `commit_success.txt`, which orbax writes last.
"""

import contextlib
import json
import os
import zlib
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from memo_jax.files import as_path, in_bucket
from memo_jax.training.processes import gathered_from_all

CHECKPOINTS_FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = 2
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that orbax writes to
COMMIT_FILE = "commit_success.txt"  # orbax's mark, written after the manifest; its content does not matter
READ_BYTES = 1 << 24
# Causes of a failed read or write that tell a person what is wrong, however deep in an exception's text they are.
KNOWN_CAUSES = (
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "Permission denied",
    "Input/output error",
)


class CheckpointError(ValueError):
    """A checkpoint that exists but cannot be used: cut short, damaged, or of another format."""


def checkpoints_folder(workdir: str | os.PathLike) -> epath.Path:
    """Returns the folder of a workdir's checkpoints, absolute, as orbax wants it."""
    path = as_path(workdir)
    return (path if in_bucket(path) else epath.Path(path).resolve()) / CHECKPOINTS_FOLDER


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps of the checkpoints in a workdir, ascending; [] when there is none. Reads only their names."""
    folder = checkpoints_folder(workdir)
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


class SavedCheckpoint(NamedTuple):
    """A checkpoint whose manifest has been read and is intact; its other files are checked by `check_files`.

    Attributes:
      folder: of the checkpoint.
      manifest: "format", "step", "extra", "arrays" {name: type and shape} and "files" {name: [bytes, CRC-32]}.
      steps: of all checkpoints in the workdir.
    """

    folder: epath.Path
    manifest: dict
    steps: list[int]

    def check_fits(self, arrays: dict) -> None:
        """Raises ValueError unless the saved arrays have the names, shapes and types of these, {name: array}."""
        saved, wanted = self.manifest["arrays"], descriptions(arrays)
        for name in [*wanted, *saved]:
            there, here = saved.get(name, "absent"), wanted.get(name, "absent")
            if there != here:
                raise ValueError(
                    f"{self.folder}: the checkpoint belongs to another model: {name} is {there} in the checkpoint and "
                    f"{here} here; use the config it was made with, or another workdir"
                )

    def check_files(self, shared: bool = False) -> None:
        """Raises CheckpointError for the first file that differs from the manifest.

        With `shared`, every process checks its share of the files, and all raise the same error.
        """
        files = list(self.manifest["files"].items())
        count, index = (jax.process_count(), jax.process_index()) if shared else (1, 0)
        bad, reason = len(files), ""
        for number in range(index, len(files), count):
            name, (size, checksum) = files[number]
            file = self.folder / name
            try:
                if file.stat().length == size and crc32(file) == checksum:
                    continue
            except FileNotFoundError:
                pass
            except Exception as error:  # a disk that cannot be read, or whatever a bucket's library raises
                reason = cause(error)
            bad = number
            break
        if count > 1:
            bad = int(gathered_from_all(np.int32(bad)).min())
        if bad == len(files):
            return
        name, file = files[bad][0], self.folder / files[bad][0]
        if reason:
            raise OSError(f"{file}: cannot be read: {reason}")
        if not self.folder.exists():
            raise FileNotFoundError(
                f"{self.folder}: removed while it was being read; the run that trains there keeps later ones"
            )
        what = "is missing" if not file.exists() else "differs from what was written (its size or checksum)"
        raise damaged(self.folder, self.steps, f"{name} {what}")

    def read_arrays(self, target: dict, restore_args: dict) -> dict:
        """Returns the arrays of some names. Call `check_files` before.

        Args:
          target: {name: anything}, of the arrays that are read.
          restore_args: {name: `orbax.checkpoint.RestoreArgs`}: the type and the sharding to restore each with.

        Raises:
          OSError: the files cannot be read; names the folder and the cause.
        """
        handler = ocp.PyTreeCheckpointHandler()
        arguments = ocp.args.PyTreeRestore(target, partial_restore=True, restore_args=restore_args)
        try:
            return handler.restore(self.folder, args=arguments)
        except Exception as error:
            raise read_error(self.folder, error) from error
        finally:
            handler.close()


def saved_checkpoint(workdir: str | os.PathLike, step: int | None = None) -> SavedCheckpoint:
    """Returns the checkpoint of a step, by default the latest.

    Raises:
      FileNotFoundError: no checkpoint (of that step).
      CheckpointError: its manifest is damaged.
    """
    folder, steps = checkpoints_folder(workdir), saved_steps(workdir)
    if not steps:
        raise FileNotFoundError(f"{folder}: no checkpoint here; give the workdir of a run that has saved one")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise FileNotFoundError(f"{folder / str(step)}: no such checkpoint; there are those of steps {known}")
    folder = folder / str(steps[-1] if step is None else step)
    return SavedCheckpoint(folder, _read_manifest(folder, steps), steps)


def new_manifest(step: int, arrays: dict, extra: dict) -> dict:
    """Returns the manifest of a checkpoint to be written; ValueError if `extra` is not JSON."""
    manifest = {"format": MANIFEST_FORMAT, "step": int(step), "extra": extra, "arrays": descriptions(arrays)}
    return json.loads(_json(manifest))  # a copy: the caller may change `extra`


def write_manifest(folder: epath.Path, manifest: dict) -> None:
    """Writes the manifest of a checkpoint whose other files have all been written."""
    files = {str(file.relative_to(folder)): [file.stat().length, crc32(file)] for file in _files(folder)}
    (folder / MANIFEST_FILE).write_text(_manifest_text(manifest | {"files": files}))


def remove_checkpoint(folder: epath.Path) -> None:
    """Removes a checkpoint so that what is left does not look complete if this is interrupted."""
    if in_bucket(folder):
        (folder / COMMIT_FILE).unlink(missing_ok=True)
    else:
        folder = folder.rename(folder.with_name(f"{folder.name}{UNFINISHED}"))
    with contextlib.suppress(OSError):  # NFS keeps files that are open; the next `Checkpointer` removes what is left
        folder.rmtree(missing_ok=True)


def descriptions(arrays: dict) -> dict[str, str]:
    """Returns {name: type and shape} of {name: array}, such as float32[3, 4]."""
    return {name: f"{np.dtype(array.dtype).name}{list(array.shape)}" for name, array in arrays.items()}


def crc32(file: epath.Path) -> int:
    """Returns the checksum of a file: 0.3 s per gigabyte; it detects any change within 32 consecutive bits."""
    checksum = 0
    with file.open("rb") as content:
        while part := content.read(READ_BYTES):
            checksum = zlib.crc32(part, checksum)
    return checksum


def damaged(folder: epath.Path, steps: list[int], what: str) -> CheckpointError:
    """Returns an error that names a damaged checkpoint and the way out."""
    earlier = [step for step in steps if step < int(folder.name)]
    way_out = "delete this folder and start again, since there is no checkpoint before it"
    if earlier:
        way_out = f"delete this folder to resume from the checkpoint before it, {folder.parent / str(earlier[-1])}"
    return CheckpointError(f"{folder}: the checkpoint is damaged or cut short: {what}; {way_out}")


def read_error(path: epath.Path, error: Exception) -> OSError:
    """Returns an error that says why a file or folder cannot be read."""
    return OSError(f"{path}: cannot be read: {cause(error)}")


def cause(error: BaseException) -> str:
    """Returns the first informative line of an exception or of its causes."""
    texts = []
    while error is not None:
        texts.append(f"{error}".strip())
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        error = error.__cause__ or error.__context__
    text = "\n".join(texts)
    known = (each for each in KNOWN_CAUSES if each.lower() in text.lower())
    lines = (line.strip()[:300] for line in text.splitlines() if line.strip())
    return next(known, None) or next(lines, type(error).__name__)


def _read_manifest(folder, steps: list[int]) -> dict:
    file = folder / MANIFEST_FILE
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise damaged(folder, steps, f"{MANIFEST_FILE} is missing") from None
    except Exception as error:  # whatever a bucket's library raises
        raise read_error(file, error) from error
    try:
        manifest = json.loads(content)["manifest"]
        intact = content == _manifest_text(manifest).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise damaged(folder, steps, f"{MANIFEST_FILE} is not as it was written")
    if manifest["format"] != MANIFEST_FORMAT:
        raise CheckpointError(f"{folder}: written by another version of memo-jax")
    return manifest


def _manifest_text(manifest: dict) -> str:
    """The text of a manifest with its own checksum: changing any bit breaks this form."""
    return _json({"crc32": zlib.crc32(_json(manifest).encode()), "manifest": manifest}) + "\n"


def _json(value) -> str:
    try:
        return json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra must be JSON to be saved: {error}") from None


def _files(folder) -> list[epath.Path]:
    """The files of a checkpoint that its manifest names."""
    found = []
    for entry in sorted(folder.iterdir()):
        found += _files(entry) if entry.is_dir() else [entry]
    return [file for file in found if file.name not in (MANIFEST_FILE, COMMIT_FILE)]
