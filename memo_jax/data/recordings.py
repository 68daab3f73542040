"""What an input holds: folders, archives, Kaldi folders, shards, TFDS → each recording's name, speaker and samples.

What kind of source a recording has is a field of its own (`Kind`) that only the reader of that kind of input sets. No
name, path or line of a file can turn a recording into a command or into another kind of source.

Every file of an input is either a recording or in the list of what was left out. Left out are files without the
extension of a recording, hidden files (a name, or the name of a folder below the input, that begins with a dot, such as
the `._x.wav` that macOS writes beside x.wav), names that are not UTF-8 or contain a tab or line break (lists and
manifests could not hold them), and members of an archive that cannot be read.
"""

import contextlib
import enum
import functools
import io
import operator
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from memo_jax.audio import AudioError, is_audio_name, read_audio
from memo_jax.audio.error import NOT_OF_THE_FILE
from memo_jax.data import kaldi, tfds_audio
from memo_jax.data.archives import LARGEST_MEMBER, Extent, is_archive_name, is_compressed_tar, members, open_member
from memo_jax.data.tfds_audio import TfdsInput
from memo_jax.files import is_text

VOXCELEB_SPEAKER = re.compile(r"id\d{5}")
SPEAKER_FILE = ".spk"  # in wespeaker's shards, beside the recording
SHARD_LIST = ".list"
MACOS_FOLDER = "__MACOSX"  # of hidden files, in archives that macOS made
UNLISTABLE = frozenset("\t\r\n\0")  # characters that a name in a manifest or a list cannot have


class Kind(enum.StrEnum):
    """Where the bytes of a recording come from, and what `Recording.root` and `Recording.path` are."""

    FILE = "file"  # the file `path` below the folder `root`
    MEMBER = "member"  # the file `path` in the archive `root`, at `extent`
    STREAMED = "streamed"  # the same in a compressed tar, where nothing has a place of its own
    ARK = "ark"  # the wav that begins `extent.offset` bytes into the file `path` below `root`
    COMMAND = "command"  # the output of the shell command `path`
    EXAMPLE = "example"  # example number `path` of the TFDS dataset `root` (`TfdsInput.text`)


class Recording(NamedTuple):
    """An utterance of the dataset to be made: its `name` there, its `speaker` ("" if unknown), and where it is.

    Of the source, `span` is the part in seconds (None: all; its end None: to the end) and `channel` the number of the
    channel from 1 (None: the caller's choice).
    """

    name: str
    speaker: str
    kind: Kind
    root: str
    path: str
    extent: Extent | None = None
    span: tuple[float, float | None] | None = None
    channel: int | None = None

    @property
    def source(self) -> str:
        """Where it is, for people: the path of the file, after that of its archive."""
        if self.kind is Kind.COMMAND:
            return f"{self.path} |"
        if self.kind is Kind.ARK:
            return f"{os.path.join(self.root, self.path)}:{self.extent.offset}"
        return os.path.join(self.root, self.path)

    @property
    def archive(self) -> str | None:
        """The archive that it lies in, if it does."""
        return self.root if self.kind in (Kind.MEMBER, Kind.STREAMED) else None


