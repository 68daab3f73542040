"""A dataset that is being prepared: the plan, and the parts that are done, in a folder beside it until all are.

The folder `.NAME.partial` holds `plan.jsonl`, the shards in `dataset/` and, once the shards of a part are complete on
disk, `part-N.json` with what is in them. Each of these files appears whole or not at all and ends with its checksum.
Whatever ends a run, the parts that it finished are therefore there for the next, and nothing else is.

The finished `dataset/` is renamed to the output in one step, after `finished.json`, which tells a run that is started
again after that step that nothing is left to do. An earlier dataset that is overwritten is kept in `replaced/` until
then, and goes back if the run ends between the two steps.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from memo_jax.audio.error import NOT_OF_THE_FILE
from memo_jax.data.archives import Extent
from memo_jax.data.recordings import Kind, Recording
from memo_jax.data.records import CHECKSUMS
from memo_jax.files import flush_to_disk, replacing

PLAN, FINISHED = "plan.jsonl", "finished.json"


class Unfinished:
    """The folder of the unfinished dataset `output`, which the caller has locked.

    Attributes:
      folder, dataset: paths of the folder and of the dataset in it.
    """

    def __init__(self, output: Path):
        self._output = output
        self.folder = output.parent / f".{output.name}.partial"
        self.dataset, self._replaced = self.folder / "dataset", self.folder / "replaced"
        self._put_back()
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # empty, where a process was killed just before it removed the folder itself

    def begin(self, header: dict, recordings: list[Recording], left_out: list[tuple[str, str]]) -> None:
        """Makes the folder and writes the plan: all that a later process needs to resume."""
        self.dataset.mkdir(parents=True, exist_ok=True)
        lines = (line for lines in ([header], recordings, left_out) for line in lines)
        _write_checked(self.folder / PLAN, (json.dumps(line, separators=(",", ":")) for line in lines))

    def plan(self) -> tuple[dict, list[Recording], list[tuple[str, str]]] | None:
        """Returns what was given to `begin`, or None if nothing was begun or the plan is damaged."""
        try:
            header, *lines = map(json.loads, _checked_lines(self.folder / PLAN))
            left_out = [tuple(fields) for fields in lines if len(fields) == 2]
            recordings = [_recording(fields) for fields in lines if len(fields) != 2]
            if not header["run_commands"] and any(item.kind is Kind.COMMAND for item in recordings):
                return None
            return header, recordings, left_out
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def parts_done(self, parts: int) -> list[bool]:
        """Returns which parts are complete, and removes whatever else an ended process left."""
        self.dataset.mkdir(exist_ok=True)
        found = {}
        for number in range(parts):
            with contextlib.suppress(FileNotFoundError, ValueError):
                found[number] = self.part(number)
        if len(found) == parts:
            self._undo_names([shard for number in range(parts) for shard in found[number]["shards"]])
        there = set(os.listdir(self.dataset))
        found = {number: part for number, part in found.items() if there >= {shard["path"] for shard in part["shards"]}}
        for name in there - {shard["path"] for part in found.values() for shard in part["shards"]}:
            os.unlink(self.dataset / name)
        kept = {PLAN, self.dataset.name, self._replaced.name, *map(_marker, found)}
        for name in set(os.listdir(self.folder)) - kept:
            os.unlink(self.folder / name)
        return [number in found for number in range(parts)]

    def part(self, number: int) -> dict:
        """Returns what was given to `finish_part`; ValueError if its file is damaged."""
        (line,) = _checked_lines(self.folder / _marker(number))
        return json.loads(line)

    def has_parts(self) -> bool:
        """Returns whether any part is complete."""
        return any(self.folder.glob("part-*.json"))

    def publish(self, command: dict, report: dict, overwrite: bool) -> None:
        """Puts the dataset in its place, once it is safely on disk.

        Args:
          command: JSON that identifies the running command.
          report: JSON that `finished` returns.
          overwrite: whether a dataset that is there is replaced.

        Raises:
          FileExistsError: something else has appeared there; the finished dataset is kept.
        """
        for path in self.dataset.iterdir():
            flush_to_disk(path)
        flush_to_disk(self.dataset)
        finished = {"command": command, "report": report, "checksums": _digest(self.dataset)}
        _write_checked(self.folder / FINISHED, [json.dumps(finished)])
        if os.path.lexists(self._output) and not is_empty_folder(self._output):
            if not overwrite or not is_dataset(self._output):
                raise FileExistsError(
                    f"{self._output} appeared while it was being prepared, and is not replaced: move it away and "
                    "repeat the command, which has little left to do"
                )
            shutil.rmtree(self._replaced, ignore_errors=True)
            os.rename(self._output, self._replaced)
        try:
            os.rename(self.dataset, self._output)
        except OSError:
            self._put_back()
            raise
        flush_to_disk(self._output.parent)

    def finished(self, command: dict) -> dict | None:
        """Returns the report if the same command has put the dataset in its place and was interrupted only then."""
        if self.dataset.exists():
            return None
        try:
            (line,) = _checked_lines(self.folder / FINISHED)
            finished = json.loads(line)
            if finished["command"] != command or finished["checksums"] != _digest(self._output):
                return None
        except (OSError, ValueError, KeyError):
            return None
        return finished["report"]

    def discard(self) -> None:
        """Removes the folder with all that is in it."""
        if self.folder.is_dir():
            for name in os.listdir(self.folder):
                if name != FINISHED:  # until nothing else is left
                    path = self.folder / name
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _put_back(self):
        """Renames an earlier dataset to the output, if a run ended before it put the new one there."""
        if self._replaced.is_dir() and not os.path.lexists(self._output):
            os.rename(self._replaced, self._output)

    def _undo_names(self, shards):
        """Gives shards the names of their parts again, if a process was killed while giving them the final ones."""
        for number, shard in enumerate(shards):
            for named in self.dataset.glob(f"*.array_record-{number:05d}-of-*"):
                os.rename(named, self.dataset / shard["path"])


def finish_part(folder: Path, number: int, part: dict) -> None:
    """Declares a part complete: `part` is JSON, with its "shards" (paths in the folder's dataset/) closed."""
    for shard in part["shards"]:
        flush_to_disk(folder / "dataset" / shard["path"])
    _write_checked(folder / _marker(number), [json.dumps(part)])


@contextlib.contextmanager
def explained_write_errors(unfinished: Unfinished, output: Path) -> Iterator[None]:
    """Turns any error of the disk or the machine into one that names the output, and says what is kept of it."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        kept = "nothing was kept"
        if unfinished.has_parts():
            kept = "what is done is kept, and the same command continues from there"
        what = "prepare" if error.errno in NOT_OF_THE_FILE and error.errno != errno.ENOSPC else "write"
        place = f", there or in {tempfile.gettempdir()}" if error.errno == errno.ENOSPC else ""
        raise OSError(f"cannot {what} {output}: {error.strerror or error}{place}; {kept}") from error


def is_dataset(path: Path) -> bool:
    """Returns whether a folder holds a dataset, of whatever version."""
    return (path / "dataset_info.json").is_file()


def is_empty_folder(path: Path) -> bool:
    """Returns whether a path is a folder without anything in it."""
    return path.is_dir() and not path.is_symlink() and not os.listdir(path)


def _recording(fields):
    """A recording of the plan; equal strings are shared, as they were when it was found."""
    name, speaker, kind, root, path, extent, span, channel = fields
    return Recording(
        name,
        sys.intern(speaker),
        Kind(kind),
        sys.intern(root),
        name if path == name else path,
        extent and Extent(*extent),
        span and tuple(span),
        channel,
    )


def _marker(number):
    return f"part-{number:05d}.json"


def _digest(dataset):
    return hashlib.sha256((dataset / CHECKSUMS).read_bytes()).hexdigest()


def _write_checked(path: Path, lines: Iterable[str]) -> None:
    """Writes lines, and a last one with their checksum, whole or not at all."""
    digest = hashlib.blake2b(digest_size=16)
    with replacing(path, fsync=True) as partial, open(partial, "w", encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(line + "\n")
            digest.update(line.encode())
        file.write(digest.hexdigest() + "\n")


def _checked_lines(path: Path) -> Iterator[str]:
    """Yields the lines that `_write_checked` wrote; at their end, ValueError if they are not what was written."""
    digest, line = hashlib.blake2b(digest_size=16), None
    with open(path, encoding="utf-8", newline="\n") as file:
        for following in file:
            if line is not None:
                yield line
                digest.update(line.encode())
            line = following.removesuffix("\n")
    if line != digest.hexdigest():
        raise ValueError(f"{path} is damaged")
