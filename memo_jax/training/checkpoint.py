"""Checkpoints of a run: the train state, written by orbax, and a manifest by which any damage is noticed.

Layout: `<workdir>/checkpoints/<step>/` with orbax's files and `manifest.json`: the names, shapes and types of the
arrays, the checksum of every file, and JSON of the caller's. A checkpoint appears, manifest included, by renaming a
finished folder: a run killed at any moment leaves whole checkpoints and at most a temporary folder, which nobody reads
and the next `Checkpointer` removes. In a bucket, where folders cannot be renamed, a checkpoint is whole once its
folder has `commit_success.txt`, which is written last.

There is no position in the data: a batch is a function of dataset, seed and step (`data/batches.py`).
"""

import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from memo_jax.files import as_path, in_bucket

FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"
FORMAT = 2
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that orbax writes to
COMMIT_FILE = "commit_success.txt"  # orbax's mark, written after the manifest; what it says does not matter
READ_BYTES = 1 << 24


class CheckpointError(ValueError):
    """A checkpoint that exists but cannot be used: cut short, damaged, or of another format."""


class Checkpointer:
    """Writes and reads the checkpoints of one workdir; all processes call every method together.

    `save` returns once the state is copied off the device (the caller may donate it at once); writing goes on in the
    background, and a failure surfaces in the next `save`, `wait` or `close`.

    Args:
      workdir: folder of the run; made when missing.
      keep: how many of the latest checkpoints stay, at least 1.
      keep_every: checkpoints at multiples of this many steps stay for ever; None or 0 for none.

    Raises:
      OSError: the folder cannot be made or written.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2, keep_every: int | None = None):
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least 1 checkpoint must stay")
        self.folder, self._keep, self._keep_every = _folder(workdir), keep, keep_every
        self._saving: tuple[int, dict] | None = None  # step and manifest of the save under way
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                self._remove_unfinished()
        except OSError as error:
            raise OSError(f"{self.folder}: cannot be used for checkpoints: {_cause(error)}") from error
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
            checkpoint_metadata_store=ocp.metadata.metadata_store(enable_write=False),
        )

    def latest_step(self) -> int | None:
        """Returns the step of the latest checkpoint, None when there is none."""
        return max(saved_steps(self.folder.parent), default=None)

    def save(self, step: int, state, extra: dict | None = None) -> None:
        """Saves a pytree of arrays, and `extra`, which is JSON, as the checkpoint of a step after all others.

        Raises:
          OSError: the disk is full or cannot be written, perhaps in the save before; earlier checkpoints are intact.
          ValueError: `extra` is not JSON, or a checkpoint of this step or a later one exists.
        """
        self.wait()
        latest = self.latest_step()
        if latest is not None and latest >= step:
            raise ValueError(
                f"{self.folder} holds a checkpoint of step {latest}, not before step {step} now to be saved: "
                "resume from it, or use another workdir"
            )
        arrays = _by_name(state)
        described = {name: _array_text(leaf) for name, leaf in arrays.items()}
        manifest = {"format": FORMAT, "step": int(step), "extra": extra or {}, "arrays": described}
        self._saving = int(step), json.loads(_json(manifest))  # a copy: the caller may change `extra`
        with self._explained():
            self._orbax.save(self.folder / str(step), args=ocp.args.PyTreeSave(arrays), force=True)

    def wait(self) -> None:
        """Waits for the save under way, and removes the checkpoints that are no longer kept. Raises its OSError."""
        if self._saving is None:
            return
        with self._explained():
            self._orbax.wait_until_finished()
            self._saving = None
            if jax.process_index() == 0:
                for step in saved_steps(self.folder.parent)[: -self._keep]:
                    if not self._keep_every or step % self._keep_every:
                        _remove(self.folder / str(step))

    def restore(self, abstract_state):
        """Returns the state of the latest checkpoint.

        Args:
          abstract_state: pytree like the saved one, of arrays or of `jax.ShapeDtypeStruct` with shardings, which the
            result takes on.

        Raises:
          FileNotFoundError: no checkpoint.
          CheckpointError: the checkpoint is damaged; names the file and what to do.
          ValueError: the checkpoint is of another model (names the first array that differs).
        """
        self.wait()
        folder, manifest, steps = _latest_or(self.folder.parent, None)
        _check_fits(manifest["arrays"], abstract_state, folder)
        _check_files(folder, manifest, steps, shared=True)
        target = {name: _with_sharding(leaf) for name, leaf in _by_name(abstract_state).items()}
        arrays = _read_arrays(folder, target, ocp.checkpoint_utils.construct_restore_args(target))
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in target])

    def close(self) -> None:
        """Waits for the save under way and frees threads. Raises the OSError of that save."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _write_manifest(self) -> None:
        """Runs in the first process, in the background: all files are written, and the checkpoint has not appeared."""
        step, manifest = self._saving
        folder = next(self.folder.glob(f"{step}{UNFINISHED}*"), self.folder / str(step))
        files = {str(file.relative_to(folder)): [file.stat().length, _crc32(file)] for file in _files(folder)}
        (folder / MANIFEST_FILE).write_text(_manifest_text(manifest | {"files": files}))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns whatever a failed save raises into one OSError, and removes what it left on the disk."""
        try:
            yield
        except Exception as error:
            (step, _), self._saving = self._saving or (self.latest_step(), None), None
            try:
                if jax.process_index() == 0:
                    self._remove_unfinished(step)
                previous = self.latest_step()
                intact = (
                    "there is none before it" if previous is None else f"the checkpoint of step {previous} is intact"
                )
            except Exception:  # the bucket cannot be reached
                intact = "those before it are as they were"
            way_out = (
                "Make sure that the bucket can be written"
                if in_bucket(self.folder)
                else "Free some space (or repair the folder)"
            )
            raise OSError(
                f"{self.folder / str(step)}: cannot save the checkpoint: {_cause(error)}; {intact}. "
                f"{way_out} and start the same command again"
            ) from error

    def _remove_unfinished(self, step: int | None = None) -> None:
        """Removes what unfinished saves have left; in a bucket only that of `step`."""
        if not in_bucket(self.folder):
            for leftover in self.folder.glob(f"*{UNFINISHED}*"):
                leftover.rmtree(missing_ok=True)
        elif step is not None and step not in saved_steps(self.folder.parent):
            (self.folder / str(step)).rmtree(missing_ok=True)


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps of the checkpoints in a workdir, ascending; [] when there is none. Reads only their names."""
    folder = _folder(workdir)
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def load_extra(workdir: str | os.PathLike, step: int | None = None) -> dict:
    """Returns the `extra` of a checkpoint (the latest by default), not reading its arrays. Raises like `load_raw`."""
    return _latest_or(workdir, step)[1]["extra"]


