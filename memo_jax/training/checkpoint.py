"""Checkpoints of a run on orbax: the train state, the position in the data, and JSON beside them.

Layout: `<workdir>/checkpoints/<step>/{state, meta}`. A checkpoint appears by renaming a finished folder, so that a run
killed at any moment leaves whole checkpoints and at most a temporary folder, which nobody reads and the next
`Checkpointer` removes. In a bucket, where folders cannot be renamed, a checkpoint is whole when `commit_success.txt` is
in its folder, which is written last.
"""

import base64
import json
import logging
import os
import warnings
from collections.abc import Iterable
from contextlib import contextmanager

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from memo_jax.files import as_path, in_bucket

FOLDER = "checkpoints"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that exists but cannot be read: cut short, damaged, or of another format."""


class Checkpointer:
    """Writes and reads the checkpoints of one workdir; all processes call every method together.

    Args:
        workdir: folder of the run; made when missing.
        keep: how many of the latest checkpoints stay, at least 1.
        keep_every: checkpoints at multiples of this many steps stay for ever; None or 0 for none.
        asynchronous: `save` returns when the state is copied off the device (the caller may donate it at once) and
            writing goes on in the background; a failure then surfaces in the next `save`, `wait` or `close`. False:
            `save` returns when all is written.
    """

    def __init__(
        self, workdir: str | os.PathLike, keep: int = 2, keep_every: int | None = None, asynchronous: bool = True
    ):
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least 1 checkpoint must stay")
        self.folder = _folder(workdir)
        self._good = set()  # steps this object wrote or read, hence known to hold this very run
        self._restored = None
        self._pending = None  # the step being written
        self._asynchronous = asynchronous
        policies = ocp.checkpoint_managers
        kept = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        with _file_errors(f"cannot use {self.folder} for checkpoints"):
            self._manager = _manager(
                self.folder, cleanup_tmp_directories=True, preservation_policy=policies.AnyPreservationPolicy(kept)
            )

    def latest_step(self) -> int | None:
        """Returns the step of the latest whole checkpoint, None when there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Returns the steps of all whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state, data_iterator=None, extra: dict | None = None) -> None:
        """Saves a pytree of arrays, the iterator's `get_state()` (of every process) and `extra` as a checkpoint.

        A checkpoint that this object wrote or read at `step` is left as it is. After a `restore` of an earlier step the
        later checkpoints are removed: the run goes another way now.

        Raises:
            OSError: the disk is full or cannot be written (perhaps from the asynchronous save before); earlier
                checkpoints are intact.
            ValueError: `extra` or the iterator's state is not JSON, or later checkpoints exist and none was restored.
        """
        step = int(step)
        meta = _json_copy(
            {
                "format": FORMAT,
                "extra": extra or {},
                "data": _gathered_data_state(data_iterator),
                "names": _names_in_dicts(state),
            }
        )
        self.wait()
        if step in self._good and step in self.all_steps():
            return
        self._drop_from(step)
        self._pending = step
        with self._saving():
            items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
            self._manager.save(step, force=True, args=items)
        self._good.add(step)
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way. Raises its OSError."""
        if self._pending is not None:
            with self._saving():
                self._manager.wait_until_finished()
            self._pending = None

    def restore(self, abstract_state, data_iterator=None, step: int | None = None, fallback: bool = False):
        """Restores a checkpoint, setting `data_iterator` in place to where it was.

        Args:
            abstract_state: pytree like the saved one, of arrays or of `jax.ShapeDtypeStruct` with shardings, which the
                result takes on.
            data_iterator: object with `set_state`, or None to leave the data position alone.
            step: which checkpoint; the latest by default.
            fallback: when a checkpoint is damaged, warn and take the one before it, instead of raising.

        Returns:
            (state, extra).

        Raises:
            FileNotFoundError: no checkpoint (of that step).
            CheckpointError: the checkpoint is damaged; names the folder and what to do.
            ValueError: the checkpoint is of another model (names the first leaf that differs), or of another number of
                processes whose data positions differ. Where they agree, as those of `data.TrainingBatches` do, another
                number of processes is a warning.
        """
        self.wait()
        steps = _steps_to_try(self.folder, self.all_steps(), step)
        for i, candidate in enumerate(steps):
            try:
                state, meta = self._read(candidate, abstract_state, data_iterator is not None)
            except CheckpointError as error:
                if not fallback or i + 1 == len(steps):
                    raise
                before = self.folder / str(steps[i + 1])
                warnings.warn(f"{error}\nFalling back to the checkpoint before, {before}", stacklevel=2)
                continue
            break
        if data_iterator is not None:
            data_iterator.set_state(_data_state(meta["data"]["states"]))
        self._restored = candidate
        self._good = {known for known in self._good if known <= candidate} | {candidate}
        return state, meta["extra"]

    def close(self) -> None:
        """Waits for the save under way and frees threads. Raises the OSError of that save."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _read(self, step: int, abstract_state, with_data: bool):
        folder = self.folder / str(step)
        with _damage_named(folder, self.all_steps()):
            meta = _read_meta(self._manager, step)
            saved = self._manager.item_metadata(step).state.tree
        _check_fits(saved, abstract_state, folder)
        if with_data:
            _check_data_state(meta["data"], folder)
        target = jax.tree.map(_with_sharding, abstract_state)
        arguments = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
        with _damage_named(folder, self.all_steps()):
            return self._manager.restore(step, args=ocp.args.Composite(state=arguments)).state, meta

    def _drop_from(self, step: int) -> None:
        """Removes the checkpoints a rewound run has left behind, and a damaged one at `step` itself."""
        later = [other for other in self.all_steps() if other >= step]
        if later and self._restored is None and not self._good:
            raise ValueError(
                f"{self.folder} holds a checkpoint of step {later[-1]}, not before step {step} now to be saved: "
                "resume from it, or use another workdir"
            )
        for other in later:
            self._manager.delete(other)

    @contextmanager
    def _saving(self):
        """Turns whatever a failed save raises into one OSError, and removes what it left on the disk."""
        try:
            yield
        except Exception as error:
            step, self._pending = self._pending, None
            self._good.discard(step)
            try:
                if jax.process_index() == 0:
                    self._remove_unfinished(step)
                self._manager.reload()
                previous = self.latest_step()
                intact = (
                    "there is none before it" if previous is None else f"the checkpoint of step {previous} is intact"
                )
            except Exception:  # the bucket cannot be reached
                intact = "those before it are as they were"
            way_out = (
                "See that the bucket can be written"
                if in_bucket(self.folder)
                else "Free some space (or repair the folder)"
            )
            raise OSError(
                f"{self.folder / str(step)}: cannot save the checkpoint: {_reason(error)}; {intact}. "
                f"{way_out} and start the same command again"
            ) from error

    def _remove_unfinished(self, step: int) -> None:
        """Removes what a failed save has left."""
        if in_bucket(self.folder):
            leftovers = [] if step in saved_steps(self.folder.parent) else [self.folder / str(step)]
        else:
            leftovers = self.folder.glob("*.orbax-checkpoint-tmp*")
        for leftover in leftovers:
            leftover.rmtree(missing_ok=True)


