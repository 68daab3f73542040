"""Where recordings are: folders, archives, Kaldi folders, shards, TFDS → each recording's name, speaker and samples."""

import functools
import io
import operator
import os
import re
import subprocess
import sys
from typing import NamedTuple

from memo_jax.audio import AudioError, is_audio_name, read_audio
from memo_jax.data import kaldi, tfds_audio
from memo_jax.data.archives import Extent, is_archive_name, members, stored_bytes

VOXCELEB_SPEAKER = re.compile(r"id\d{5}")
SPEAKER_FILE = ".spk"  # in wespeaker's shards, beside the recording
SHARD_LIST = ".list"


class Recording(NamedTuple):
    """An utterance to be: `name` in the dataset, `speaker` ("" unknown), and where it is.

    It is the file `path` below the folder `root`; or the file `path` in the archive `root`, with its extent there; or,
    with the root "|", the output of the command `path`; or, with a root of `tfds_audio.tfds_input`, its example
    number `path`. With a span, it is what lies between these seconds of it.
    """

    name: str
    speaker: str
    root: str
    path: str
    extent: Extent | None = None
    span: tuple[float, float | None] | None = None

    @property
    def source(self) -> str:
        """Where it is, for people: the path of the file (in an archive, the archive's path before it)."""
        return self.path + " |" if self.root == "|" else os.path.join(self.root, self.path)

    @property
    def file(self) -> str:
        """The file on the disk that must be there for it: itself, or its archive; "" for a command and TFDS."""
        if self.root == "|" or tfds_audio.is_tfds_input(self.root):
            return ""
        return self.source if self.extent is None else self.root


def find_recordings(inputs, exclude=None, run_commands: bool = False):
    """All recordings of the inputs, and [(source, reason)] for the other files there.

    Recordings come in the order of their names; but those of compressed tars and of TFDS, which can only be read one
    after the other, come after all others, tar by tar in their order there. A name is the path relative to the input, with
    "/" (for archives: the path in the archive; `ARCHIVE/FOLDER` as input is a folder in it); the speaker is its first
    part, or "" when it has one part only. Where a path is as VoxCeleb has it, …/idXXXXX/video/utterance, the name is
    these three parts whatever the input, and the speaker idXXXXX. In Kaldi folders and wespeaker's shards, names and
    speakers are those given there.

    Args:
      inputs: paths, see `input_kind`.
      exclude: folder not to enter.
      run_commands: whether commands in a wav.scp may be run.

    Raises:
      FileNotFoundError: no such input. OSError: a folder or file cannot be read.
      ValueError: two recordings would have one name, an input is of no known kind, an archive is damaged or cut short,
        or a Kaldi file is wrong.
    """
    found, left_out = [], []
    for path in map(os.fspath, inputs):
        kind = input_kind(path)
        if kind == "dataset of TFDS":
            found += _of_tfds(path)
        elif kind == "Kaldi folder":
            found += _of_kaldi(path, run_commands)
        elif kind == "folder":
            _add_folder(path, exclude, found, left_out)
        else:
            tars = _listed_shards(path) if kind == "list of shards" else [_split_archive(path)]
            for archive, inside in tars:
                _add_archive(archive, inside, found, left_out)
    found.sort(key=operator.itemgetter(0))
    for first, second in zip(found, found[1:]):
        if first.name == second.name:
            raise ValueError(
                f"{first.source} and {second.source} would both be called {first.name}: prepare them into "
                "two datasets, or give a folder above both"
            )
    in_order = [(item.root, place, item) for item in found if (place := _place(item)) is not None]
    if in_order:
        found = [item for item in found if _place(item) is None] + [item for *_, item in sorted(in_order)]
    return found, sorted(left_out)


def input_kind(path) -> str:
    """What an input is: "folder", "Kaldi folder", "archive", "list of shards", "dataset of TFDS".

    Raises:
      FileNotFoundError: nothing there. ValueError: a file of another kind.
    """
    path = os.fspath(path)
    if tfds_audio.is_tfds_input(path):
        return "dataset of TFDS"
    if os.path.isdir(path):
        return "Kaldi folder" if kaldi.is_kaldi_folder(path) else "folder"
    if os.path.isfile(path) and path.endswith(SHARD_LIST):
        return "list of shards"
    if _split_archive(path):
        return "archive"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such folder of recordings, nor archive")
    raise ValueError(f"{path}: expected a folder, a zip, a tar (also compressed) or a {SHARD_LIST} of shards")


def is_streamed(recording: Recording) -> bool:
    """Whether it lies in a compressed tar, and so has no place of its own."""
    return recording.extent is not None and recording.extent.offset < 0


def _place(recording):
    """The number of a recording that is best read after the one before it, None of others."""
    if tfds_audio.is_tfds_input(recording.root):
        return int(recording.path)
    return recording.extent.number if is_streamed(recording) else None


