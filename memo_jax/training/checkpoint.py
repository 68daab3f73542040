"""Checkpoints of a run: the train state, written by orbax in the background, and read back.

A checkpoint appears, manifest included, by renaming a finished folder: a run killed at any moment leaves complete
checkpoints and at most a temporary folder, which nothing reads and the next `Checkpointer` removes.
`saved_checkpoint.py` describes the files.

No position in the data is saved: a batch is a function of dataset, seed and step (`data/batches.py`).
"""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from memo_jax.files import in_bucket
from memo_jax.training.processes import means_lost_process
from memo_jax.training.saved_checkpoint import (
    KNOWN_CAUSES,
    UNFINISHED,
    cause,
    checkpoints_folder,
    new_manifest,
    remove_checkpoint,
    saved_checkpoint,
    saved_steps,
    write_manifest,
)


class Checkpointer:
    """Writes and reads the checkpoints of one workdir; all processes call every method together.

    `save` returns once the state is copied off the device (the caller may donate it at once); writing continues in the
    background, and a failure surfaces in the next `save`, `wait` or `close`.

    Args:
      workdir: folder of the run; made if it is missing.
      keep: how many of the latest checkpoints are kept, at least 1.
      keep_every: checkpoints at multiples of this many steps are kept for ever; None or 0 for none.

    Raises:
      OSError: the folder cannot be made or written.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2, keep_every: int | None = None):
        self.folder, self._keep, self._keep_every = checkpoints_folder(workdir), keep, keep_every
        self._saving: tuple[int, dict] | None = None  # step and manifest of the save under way
        _ignore_closed_loops()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                self._remove_unfinished()
        except OSError as error:
            raise OSError(f"{self.folder}: cannot be used for checkpoints: {cause(error)}") from error
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
            checkpoint_metadata_store=ocp.metadata.metadata_store(enable_write=False),
        )

    def latest_step(self) -> int | None:
        """Returns the step of the latest checkpoint, None if there is none."""
        return max(saved_steps(self.folder.parent), default=None)

    def save(self, step: int, state: Any, extra: dict | None = None) -> None:
        """Saves a pytree of arrays, and `extra`, which is JSON, as the checkpoint of a step later than all others.

        Raises:
          OSError: this save or the one before failed, on a full disk, say; earlier checkpoints are intact.
          ValueError: `extra` is not JSON, or a checkpoint of this step or a later one exists.
        """
        self.wait()
        latest = self.latest_step()
        if latest is not None and latest >= step:
            raise ValueError(
                f"{self.folder} holds a checkpoint of step {latest}, so step {step} cannot be saved: "
                "resume from it, or use another workdir"
            )
        arrays = leaves_by_name(state)
        self._saving = int(step), new_manifest(step, arrays, extra or {})
        with self._explained():
            self._orbax.save(self.folder / str(step), args=ocp.args.PyTreeSave(arrays), force=True)

    def wait(self) -> None:
        """Waits for the save under way and removes checkpoints that are no longer kept. Raises the save's OSError."""
        if self._saving is None:
            return
        with self._explained():
            self._orbax.wait_until_finished()
            self._saving = None
            if jax.process_index() == 0:
                for step in saved_steps(self.folder.parent)[: -self._keep]:
                    if not self._keep_every or step % self._keep_every:
                        remove_checkpoint(self.folder / str(step))

    def restore(self, abstract_state: Any) -> Any:
        """Returns the state of the latest checkpoint.

        Args:
          abstract_state: pytree like the saved one, of arrays or of `jax.ShapeDtypeStruct` with the shardings that the
            result should have.

        Raises:
          FileNotFoundError: no checkpoint.
          CheckpointError: the checkpoint is damaged; names the file and what to do.
          ValueError: the checkpoint belongs to another model (names the first array that differs).
        """
        self.wait()
        saved, wanted = saved_checkpoint(self.folder.parent), leaves_by_name(abstract_state)
        saved.check_fits(wanted)
        saved.check_files(shared=True)
        target = {name: _with_sharding(leaf) for name, leaf in wanted.items()}
        arrays = saved.read_arrays(target, ocp.checkpoint_utils.construct_restore_args(target))
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
        """Runs in the first process, in the background: all files are written, the checkpoint is not yet visible."""
        step, manifest = self._saving
        folder = next(self.folder.glob(f"{step}{UNFINISHED}*"), self.folder / str(step))
        write_manifest(folder, manifest)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns whatever a failed save raises into one OSError, and removes what it left on disk."""
        try:
            yield
        except Exception as error:
            (step, _), self._saving = self._saving or (self.latest_step(), None), None
            if means_lost_process(error) and cause(error) not in KNOWN_CAUSES:
                raise  # the disk is not to blame
            try:
                if jax.process_index() == 0:
                    self._remove_unfinished()
                previous = self.latest_step()
                intact = (
                    "there is none before it" if previous is None else f"the checkpoint of step {previous} is intact"
                )
            except Exception:  # the bucket cannot be reached
                intact = "those before it are unchanged"
            way_out = (
                "Make sure that the bucket can be written"
                if in_bucket(self.folder)
                else "Free some space (or repair the folder)"
            )
            raise OSError(
                f"{self.folder / str(step)}: cannot save the checkpoint: {cause(error)}; {intact}. "
                f"{way_out} and start the same command again"
            ) from error

    def _remove_unfinished(self) -> None:
        """Removes what unfinished saves have left behind."""
        if in_bucket(self.folder):
            complete = saved_steps(self.folder.parent)
            leftovers = [one for one in self.folder.glob("*") if one.name.isdecimal() and int(one.name) not in complete]
        else:
            leftovers = self.folder.glob(f"*{UNFINISHED}*")
        for leftover in leftovers:
            leftover.rmtree(missing_ok=True)


def load_extra(workdir: str | os.PathLike) -> dict:
    """Returns the `extra` of the latest checkpoint; reads no arrays. Raises like `load_state`."""
    return saved_checkpoint(workdir).manifest["extra"]


def load_state(workdir: str | os.PathLike, step: int | None = None, only: Iterable[str] | None = None) -> dict:
    """Returns the state in a checkpoint, read without knowing its model: for evaluation, on any machine.

    Args:
      workdir: folder of the run; only read.
      step: which checkpoint; the latest by default.
      only: names of the state's top-level fields to read; all by default.

    Returns:
      Nested dict of numpy arrays. Dataclasses, tuples and lists come as dicts, too.

    Raises:
      FileNotFoundError: no checkpoint (of that step).
      CheckpointError: the checkpoint is damaged; names the file and what to do.
      ValueError: the state has no field of a name in `only`.
    """
    saved = saved_checkpoint(workdir, step)
    names = saved.manifest["arrays"]
    fields = list(dict.fromkeys(name.partition("/")[0] for name in names))
    wanted = fields if only is None else list(only)
    for field in wanted:
        if field not in fields:
            raise ValueError(f"{saved.folder}: the saved state has no field {field!r}; it has {', '.join(fields)}")
    saved.check_files()
    target = {name: 0 for name in names if name.partition("/")[0] in wanted}
    as_numpy = dict.fromkeys(target, ocp.RestoreArgs(restore_type=np.ndarray))
    return traverse_util.unflatten_dict(saved.read_arrays(target, as_numpy), sep="/")


def leaves_by_name(tree: Any) -> dict:
    """Returns {"teacher/ecapa/params/…": leaf} of any pytree, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _with_sharding(leaf) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _ignore_closed_loops() -> None:
    """Hides what tensorstore prints about writes that a failed save leaves unfinished; the failure itself is raised."""
    hook = sys.unraisablehook
    if getattr(hook, "__name__", "") == "without_closed_loops":  # a hook may be any callable
        return

    def without_closed_loops(ignored):
        if str(ignored.exc_value) != "Event loop is closed":
            hook(ignored)

    sys.unraisablehook = without_closed_loops


def _quiet(record: logging.LogRecord) -> bool:
    """Drops what orbax logs through absl and asyncio: its errors are raised as well, and reported in our words."""
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()


for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(_quiet)