def load_raw(
    workdir: str | os.PathLike, step: int | None = None, only: Iterable[str] | None = None
) -> tuple[dict, dict]:
    """Reads a checkpoint without knowing its model: for evaluation, on any machine.

    Args:
      workdir: folder of the run; only read.
      step: which checkpoint; the latest by default.
      only: names of the state's top-level fields to read; all by default.

    Returns:
      (nested dict of numpy arrays, extra). Dataclasses, tuples and lists come as dicts, too.

    Raises:
      FileNotFoundError: no checkpoint (of that step).
      CheckpointError: the checkpoint is damaged; names the file and what to do.
      ValueError: the state has no field of a name in `only`.
    """
    folder, manifest, steps = _latest_or(workdir, step)
    fields = list(dict.fromkeys(name.partition("/")[0] for name in manifest["arrays"]))
    wanted = fields if only is None else list(only)
    for field in wanted:
        if field not in fields:
            raise ValueError(f"{folder}: the saved state has no field {field!r}; it has {', '.join(fields)}")
    _check_files(folder, manifest, steps)
    target = {name: 0 for name in manifest["arrays"] if name.partition("/")[0] in wanted}
    as_numpy = dict.fromkeys(target, ocp.RestoreArgs(restore_type=np.ndarray))
    return traverse_util.unflatten_dict(_read_arrays(folder, target, as_numpy), sep="/"), manifest["extra"]


def _folder(workdir) -> epath.Path:
    path = as_path(workdir)
    return (path if in_bucket(path) else epath.Path(path).resolve()) / FOLDER  # orbax wants it absolute


def _latest_or(workdir, step: int | None) -> tuple[epath.Path, dict, list[int]]:
    """(folder, manifest, steps of all checkpoints) of the checkpoint of a step, or of the latest."""
    folder, steps = _folder(workdir), saved_steps(workdir)
    if not steps:
        raise FileNotFoundError(f"{folder}: no checkpoint here; give the workdir of a run that has saved one")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise FileNotFoundError(f"{folder / str(step)}: no such checkpoint; there are those of steps {known}")
    folder = folder / str(steps[-1] if step is None else step)
    return folder, _read_manifest(folder, steps), steps


def _read_manifest(folder, steps: list[int]) -> dict:
    file = folder / MANIFEST_FILE
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise _damaged(folder, steps, f"{MANIFEST_FILE} is missing") from None
    except Exception as error:  # whatever a bucket's library raises
        raise _unreadable(file, error) from error
    try:
        manifest = json.loads(content)["manifest"]
        intact = content == _manifest_text(manifest).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise _damaged(folder, steps, f"{MANIFEST_FILE} is not as it was written")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder}: written by another version of memo-jax")
    return manifest