def load_raw(
    workdir: str | os.PathLike, step: int | None = None, only: Iterable[str] | None = None
) -> tuple[dict, dict]:
    """Reads a checkpoint without knowing its model: for evaluation, on any machine.

    Args:
        workdir: folder of the run; only read.
        step: which checkpoint; the latest by default.
        only: names of the state's top-level fields to read, the rest is left on the disk; all by default.

    Returns:
        (nested dict of numpy arrays, extra). Dataclasses and named tuples come as dicts, tuples as lists.

    Raises:
        FileNotFoundError: no checkpoint (of that step).
        CheckpointError: the checkpoint is damaged.
        ValueError: the state has no field of a name in `only`.
    """
    names = None if only is None else list(only)
    with _opened(workdir, step) as (manager, step, folder, steps):
        with _damage_named(folder, steps):
            meta = _read_meta(manager, step)
            saved = {field: _nested(paths) for field, paths in meta.get("names", {}).items()}
            if names is None or not saved.keys() >= set(names):  # opens every array, which takes a second
                saved = manager.item_metadata(step).state.tree
        names = list(saved) if names is None else names
        for name in names:
            if name not in saved:
                raise ValueError(f"{folder}: the saved state has no field {name!r}; it has {', '.join(saved)}")
        target = {name: saved[name] for name in names}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
        arguments = ocp.args.PyTreeRestore(target, partial_restore=True, restore_args=as_numpy)
        with _damage_named(folder, steps):
            return manager.restore(step, args=ocp.args.Composite(state=arguments)).state, meta["extra"]


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps of the whole checkpoints in a workdir, ascending; [] when there is none. Reads only."""
    folder = _folder(workdir)
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def load_extra(workdir: str | os.PathLike, step: int | None = None) -> dict:
    """Returns the `extra` of a checkpoint (the latest by default), not reading its arrays. Raises like `load_raw`."""
    with _opened(workdir, step) as (manager, step, folder, steps), _damage_named(folder, steps):
        return _read_meta(manager, step)["extra"]


@contextmanager
def _opened(workdir, step: int | None):
    """(manager that only reads, step to read, its folder, steps of all checkpoints)."""
    folder, steps = _folder(workdir), saved_steps(workdir)
    step = _steps_to_try(folder, steps, step)[0]
    manager = _manager(folder, read_only=True, create=False)
    try:
        yield manager, step, folder / str(step), steps
    finally:
        manager.close()


def _folder(workdir) -> epath.Path:
    path = as_path(workdir)
    return (path if in_bucket(path) else epath.Path(path).resolve()) / FOLDER  # orbax wants it absolute


def _manager(folder, **options) -> ocp.CheckpointManager:
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder, item_handlers=handlers, options=ocp.CheckpointManagerOptions(**options))


def _steps_to_try(folder, steps: list[int], step: int | None) -> list[int]:
    """The wanted step (by default the latest) and those before it, latest first."""
    if not steps:
        raise FileNotFoundError(f"{folder}: no checkpoint here; give the workdir of a run that has saved one")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise FileNotFoundError(f"{folder / str(step)}: no such checkpoint; there are those of steps {known}")
    return [known for known in reversed(steps) if step is None or known <= step]


def _read_meta(manager, step: int) -> dict:
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError("written by another version of memo-jax")
    return meta


@contextmanager
def _file_errors(what: str):
    """Names what could not be done in the OSError of a folder that cannot be made or read."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{what}: {_reason(error)}") from error


