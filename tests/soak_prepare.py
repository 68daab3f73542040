"""Faults while a dataset is prepared, and damage to what was prepared: `python tests/soak_prepare.py COUNT SEED`.

* Write errors: at a random change of the file system, the disk is full, broken or read-only. The command must end in
  one line that names its output, leave there what was there before, and give the same bytes when it is given again.
* Kills: at a random change of the file system the process ends at once. Given again, the command must give the same
  bytes, whether it was killed once or twice.
* Damage: random bytes of a random file of a dataset, of an archive or of an unfinished dataset change, or it is cut
  short. This must be noticed by what reads it, or be harmless: what is read is what was written.

Prints counts as JSON; ends with the traceback of the first fault that is handled in another way.
tests/data/test_faults.py runs a few of each.
"""

import builtins
import contextlib
import errno
import functools
import io
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from memo_jax.data import prepare as prepare_module
from memo_jax.data.archives import TarStream, is_compressed_tar, members, open_member
from memo_jax.data.batches import Utterances
from memo_jax.data.check import check
from memo_jax.data.prepare import prepare
from recording_files import WRITERS, audio_bytes, noise, write_files

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "ftruncate", "open")
RECORDINGS, PER_PART = 9, 2


class Faulty:
    """An open file each of whose writes may fail."""

    def __init__(self, file, change):
        self._file, self._change = file, change

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __iter__(self):
        return iter(self._file)

    def write(self, data):
        self._change("write")
        return self._file.write(data)

    def close(self):
        if not self._file.closed:
            try:
                self._change("close")
            finally:
                self._file.close()


class FaultyShard:
    """A writer of array_record that fails as it does on a full disk, with a RuntimeError."""

    made = array_record_module.ArrayRecordWriter

    def __init__(self, path, options, change):
        self._path, self._change = path, change
        self._writer = self.made(path, options)

    def write(self, record):
        self._fail("write")
        self._writer.write(record)

    def close(self):
        self._fail("close")
        self._writer.close()

    def _fail(self, call):
        try:
            self._change(f"shard {call}")
        except OSError as error:
            raise RuntimeError(f"{call}() failed: {error.strerror}; writing {self._path}") from None


@contextlib.contextmanager
def fault_at(number, act):
    """Within it, change number `number` of the file system (from 0) calls `act` in place of being made.

    Yields a list to which the name of each change is added.
    """
    changes = []

    def change(name):
        changes.append(name)
        if len(changes) == number + 1:
            act()

    def changing(name, function):
        @functools.wraps(function)
        def changed(*arguments, **options):
            is_reading = name == "open" and not (arguments[1:] and arguments[1] & (os.O_WRONLY | os.O_RDWR))
            if not is_reading:
                change(name)
            return function(*arguments, **options)

        return changed

    def opening(file, mode="r", *arguments, **options):
        if not set(mode) & set("wax+"):
            return opened(file, mode, *arguments, **options)
        if not isinstance(file, int):
            change("create")
        return Faulty(opened(file, mode, *arguments, **options), change)

    opened, functions = builtins.open, {name: getattr(os, name) for name in CHANGES}
    try:
        builtins.open = io.open = opening
        for name, function in functions.items():
            setattr(os, name, changing(name, function))
        array_record_module.ArrayRecordWriter = functools.partial(FaultyShard, change=change)
        yield changes
    finally:
        builtins.open = io.open = opened
        for name, function in functions.items():
            setattr(os, name, function)
        array_record_module.ArrayRecordWriter = FaultyShard.made