def _check_files(folder, manifest: dict, steps: list[int], shared: bool = False) -> None:
    """Raises CheckpointError for the first file that differs from the manifest; `shared`: each process reads some."""
    files = list(manifest["files"].items())
    count, index = (jax.process_count(), jax.process_index()) if shared else (1, 0)
    bad, reason = len(files), ""
    for number in range(index, len(files), count):
        name, (size, checksum) = files[number]
        try:
            if (folder / name).stat().length != size or _crc32(folder / name) != checksum:
                bad = number
                break
        except FileNotFoundError:
            bad = number
            break
        except Exception as error:  # a disk that cannot be read, or whatever a bucket's library raises
            bad, reason = number, _cause(error)
            break
    if count > 1:
        bad = int(np.min(multihost_utils.process_allgather(np.int32(bad))))
    if bad == len(files):
        return
    name, (size, _) = files[bad]
    if reason:
        raise OSError(f"{folder / name}: cannot be read: {reason}")
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: removed while it was read; the run that trains there keeps later ones")
    file = folder / name
    what = "is missing" if not file.exists() else "differs from what was written (its size or checksum)"
    raise _damaged(folder, steps, f"{name} {what}")


def _read_arrays(folder, target: dict, restore_args: dict) -> dict:
    """Reads the arrays of some names, after their files were checked."""
    handler = ocp.PyTreeCheckpointHandler()
    arguments = ocp.args.PyTreeRestore(target, partial_restore=True, restore_args=restore_args)
    try:
        return handler.restore(folder, args=arguments)
    except Exception as error:
        raise _unreadable(folder, error) from error
    finally:
        handler.close()


def _files(folder) -> list[epath.Path]:
    """The files of a checkpoint that its manifest names."""
    found = []
    for entry in sorted(folder.iterdir()):
        found += _files(entry) if entry.is_dir() else [entry]
    return [file for file in found if file.name not in (MANIFEST_FILE, COMMIT_FILE)]


def _crc32(file) -> int:
    """Checksum of a file: 0.3 s a gigabyte, with which any change of up to 32 bits in a row is noticed."""
    checksum = 0
    with file.open("rb") as content:
        while part := content.read(READ_BYTES):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _json(value) -> str:
    try:
        return json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra must be JSON to be saved: {error}") from None


def _manifest_text(manifest: dict) -> str:
    """The text of a manifest with the checksum of itself: a text that differs by any bit is not of this form."""
    return _json({"crc32": zlib.crc32(_json(manifest).encode()), "manifest": manifest}) + "\n"


def _damaged(folder, steps: list[int], what: str) -> CheckpointError:
    """An error that names a damaged checkpoint and the way out."""
    earlier = [step for step in steps if step < int(folder.name)]
    way_out = "delete this folder and start again, there is no checkpoint before it"
    if earlier:
        way_out = f"delete this folder to go on from the checkpoint before it, {folder.parent / str(earlier[-1])}"
    return CheckpointError(f"{folder}: the checkpoint is damaged or cut short: {what}; {way_out}")


def _unreadable(path, error: Exception) -> OSError:
    return OSError(f"{path}: cannot be read: {_cause(error)}")


def _cause(error: BaseException) -> str:
    """The first line of an exception and of its causes that says something to a person."""
    texts = []
    while error is not None:
        texts.append(f"{error}".strip())
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        error = error.__cause__ or error.__context__
    text = "\n".join(texts)
    for known in (
        "No space left on device",
        "Disk quota exceeded",
        "Read-only file system",
        "Permission denied",
        "Input/output error",
    ):
        if known.lower() in text.lower():
            return known
    return next((line.strip()[:300] for line in text.splitlines() if line.strip()), type(error).__name__)


def _by_name(tree) -> dict:
    """{"teacher/ecapa/params/…": leaf} of any pytree, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _check_fits(saved: dict[str, str], abstract_state, folder) -> None:
    """Raises ValueError unless the saved arrays have the names, shapes and types of the abstract state."""
    wanted = {name: _array_text(leaf) for name, leaf in _by_name(abstract_state).items()}
    for name in [*wanted, *saved]:
        there, here = saved.get(name, "absent"), wanted.get(name, "absent")
        if there != here:
            raise ValueError(
                f"{folder}: the checkpoint is of another model: {name} is {there} in the checkpoint and {here} here; "
                "use the config it was made with, or another workdir"
            )


def _array_text(leaf) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _with_sharding(leaf) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _remove(folder) -> None:
    """Removes a checkpoint so that, if this is interrupted, what is left does not look whole."""
    if in_bucket(folder):
        (folder / COMMIT_FILE).unlink(missing_ok=True)
    else:
        folder = folder.rename(folder.with_name(f"{folder.name}{UNFINISHED}"))
    folder.rmtree(missing_ok=True)


def _quiet(record: logging.LogRecord) -> bool:
    """Drops what orbax tells absl's logger; its errors are raised as well, and said in our words."""
    return "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_quiet)