def find_recordings(
    inputs: Sequence[str | os.PathLike | TfdsInput],
    exclude: str | os.PathLike | None = None,
    run_commands: bool = False,
) -> tuple[list[Recording], list[tuple[str, str]]]:
    """Returns all recordings of the inputs, and (source, reason) of every other file there.

    Recordings come in the order of their names; but those of compressed tars and of TFDS, which can only be read one
    after another, come last, input by input in their order there. A name is the path relative to the input, with "/";
    the speaker is its first part, or "" if it has one part only. In an archive, paths begin at the archive
    (`ARCHIVE/FOLDER` as input: at that folder in it), or below its top folder if all its recordings lie in one and some
    in folders of it: the archive of a folder yields what the folder yields. A path as in VoxCeleb,
    …/idXXXXX/video/utterance, yields these three parts as the name, whatever the input, and the speaker idXXXXX. In
    Kaldi folders and wespeaker's shards, names and speakers are those given there.

    Args:
      inputs: paths and datasets of TFDS, see `input_kind`.
      exclude: the output of `prepare`, which is not an input, nor is what `prepare` keeps beside it.
      run_commands: whether commands in a wav.scp may be run.

    Raises:
      FileNotFoundError: no such input. OSError: a folder or file cannot be read.
      ValueError: two recordings would have the same name, an input has an unknown kind, an archive is damaged or cut
        short, or a Kaldi file is wrong.
    """
    found, left_out = [], []
    for given in inputs:
        kind = input_kind(given)
        if kind == "dataset of TFDS":
            _add_tfds(given, found, left_out)
        elif kind == "Kaldi folder":
            found += _of_kaldi(os.fspath(given), run_commands)
        elif kind == "folder":
            _add_folder(os.fspath(given), exclude, found, left_out)
        elif kind == "list of shards":
            for archive in _listed_shards(os.fspath(given)):
                _add_archive(archive, "", found, left_out)
        else:
            archive, inside = _split_archive(os.fspath(given))
            start = len(found)
            _add_archive(archive, inside, found, left_out)
            if not inside:
                found[start:] = _below_top_folder(found[start:])
    found.sort(key=operator.attrgetter("name"))
    for first, second in zip(found, found[1:]):
        if first.name == second.name:
            if first.source == second.source:
                raise ValueError(f"{first.source} appears twice: remove one")
            raise ValueError(
                f"{first.source} and {second.source} would both be called {first.name}: prepare them into "
                "two datasets, or give a folder above both"
            )
    in_order = [(item.root, place, item) for item in found if (place := _place(item)) is not None]
    if in_order:
        found = [item for item in found if _place(item) is None] + [item for *_, item in sorted(in_order)]
    return found, sorted(left_out)


def input_kind(given: str | os.PathLike | TfdsInput) -> str:
    """Returns "folder", "Kaldi folder", "archive", "list of shards" or "dataset of TFDS".

    Raises:
      FileNotFoundError: nothing there. ValueError: a file of another kind.
    """
    if isinstance(given, TfdsInput):
        return "dataset of TFDS"
    path = os.fspath(given)
    if os.path.isdir(path):
        return "Kaldi folder" if kaldi.is_kaldi_folder(path) else "folder"
    if os.path.isfile(path) and path.endswith(SHARD_LIST):
        return "list of shards"
    if _split_archive(path):
        return "archive"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such folder of recordings or archive")
    raise ValueError(f"{path}: expected a folder, a zip, a tar (also compressed) or a {SHARD_LIST} of shards")


def _place(recording):
    """The number of a recording that is best read after its predecessor, None for others."""
    if recording.kind is Kind.EXAMPLE:
        return int(recording.path)
    return recording.extent.number if recording.kind is Kind.STREAMED else None


def read_recording(
    recording: Recording, *, channel: str | int = "mean", spool: tuple[str, int] | None = None
) -> np.ndarray:
    """Returns the samples of a recording, int16 [L] at 16 kHz.

    Args:
      recording: from `find_recordings`.
      channel: "mean", or the number of a channel from 1; a channel that the recording itself names takes precedence.
      spool: file, and offset in it, to which a recording of kind STREAMED was copied; required for those.

    Raises:
      AudioError: it cannot be used; the message names its source.
      OSError: a temporary file cannot be written.
    """
    start, end = recording.span or (0.0, None)
    options = {"channel": recording.channel or channel}
    if recording.kind is Kind.EXAMPLE:
        return tfds_audio.read_example(recording.root, int(recording.path), **options)
    options |= {"start": start, "end": end}
    if recording.kind is Kind.FILE:
        return read_audio(recording.source, **options)
    try:
        opened = _open_source(recording, spool)
    except ValueError as error:
        raise AudioError(recording.source, str(error)) from None
    with opened:
        return read_audio(_Named(opened, recording.source), **options)


def _open_source(recording, spool) -> BinaryIO:
    """The bytes of a recording that is not a file of its own; ValueError with the reason if they are unavailable."""
    if recording.kind is Kind.COMMAND:
        return io.BytesIO(_output(recording.path))
    if recording.kind is Kind.ARK:
        path = os.path.join(recording.root, recording.path)
        return open_member(path, _wav_extent(path, recording.extent.offset))
    if recording.kind is Kind.STREAMED:
        path, offset = spool
        return open_member(path, recording.extent._replace(offset=offset))
    return open_member(recording.root, recording.extent)


