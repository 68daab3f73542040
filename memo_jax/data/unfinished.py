"""A dataset that is being prepared: the plan, and the parts that are done, in a folder beside it until all are.

The folder `.NAME.partial` holds `plan.jsonl` (written whole or not at all), the shards in `dataset/`, and, once the
shards of a part are complete on the disk, `part-N.json` with what is in them. So whatever ends a run, the parts that it
finished are there for the next, and nothing else is.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

from memo_jax.data.archives import Extent
from memo_jax.data.recordings import Recording

PLAN = "plan.jsonl"


class Unfinished:
    """The folder of the unfinished dataset `output`, of which at most one process at a time is the owner.

    Raises:
      OSError: the folder cannot be made, or another process prepares this dataset at the moment.
    """

    def __init__(self, output: Path):
        self.folder = output.parent / f".{output.name}.partial"
        self.dataset = self.folder / "dataset"
        self._lock = None

    def claim(self) -> None:
        """Makes the folder where it is missing, and this process its owner."""
        try:
            self.dataset.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"cannot write to the folder {self.folder.parent}: {error.strerror}") from None
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise BlockingIOError(
                f"another process is preparing this dataset in {self.folder}: wait for it, or end it"
            ) from None
        except OSError:  # a file system that has no locks
            pass
        self._lock = lock

    def release(self) -> None:
        """Ends the ownership, if this process has it; a folder in which nothing is complete goes with it."""
        if self._lock is not None:
            if not self.has_parts():
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Removes the folder, which is this process's, with all that is in it, and ends the ownership."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def has_parts(self) -> bool:
        """Whether any part is complete."""
        return any(self.folder.glob("part-*.json"))

    def header(self) -> dict | None:
        """What `begin` was told, but for recordings and left_out; None where nothing was begun."""
        try:
            with open(self.folder / PLAN, encoding="utf-8") as file:
                return json.loads(file.readline())
        except FileNotFoundError:
            return None

    def begin(self, header: dict, recordings: list[Recording], left_out: list[tuple[str, str]]) -> None:
        """Writes the plan: all that a later process needs to go on."""
        lines = (
            json.dumps(line, separators=(",", ":")) + "\n"
            for lines in ([header], recordings, left_out)
            for line in lines
        )
        _write_whole(self.folder / PLAN, lines)

    def plan(self) -> tuple[list[Recording], list[tuple[str, str]]]:
        """(recordings, left_out) as given to `begin`."""
        recordings, left_out = [], []
        with open(self.folder / PLAN, encoding="utf-8") as file:
            next(file)
            for line in file:
                fields = json.loads(line)
                if len(fields) == 2:
                    left_out.append(tuple(fields))
                    continue
                name, speaker, root, path, extent, span = fields
                recordings.append(
                    Recording(  # strings that are equal shared, as when they were found
                        name,
                        sys.intern(speaker),
                        sys.intern(root),
                        name if path == name else path,
                        extent and Extent(*extent),
                        span and tuple(span),
                    )
                )
        return recordings, left_out

    def parts_done(self, parts: int) -> list[bool]:
        """Which parts are complete; whatever else an ended process left is removed."""
        found = {number: self.part(number) for number in range(parts) if (self.folder / _marker(number)).is_file()}
        if len(found) == parts:
            self._undo_names([shard for number in range(parts) for shard in found[number]["shards"]])
        there = set(os.listdir(self.dataset))
        found = {number: part for number, part in found.items() if there >= {shard["path"] for shard in part["shards"]}}
        for name in there - {shard["path"] for part in found.values() for shard in part["shards"]}:
            os.unlink(self.dataset / name)
        for name in set(os.listdir(self.folder)) - {PLAN, "dataset"} - set(map(_marker, found)):
            os.unlink(self.folder / name)
        return [number in found for number in range(parts)]

    def part(self, number: int) -> dict:
        """What was given to `finish_part`."""
        with open(self.folder / _marker(number), encoding="utf-8") as file:
            return json.load(file)

    def _undo_names(self, shards):
        """Gives shards back the names of their parts, where a process was ended while it gave them the final ones."""
        for number, shard in enumerate(shards):
            for named in self.dataset.glob(f"*.array_record-{number:05d}-of-*"):
                os.rename(named, self.dataset / shard["path"])


def finish_part(folder: Path, number: int, part: dict) -> None:
    """Declares a part complete: `part` is JSON, with its "shards" (paths in the folder's dataset/) closed."""
    for shard in part["shards"]:
        descriptor = os.open(folder / "dataset" / shard["path"], os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _write_whole(folder / _marker(number), [json.dumps(part)])


@contextlib.contextmanager
def explained_write_errors(unfinished, output):
    """Turns any error of the disk into one that names the output; recordings that cannot be read do not come here."""
    try:
        yield
    except OSError as error:
        kept = (
            "what is done is kept, and the same command goes on from there"
            if unfinished.has_parts()
            else "nothing was left there"
        )
        raise OSError(f"cannot write {output}: {error.strerror or error}; {kept}") from error


def _marker(number):
    return f"part-{number:05d}.json"


def _write_whole(path, lines):
    """Writes a file so that it is there whole or not at all."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