@contextmanager
def _damage_named(folder, steps: list[int]):
    """Turns whatever reading a damaged checkpoint raises into one error that names the folder and the way out."""
    try:
        yield
    except Exception as error:
        step = int(folder.name)
        earlier = [other for other in steps if other < step]
        way_out = "delete this folder and start again, there is no checkpoint before it"
        if earlier:
            way_out = f"delete this folder to resume from the checkpoint before it, {folder.parent / str(earlier[-1])}"
        what, reason = "the checkpoint is damaged or cut short", _reason(error)
        if in_bucket(folder):
            what, way_out = f"the bucket cannot be read, or {what}", f"if it can be read, {way_out}"
        raise CheckpointError(f"{folder}: {what} ({reason}); {way_out}") from error


def _reason(error: BaseException) -> str:
    """The first line of an exception and of its causes that says something to a person."""
    texts = []
    while error is not None:
        texts.append(f"{error}".strip())
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        error = error.__cause__ or error.__context__
    text = "\n".join(texts)
    for known in ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied"):
        if known.lower() in text.lower():
            return known
    return next((line.strip()[:300] for line in text.splitlines() if line.strip()), type(error).__name__)


def _json_copy(meta: dict) -> dict:
    """A copy as JSON will give it back: what the caller changes later must not reach a save in the background."""
    try:
        return json.loads(json.dumps(meta))
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra and the data iterator's state must be JSON to be saved: {error}") from None


def _names_and_leaves(tree) -> dict:
    """{"a/b/0": leaf} of any pytree; dataclass fields, dict keys and indices are named alike."""

    def name(key):
        return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))

    return {"/".join(map(name, path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _names_in_dicts(state) -> dict[str, list[list[str]]]:
    """{field of the state: paths of its arrays}, of those fields that are nothing but nested dicts."""
    fields, others = {}, set()
    for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
        field = str(getattr(path[0], "name", getattr(path[0], "key", path[0])))
        if len(path) > 1 and all(isinstance(key, jax.tree_util.DictKey) for key in path[1:]):
            fields.setdefault(field, []).append([key.key for key in path[1:]])
        else:
            others.add(field)
    return {field: paths for field, paths in fields.items() if field not in others}


def _nested(paths: list[list[str]]) -> dict:
    """Nested dicts with a leaf at each of the paths."""
    tree = {}
    for *parents, name in paths:
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = 0
    return tree


def _check_fits(saved, abstract_state, folder) -> None:
    """Raises unless the saved arrays have the names, shapes and types of the abstract state."""
    saved = {name: _array_text(leaf) for name, leaf in _names_and_leaves(saved).items()}
    wanted = {name: _array_text(leaf) for name, leaf in _names_and_leaves(abstract_state).items()}
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


def _gathered_data_state(data_iterator) -> dict | None:
    """The iterator states of all processes, so that the one process that writes JSON writes them all."""
    if data_iterator is None:
        return None
    mine = data_iterator.get_state()
    mine = {"base64": base64.b64encode(mine).decode()} if isinstance(mine, bytes) else {"json": mine}
    if jax.process_count() == 1:
        return {"states": [mine]}
    mine = np.frombuffer(json.dumps(_json_copy(mine)).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(mine)))).reshape(-1)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(mine)] = mine
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return {"states": [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]}


def _check_data_state(data: dict | None, folder) -> None:
    if data is None:
        raise ValueError(f"{folder}: the checkpoint holds no data position")
    saved, now = len(data["states"]), jax.process_count()
    if saved == now:
        return
    if any(state != data["states"][0] for state in data["states"]):
        raise ValueError(
            f"{folder}: each of {saved} processes saved a data position of its own, and there are {now} "
            f"now: resume with {saved}"
        )
    warnings.warn(
        f"{folder}: the number of processes was {saved} and is {now} now; the data goes on at the same "
        "position, shared out anew",
        stacklevel=4,
    )


def _data_state(states: list[dict]):
    """The state for this process: its own, or the one that all processes had when their number was another."""
    return _decoded(states[jax.process_index() if len(states) == jax.process_count() else 0])


def _decoded(state: dict):
    return base64.b64decode(state["base64"]) if "base64" in state else state["json"]


def _quiet(record: logging.LogRecord) -> bool:
    """Drops what orbax tells absl's logger; its errors are raised as well, and said in our words."""
    return "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_quiet)