class _Named:
    """An open file under the name of its recording, for messages."""

    def __init__(self, file, name):
        self._file, self.name = file, name

    def __getattr__(self, attribute):
        return getattr(self._file, attribute)


def files_below(folder: str | os.PathLike) -> Iterator[str]:
    """Yields the path of every file below a folder, sorted folder by folder; follows links, but enters none twice.

    Raises:
      FileNotFoundError: no such folder. OSError: a folder in it cannot be read.
    """
    return (os.path.join(parent, file) for parent, files in _folders_below(folder) for file in files)


def is_hidden(name: str) -> bool:
    """Returns whether a file is hidden by its name or that of a folder: `name` is its path relative to the input."""
    return any(part.startswith(".") or part == MACOS_FOLDER for part in name.split("/"))


def _folders_below(folder, exclude=None):
    """Yields (folder, sorted names of its files) for it and all folders below."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder of recordings")
    seen = set()
    excluded = os.path.realpath(exclude) if exclude else None
    beside, name = os.path.split(excluded or "")
    ours = {name, f".{name}.partial", f".{name}.lock"}

    def fail(error):
        raise error

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in seen or real == excluded:
            folders.clear()
            continue
        seen.add(real)
        if real == beside:
            folders[:] = [name for name in folders if name not in ours]
            files = [name for name in files if name not in ours]
        folders.sort()
        yield parent, sorted(files)


def _add_folder(folder, exclude, found, left_out):
    for parent, files in _folders_below(folder, exclude):
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        before = below = "" if below == "." else below + "/"
        root = folder
        absolute = os.path.abspath(parent)
        if voxceleb := _voxceleb_part(absolute.replace(os.sep, "/") + "/"):
            before, shown = voxceleb, parent if parent.endswith(voxceleb[:-1]) else absolute
            root = sys.intern(os.path.dirname(os.path.dirname(shown)))
        speaker = _speaker(before)
        for file in files:
            name = before + file
            if problem := _name_problem(below + file):
                left_out.append((os.path.join(parent, file), problem))
            else:
                found.append(Recording(name, speaker, Kind.FILE, root, name))


def _add_archive(archive, inside, found, left_out):
    """Adds what lies in an archive below the folder `inside` of it."""
    kind = Kind.STREAMED if is_compressed_tar(archive) else Kind.MEMBER
    speakers, before, start = {}, inside and inside + "/", len(found)
    for member in members(archive, contents=SPEAKER_FILE):
        if not member.name.startswith(before):
            continue
        name = member.name[len(before) :]
        if member.content is not None:
            speakers[name[: -len(SPEAKER_FILE)]] = " ".join(member.content.decode(errors="replace").split())
        elif problem := _name_problem(name) or member.problem:
            left_out.append((os.path.join(archive, member.name), problem))
        else:
            if voxceleb := _voxceleb_part(member.name):
                name = voxceleb + os.path.basename(name)
            found.append(Recording(name, _speaker(name), kind, archive, member.name, member.extent))
    if speakers:  # a shard of wespeaker: key.wav and key.spk
        for index in range(start, len(found)):
            key = os.path.splitext(found[index].path[len(before) :])[0]
            if key in speakers:
                found[index] = found[index]._replace(name=key, speaker=speakers[key])


def _below_top_folder(recordings):
    """The recordings of an archive; if all are in one folder, and some in folders of it, names begin below that."""
    tops = {item.path.partition("/")[0] if "/" in item.path else "" for item in recordings}
    if len(tops) != 1 or "" in tops or not any(item.path.count("/") > 1 for item in recordings):
        return recordings
    return [
        item._replace(name=name, speaker=_speaker(name))
        if item.name == item.path and not _voxceleb_part(item.path)
        else item
        for item in recordings
        for name in [item.name.partition("/")[2]]
    ]


def _of_kaldi(folder, run_commands):
    for item in kaldi.kaldi_utterances(folder, run_commands):
        root, path, kind, extent = "", item.source, Kind.COMMAND, None
        if not item.is_command:
            root, path = os.path.split(item.source)
            kind = Kind.FILE if item.offset is None else Kind.ARK
            extent = None if item.offset is None else Extent(item.offset, 0, 0)
        yield Recording(item.name, item.speaker, kind, sys.intern(root), path, extent, item.span, item.channel)


def _add_tfds(given, found, left_out):
    text = given.text
    for number, (name, speaker) in enumerate(tfds_audio.utterance_names(text)):
        if set(name) & UNLISTABLE:
            left_out.append((f"{text}/{number}", "odd name: a tab or a line break"))
        else:
            found.append(Recording(name, sys.intern(speaker), Kind.EXAMPLE, text, str(number)))


def _listed_shards(path):
    """Yields the archives that the lines of a list name, relative to the current folder or else to the list's."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = [(number, line.strip()) for number, line in enumerate(file, 1) if line.strip()]
    for number, line in lines:
        beside = os.path.join(os.path.dirname(path), line)
        shard = line if os.path.exists(line) or not os.path.exists(beside) else beside
        if not is_archive_name(shard):
            raise ValueError(f"{path}, line {number}: not a tar: {line[:200]!r}")
        if not os.path.isfile(shard):
            raise FileNotFoundError(f"{path}, line {number}: {line}: no such file")
        yield shard