def read_recording(recording: Recording, *, max_seconds: float = 4 * 3600, spool: tuple[str, int] | None = None):
    """The samples of a recording, int16 [L] at 16 kHz; `spool` is the file and offset where a streamed one was copied.

    Raises:
      AudioError: it cannot be used; the message names its source.
    """
    source, (start, end) = recording.source, recording.span or (0.0, None)
    if tfds_audio.is_tfds_input(recording.root):
        return tfds_audio.read_example(recording.root, int(recording.path), max_seconds=max_seconds)
    if recording.extent is None and recording.root != "|":
        return read_audio(source, max_seconds=max_seconds, start=start, end=end)
    try:
        if recording.root == "|":
            data = _output(recording.path)
        elif spool:
            data = stored_bytes(spool[0], recording.extent._replace(offset=spool[1]))
        else:
            data = stored_bytes(recording.root, recording.extent)
    except OSError as error:
        raise AudioError(source, f"cannot be opened: {error.strerror}") from None
    except ValueError as error:
        raise AudioError(source, str(error)) from None
    file = io.BytesIO(data)
    file.name = source
    return read_audio(file, max_seconds=max_seconds, start=start, end=end)


def files_below(folder, exclude=None):
    """Yields the path of every file below a folder, sorted folder by folder; follows links, but enters none twice.

    Raises:
      FileNotFoundError: no such folder. OSError: a folder in it cannot be read.
    """
    return (os.path.join(parent, file) for parent, files in _folders_below(folder, exclude) for file in files)


def _folders_below(folder, exclude):
    """Yields (folder, sorted names of its files) for it and all folders below."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder of recordings")
    seen = set()
    excluded = os.path.realpath(exclude) if exclude else None

    def fail(error):
        raise error

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in seen or real == excluded:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield parent, sorted(files)


def _add_folder(folder, exclude, found, left_out):
    for parent, files in _folders_below(folder, exclude):
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        before = "" if below == "." else below + "/"
        root = folder
        absolute = os.path.abspath(parent)
        if voxceleb := _voxceleb_part(absolute.replace(os.sep, "/") + "/"):
            before, shown = voxceleb, parent if parent.endswith(voxceleb[:-1]) else absolute
            root = sys.intern(os.path.dirname(os.path.dirname(shown)))
        speaker = _speaker(before)
        for file in files:
            name = before + file
            if problem := _name_problem(name):
                left_out.append((os.path.join(parent, file), problem))
            else:
                found.append(Recording(name, speaker, root, name))


def _add_archive(archive, inside, found, left_out):
    """Adds what lies in an archive below the folder `inside` of it."""
    speakers, before, start = {}, inside and inside + "/", len(found)
    for member in members(archive, contents=SPEAKER_FILE):
        if not member.name.startswith(before):
            continue
        name = member.name[len(before) :]
        if member.content:
            speakers[name[: -len(SPEAKER_FILE)]] = member.content.decode(errors="replace").strip()
        elif problem := _name_problem(name) or member.problem:
            left_out.append((os.path.join(archive, member.name), problem))
        else:
            if voxceleb := _voxceleb_part(name):
                name = voxceleb + os.path.basename(name)
            found.append(Recording(name, _speaker(name), archive, member.name, member.extent))
    if speakers:  # a shard of wespeaker: key.wav and key.spk
        for index in range(start, len(found)):
            key = os.path.splitext(found[index].path[len(before) :])[0]
            found[index] = found[index]._replace(name=key, speaker=speakers.get(key, ""))


def _of_kaldi(folder, run_commands):
    for item in kaldi.kaldi_utterances(folder, run_commands):
        root, path = ("|", item.source) if item.is_command else os.path.split(item.source)
        yield Recording(item.name, item.speaker, sys.intern(root), path, None, item.span)


def _of_tfds(text):
    for number, (name, speaker) in enumerate(tfds_audio.utterance_names(text)):
        yield Recording(name, sys.intern(speaker), text, str(number))


def _listed_shards(path):
    """[(archive, "")] of the lines of a list; a path is relative to the current folder, or else to the list's."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        lines = [line.strip() for line in file if line.strip()]
    for number, line in enumerate(lines, 1):
        beside = os.path.join(os.path.dirname(path), line)
        shard = line if os.path.exists(line) or not os.path.exists(beside) else beside
        if not is_archive_name(shard):
            raise ValueError(f"{path}, line {number}: not a tar: {line[:200]!r}")
        if not os.path.isfile(shard):
            raise FileNotFoundError(f"{path}, line {number}: {line}: no such file")
        yield shard, ""


def _split_archive(path):
    """(archive, folder in it) of ARCHIVE or ARCHIVE/FOLDER; None when no part of the path is an archive."""
    head, inside = path.rstrip("/"), ""
    while head and not os.path.exists(head):
        head, tail = os.path.split(head)
        inside = f"{tail}/{inside}".rstrip("/")
    return (head, inside) if os.path.isfile(head) and is_archive_name(head) else None


def _voxceleb_part(path):
    """ "idXXXXX/video/" of …/idXXXXX/video/utterance, None of any other path."""
    *_, speaker, video, _ = ("", "", *path.split("/"))
    return f"{speaker}/{video}/" if VOXCELEB_SPEAKER.fullmatch(speaker) else None


def _speaker(name):
    return sys.intern(name.split("/")[0] if "/" in name else "")


@functools.lru_cache(maxsize=1)  # segments of one recording follow one another
def _output(command):
    done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"command failed: status {done.returncode}{': ' + lines[-1] if lines else ''}")
    return done.stdout


def _name_problem(name):
    if not is_audio_name(name):
        return f"not a recording: extension {os.path.splitext(name)[1].lower() or 'missing'}"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "odd name: not valid UTF-8"
    return "odd name: a tab or a line break" if set(name) & set("\t\r\n") else None