def contents(folder):
    """The bytes of every file of a folder, by name; None where there is no folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else None


class Material:
    """A corpus as a folder and as a compressed tar, the datasets that come of it, and an earlier dataset."""

    def __init__(self, folder):
        self.folder = folder
        wave = {f"s{number % 3}/{number}.wav": audio_bytes(noise(0.5, number)) for number in range(RECORDINGS)}
        wave["s0/cut.wav"] = wave["s0/0.wav"][:5000]
        self.inputs = [
            write_files(folder / "in", wave),
            WRITERS[".tar.gz"](folder / "in.tar.gz", {name.replace("s", "t"): data for name, data in wave.items()}),
        ]
        self.prepared(folder / "whole")
        prepare(folder / "in" / "s1", folder / "earlier", workers=1)
        self.whole, self.earlier = contents(folder / "whole"), contents(folder / "earlier")

    def prepared(self, output, **options):
        return prepare(self.inputs, output, workers=1, **options)

    def changes(self, **options):
        """How many changes of the file system a whole call makes."""
        with fault_at(-2, None) as changes:
            self.prepared(self.folder / "counted", **options)
        shutil.rmtree(self.folder / "counted")
        return len(changes)

    def trial(self, number, overwrite):
        """The folder of a trial and the output in it, where the earlier dataset lies if it is to be overwritten."""
        output = self.folder / f"trial{number}" / "set"
        output.parent.mkdir()
        if overwrite:
            shutil.copytree(self.folder / "earlier", output)
        return output

    def check_again(self, output, overwrite):
        """Gives the command again: the result is that of an undisturbed call, and nothing else is left."""
        was_done = contents(output) == self.whole
        try:
            self.prepared(output, overwrite=overwrite)
        except FileExistsError:
            assert was_done
        assert contents(output) == self.whole
        assert os.listdir(output.parent) == ["set"], os.listdir(output.parent)
        shutil.rmtree(output.parent)


def write_errors(material, count, rng):
    """Runs as many trials; returns how many changes of the file system a call makes, and how many errors were told."""
    changes, told = material.changes(), 0
    for number in range(count):
        overwrite, code = bool(number % 2), rng.choice(ERRORS)
        output = material.trial(number, overwrite)

        def fail(code=code):
            raise OSError(code, os.strerror(code))

        at = rng.randrange(changes)
        try:
            with fault_at(at, fail) as made:
                material.prepared(output, overwrite=overwrite)
        except OSError as error:
            told += 1
            message = str(error)
            assert str(output) in message and os.strerror(code) in message and "\n" not in message, (made[-1], message)
        state = contents(output)
        assert state == material.whole or state == (material.earlier if overwrite else None), made[at]
        material.check_again(output, overwrite)
    return {"changes": changes, "trials": count, "told": told}


def kills(material, count, rng):
    """Runs as many trials, in processes of their own; returns how many were killed."""
    changes, killed = material.changes(), 0
    for number in range(count):
        overwrite = bool(number % 2)
        output = material.trial(number, overwrite)
        for _ in range(1 + number % 3 // 2):
            at, child = rng.randrange(changes), os.fork()
            if child == 0:
                try:
                    sys.stderr = open(os.devnull, "w")
                    with fault_at(at, lambda: os._exit(9)):
                        material.prepared(output, overwrite=overwrite)
                finally:
                    os._exit(0)
            killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        state = contents(output)
        assert state in (material.whole, None, *([material.earlier] if overwrite else []))
        material.check_again(output, overwrite)
    return {"changes": changes, "trials": count, "killed": killed}


def damaged(content, rng):
    """The bytes of a file with a flipped bit, other bytes, zeros, or without its end."""
    kind, at = rng.choice(("bit", "bytes", "zeros", "cut")), rng.randrange(len(content))
    if kind == "cut":
        return content[:at]
    changed = bytearray(content)
    size = {"bit": 1, "bytes": rng.randint(1, 9), "zeros": rng.randint(1, 600)}[kind]
    for place in range(at, min(at + size, len(content))):
        changed[place] = {"bit": changed[place] ^ 1 << rng.randrange(8), "zeros": 0}.get(kind, rng.randrange(256))
    return bytes(changed)


def content_of_dataset(folder):
    """All that a dataset tells its readers."""
    utterances = Utterances(folder)
    return [np.concatenate(list(utterances)).tobytes(), utterances.names, utterances.speakers, utterances.fingerprint]


def content_of_archive(path):
    """The name and bytes of every member that has no problem, and how many have one."""
    found, listed = {}, list(members(path))
    if is_compressed_tar(path):
        stream = TarStream(path)
    for member in listed:
        if member.extent and is_compressed_tar(path):
            file = io.BytesIO()
            stream.copy(member.extent, file)
            found[member.name] = file.getvalue()
        elif member.extent:
            with contextlib.suppress(ValueError), open_member(path, member.extent) as file:
                found[member.name] = file.read()
    return found, len(listed)


def dataset_damage(material, count, rng):
    """Damages a random file of a dataset, as many times; returns how often reading, or else only a check, noticed."""
    folder, noticed, by_check = material.folder / "damaged", 0, 0
    shutil.copytree(material.folder / "whole", folder)
    expected, names = content_of_dataset(folder), sorted(material.whole)
    for number in range(count):
        name = names[number % len(names)]
        (folder / name).write_bytes(damaged(material.whole[name], rng))
        try:
            assert content_of_dataset(folder) == expected, name
            told = False
        except (OSError, ValueError) as error:
            assert str(folder) in str(error) and "\n" not in str(error), error
            told = True
        problems = check(folder, workers=1)["problems"]
        assert problems or not told, name
        changed = (folder / name).read_bytes() != material.whole[name]
        if changed and "array_record" not in name:
            assert problems, name
        noticed, by_check = noticed + told, by_check + (bool(problems) and not told)
        (folder / name).write_bytes(material.whole[name])
    shutil.rmtree(folder)
    return {"trials": count, "noticed when read": noticed, "by --check only": by_check}


def archive_damage(material, count, rng):
    """Damages archives, as many times; no member may be lost without a word, nor have another content unnoticed."""
    noticed = 0
    files = {f"s{number % 3}/{number}.wav": audio_bytes(noise(0.02, number)) for number in range(RECORDINGS)}
    for number in range(count):
        suffix = (".zip", ".stored.zip", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar")[number % 6]
        path = WRITERS[suffix](material.folder / f"damaged{suffix}", files)
        content = path.read_bytes()
        changed = damaged(content, rng)
        if suffix == ".tar":  # which has checksums of its headers only
            at = content.index(rng.choice(list(files)).encode())
            changed = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        path.write_bytes(changed)
        try:
            found, listed = content_of_archive(path)
            assert listed == len(files) and found.items() <= files.items(), suffix
            noticed += found != files
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
            noticed += 1
    return {"trials": count, "noticed": noticed}


def unfinished_damage(material, count, rng):
    """Damages what an ended run left, as many times; the command given again must end with the same bytes."""
    output = material.trial("damage", False)
    child = os.fork()
    if child == 0:
        sys.stderr = open(os.devnull, "w")
        prepare_module.Unfinished.publish = lambda *arguments: os._exit(0)
        material.prepared(output)
    os.waitpid(child, 0)
    (output.parent / ".set.lock").unlink(missing_ok=True)
    partial, left = output.parent / ".set.partial", material.folder / "left"
    os.rename(partial, left)
    names = sorted(path.relative_to(left) for path in left.rglob("*.json*") if path.parent == left)
    for number in range(count):
        shutil.copytree(left, partial)
        name = names[number % len(names)]
        (partial / name).write_bytes(damaged((partial / name).read_bytes(), rng))
        material.prepared(output)
        assert contents(output) == material.whole, name
        shutil.rmtree(output)
    return {"trials": count}


def main(count, seed):
    prepare_module.RECORDINGS_PER_SHARD = PER_PART
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silence:
        with contextlib.redirect_stderr(silence):
            material, report = Material(Path(folder)), {}
            for campaign, share in (
                (write_errors, 1),
                (kills, 1),
                (dataset_damage, 8),
                (archive_damage, 12),
                (unfinished_damage, 1),
            ):
                report[campaign.__name__] = campaign(
                    material, count * share, random.Random(f"{campaign.__name__} {seed}")
                )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