def _split_archive(path):
    """(archive, folder in it) of ARCHIVE or ARCHIVE/FOLDER; None if no part of the path is an archive."""
    head, inside = path.rstrip("/"), ""
    while head and not os.path.exists(head):
        head, tail = os.path.split(head)
        inside = f"{tail}/{inside}".rstrip("/")
    return (head, inside) if os.path.isfile(head) and is_archive_name(head) else None


def _voxceleb_part(path):
    """The part idXXXXX/video/ of …/idXXXXX/video/utterance, None for any other path."""
    *_, speaker, video, _ = ("", "", *path.split("/"))
    return f"{speaker}/{video}/" if VOXCELEB_SPEAKER.fullmatch(speaker) else None


def _speaker(name):
    return sys.intern(name.split("/")[0] if "/" in name else "")


def _name_problem(name):
    """Why a file is not a recording, by its path relative to the input; None if it may be one."""
    if is_hidden(name):
        return "hidden file"
    if not is_audio_name(name):
        return f"not a recording: extension {os.path.splitext(name)[1].lower() or 'missing'}"
    if not is_text(name):
        return "odd name: not valid UTF-8"
    return "odd name: a tab or a line break" if set(name) & UNLISTABLE else None


@functools.lru_cache(maxsize=1)  # segments of one recording follow one another
def _output(command):
    """What a shell command writes to stdout; ValueError if it fails or writes too much."""
    with tempfile.TemporaryFile() as errors:  # a pipe that nobody reads would block the command
        process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        data = bytearray()
        with process, contextlib.closing(process.stdout) as pipe:
            while len(data) <= LARGEST_MEMBER and (piece := pipe.read(1 << 20)):
                data += piece
        if len(data) > LARGEST_MEMBER:
            raise ValueError(f"command failed: more than {LARGEST_MEMBER / 1e9:.1f} GB of output")
        if process.returncode:
            errors.seek(0)
            lines = errors.read(1 << 16).decode(errors="replace").strip().splitlines()
            raise ValueError(f"command failed: status {process.returncode}{': ' + lines[-1] if lines else ''}")
    return bytes(data)


def _wav_extent(path, offset):
    """The extent of the wav that begins at a byte of a file; ValueError if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            header = file.read(12)
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except OSError as error:
        if error.errno in NOT_OF_THE_FILE:
            raise
        raise ValueError(f"cannot be opened: {error.strerror}") from None
    if header[:4] != b"RIFF" or header[8:] != b"WAVE":
        raise ValueError(f"no wav at byte {offset:,} of the ark: only those that hold wav files can be read")
    size = 8 + int.from_bytes(header[4:8], "little")
    return Extent(offset, size, size)
