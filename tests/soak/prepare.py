"""Faults while a dataset is prepared, and damage to what was prepared.

* Write errors: at a random change of the file system, the disk is full, broken or read-only, for this change alone or
  from then on. The command must end in one line that names its output, leave there what was there before, and produce
  the same bytes when it is run again.
* Kills: at a random change of the file system the process is killed. Run again, the command must produce the same
  bytes, whether it was killed once or twice.
* Damage: random bytes of a random file of a dataset, of an archive or of an unfinished dataset change, or it is cut
  short. This must be noticed by what reads it, or be harmless: what is read is what was written.
"""

import contextlib
import functools
import io
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np

import tiny
from memo_jax.data import prepare as prepare_module
from memo_jax.data.archives import TarStream, is_compressed_tar, members, open_member
from memo_jax.data.batches import Utterances
from memo_jax.data.check import check
from memo_jax.data.prepare import prepare
from recording_files import WRITERS, audio_bytes, noise, write_files
from soak.faults import ERRORS, FOR_EVER, KILL, damaged, failing

RECORDINGS, PER_PART = 9, 2


def contents(folder):
    """The bytes of every file of a folder, by name; None where there is no folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else None


class Material:
    """A corpus as a folder and as a compressed tar, the dataset made from them, and an earlier dataset."""

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
        """How many changes to the file system a whole call makes."""
        with failing(self.folder / "counted") as changes:
            self.prepared(self.folder / "counted" / "set", **options)
        shutil.rmtree(self.folder / "counted")
        return changes.count

    def trial(self, number, overwrite):
        """The output in the folder of a trial, which holds the earlier dataset if that is to be overwritten."""
        output = self.folder / f"trial{number}" / "set"
        output.parent.mkdir()
        if overwrite:
            shutil.copytree(self.folder / "earlier", output)
        return output

    def check_again(self, output, overwrite):
        """Runs the command again: the result is that of an undisturbed call, and nothing else is left."""
        was_done = contents(output) == self.whole
        try:
            self.prepared(output, overwrite=overwrite)
        except FileExistsError:
            assert was_done
        assert contents(output) == self.whole
        assert os.listdir(output.parent) == ["set"], os.listdir(output.parent)
        shutil.rmtree(output.parent)


@functools.cache
def material() -> Material:
    """The material that all campaigns of this process share."""
    prepare_module.RECORDINGS_PER_SHARD = PER_PART
    return Material(Path(tempfile.mkdtemp(dir=tiny.temporary_folder())))


def write_errors(trials, rng):
    """Write errors of all kinds; returns how many changes to the file system a call makes, and the reported errors."""
    data = material()
    changes, told = data.changes(), 0
    for number in trials:
        overwrite, code, times = bool(number % 2), rng.choice(ERRORS), rng.choice((1, FOR_EVER))
        output = data.trial(number, overwrite)
        with failing(output.parent, rng.randrange(changes), code, times) as made:
            try:
                data.prepared(output, overwrite=overwrite)
            except OSError as error:
                told += 1
                message = str(error)
                assert str(output) in message and os.strerror(code) in message and "\n" not in message, message
        state, before = contents(output), data.earlier if overwrite else None
        # Where nothing can be written any more, what was moved aside cannot be moved back.
        assert state in (data.whole, before) or times > 1 and state is None, (made.failed, code)
        data.check_again(output, overwrite)
    return {"changes": changes, "told": told}


def kills(trials, rng):
    """Kills in processes of their own; returns how many changes to the file system a call makes, and the kills."""
    data = material()
    changes, killed = data.changes(), 0
    for number in trials:
        overwrite = bool(number % 2)
        output = data.trial(number, overwrite)
        for _ in range(1 + number % 3 // 2):
            at, child = rng.randrange(changes), os.fork()
            if child == 0:
                try:
                    sys.stderr = open(os.devnull, "w")
                    with failing(output.parent, at, KILL):
                        data.prepared(output, overwrite=overwrite)
                finally:
                    os._exit(0)
            killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert contents(output) in (data.whole, None, *([data.earlier] if overwrite else []))
        data.check_again(output, overwrite)
    return {"changes": changes, "killed": killed}


def content_of_dataset(folder):
    """All that readers get from a dataset."""
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


def dataset_damage(trials, rng):
    """Damages a random file of a dataset; returns how often reading, or only a check, noticed it."""
    data = material()
    folder, noticed, by_check = data.folder / "damaged", 0, 0
    shutil.copytree(data.folder / "whole", folder)
    expected, names = content_of_dataset(folder), sorted(data.whole)
    for number in trials:
        name = names[number % len(names)]
        (folder / name).write_bytes(damaged(data.whole[name], rng))
        try:
            assert content_of_dataset(folder) == expected, name
            told = False
        except (OSError, ValueError) as error:
            assert str(folder) in str(error) and "\n" not in str(error), error
            told = True
        problems = check(folder, workers=1)["problems"]
        assert problems or not told, name
        changed = (folder / name).read_bytes() != data.whole[name]
        if changed and "array_record" not in name:
            assert problems, name
        noticed, by_check = noticed + told, by_check + (bool(problems) and not told)
        (folder / name).write_bytes(data.whole[name])
    shutil.rmtree(folder)
    return {"noticed when read": noticed, "by --check only": by_check}


def archive_damage(trials, rng):
    """Damages archives; no member may be lost silently, nor change its content unnoticed."""
    data, noticed = material(), 0
    files = {f"s{number % 3}/{number}.wav": audio_bytes(noise(0.02, number)) for number in range(RECORDINGS)}
    for number in trials:
        suffix = (".zip", ".stored.zip", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar")[number % 6]
        path = WRITERS[suffix](data.folder / f"damaged{suffix}", files)
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
    return {"noticed": noticed}


def unfinished_damage(trials, rng):
    """Damages what a killed run left; the command, run again, must end with the same bytes."""
    data = material()
    output = data.trial("damage", False)
    child = os.fork()
    if child == 0:
        sys.stderr = open(os.devnull, "w")
        prepare_module.Unfinished.publish = lambda *arguments: os._exit(0)
        data.prepared(output)
    os.waitpid(child, 0)
    (output.parent / ".set.lock").unlink(missing_ok=True)
    partial, left = output.parent / ".set.partial", data.folder / "left"
    os.rename(partial, left)
    names = sorted(path.relative_to(left) for path in left.rglob("*.json*") if path.parent == left)
    for number in trials:
        shutil.copytree(left, partial)
        name = names[number % len(names)]
        (partial / name).write_bytes(damaged((partial / name).read_bytes(), rng))
        data.prepared(output)
        assert contents(output) == data.whole, name
        shutil.rmtree(output)
    return {}
