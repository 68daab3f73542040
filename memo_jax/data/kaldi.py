"""Kaldi data folders: wav.scp, segments and utt2spk → the utterances that they name."""

import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from memo_jax.files import is_text
from memo_jax.log import plural, say

BLANKS = " \t\r\n\f\v"  # what Kaldi splits lines at; other blanks of Unicode may be parts of names
UTF16_MARKS = ("\udcff\udcfe", "\udcfe\udcff")  # as surrogates, which stand for bytes that are not UTF-8
ARK_OFFSET = re.compile(r"(.+):(\d{1,18})")
SEGMENT_FIELDS = "expected 'utterance recording begin end', and perhaps the channel (0, 1, …)"


class KaldiUtterance(NamedTuple):
    """An utterance of a Kaldi folder.

    Attributes:
      name, speaker: its identifiers; speaker "" if unknown.
      source: path of a file, or a shell command if `is_command`.
      is_command: whether the line of wav.scp ended in "|".
      offset: byte of the file at which the recording begins (`x.ark:offset`), or None.
      span: first and last second, the latter None for the end; None for the whole recording.
      channel: from 1, or None where segments has no fifth field.
    """

    name: str
    speaker: str
    source: str
    is_command: bool
    offset: int | None
    span: tuple[float, float | None] | None
    channel: int | None


def is_kaldi_folder(path: str | os.PathLike) -> bool:
    """Returns whether a folder holds a wav.scp."""
    return os.path.isfile(os.path.join(path, "wav.scp"))


def kaldi_utterances(folder: str | os.PathLike, run_commands: bool = False) -> Iterator[KaldiUtterance]:
    """Yields the utterances of a Kaldi folder: those of segments if it has that file, else those of wav.scp.

    A path in wav.scp is relative to the current folder, as in Kaldi, or else to the Kaldi folder. If utt2spk does not
    have an utterance of segments, the speaker is that of its recording, and otherwise "". A byte-order mark, as Windows
    writes it, is not part of the first identifier. The channels in segments count from 0, as in Kaldi.

    Raises:
      ValueError: a line that is not as Kaldi writes it, an identifier given twice, a segment of an unknown recording, a
        utt2spk of other utterances, or a command in wav.scp without `run_commands`; the message names file and line.
    """
    recordings = {name: rest for name, rest, _ in _table(folder, "wav.scp")}
    if not recordings:
        raise ValueError(f"{os.path.join(folder, 'wav.scp')}: no recordings: the file is empty")
    for name, source in recordings.items():
        if source.endswith("|") and not run_commands:
            raise ValueError(
                f"{os.path.join(folder, 'wav.scp')}: {name} is the output of a command, {source!r}. "
                "Commands run with your permissions: read them, and allow them with memo-jax prepare --run-commands"
            )
    segments = dict(_segments(folder, recordings)) if _has(folder, "segments") else None
    if segments == {}:
        raise ValueError(f"{os.path.join(folder, 'segments')}: no utterances: the file is empty")
    if segments is None:
        segments = {name: (name, None, None) for name in recordings}
    speakers = _speakers(folder, {name: recording for name, (recording, *_) in segments.items()})
    for name, (recording, span, channel) in segments.items():
        yield _utterance(folder, name, speakers.get(name, ""), recordings[recording], span, channel)


def _segments(folder, recordings):
    """Yields (utterance, (recording, span, channel)) of the lines of segments."""
    for name, rest, number in _table(folder, "segments"):
        recording, *numbers = re.split(f"[{BLANKS}]+", rest.strip(BLANKS))
        try:
            begin, end = map(float, numbers[:2])
            channel = [1 + int(text) for text in numbers[2:]]
            in_order = math.isfinite(begin + end) and 0 <= begin < (math.inf if end < 0 else end)
            if not in_order or len(channel) > 1 or min(channel, default=1) < 1:
                raise ValueError
        except ValueError:
            raise _line_error(folder, "segments", number, SEGMENT_FIELDS) from None
        if recording not in recordings:
            raise _line_error(folder, "segments", number, f"wav.scp has no recording {recording!r}")
        span = begin, None if end < 0 else end  # Kaldi's -1: to the end
        yield name, (recording, span, channel[0] if channel else None)


def _speakers(folder, utterances):
    """The speakers of {utterance: recording} that utt2spk has; reports how many it lacks, and refuses one of others."""
    if not _has(folder, "utt2spk"):
        return {}
    table = {}
    for name, rest, number in _table(folder, "utt2spk"):
        if set(rest) & set(BLANKS):
            raise _line_error(folder, "utt2spk", number, "expected 'utterance speaker'")
        table[name] = rest
    speakers = {name: table.get(name, table.get(recording)) for name, recording in utterances.items()}
    missing = [name for name, speaker in speakers.items() if speaker is None]
    path = os.path.join(folder, "utt2spk")
    if missing and len(missing) == len(utterances):
        other = f"it has {next(iter(table))!r}" if table else "it is empty"
        raise ValueError(
            f"{path}: no speaker for any of the {plural(len(utterances), 'utterance')}, the first being {missing[0]!r} "
            f"({other}): it belongs to another folder; remove it if speakers are unknown"
        )
    if missing:
        say(
            f"{path}: no speaker for {len(missing):,} of {plural(len(utterances), 'utterance')}, such as {missing[0]!r}"
        )
    return {name: speaker for name, speaker in speakers.items() if speaker is not None}


def _utterance(folder, name, speaker, source, span, channel):
    offset, is_command = None, source.endswith("|")
    if is_command:
        source = source[:-1].strip(BLANKS)
    else:
        source = _found(folder, source)
        if (ark := ARK_OFFSET.fullmatch(source)) and not os.path.exists(source):
            source, offset = _found(folder, ark[1]), int(ark[2])
    return KaldiUtterance(name, speaker, source, is_command, offset, span, channel)


def _found(folder, path):
    """The path, or that below the Kaldi folder if only there is a file."""
    if os.path.isabs(path) or os.path.exists(path):
        return path
    beside = os.path.join(folder, path)
    return beside if os.path.exists(beside) else path


def _table(folder, file):
    """Yields (first field, the rest, line number) of a table's lines."""
    seen = set()
    path = os.path.join(folder, file)
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.startswith(UTF16_MARKS):
                raise _line_error(folder, file, number, "UTF-16 text: save it as UTF-8")
            name, *rest = re.split(f"[{BLANKS}]+", line.strip(BLANKS), maxsplit=1)
            if not name:
                continue
            if not rest:
                raise _line_error(folder, file, number, "one field only")
            if name in seen:
                raise _line_error(folder, file, number, f"{name!r} appears twice")
            if not is_text(name if file == "wav.scp" else line):  # a path may be any bytes
                raise _line_error(folder, file, number, "not UTF-8 text")
            seen.add(name)
            yield name, rest[0], number


def _has(folder, file):
    return os.path.lexists(os.path.join(folder, file))  # a broken link is an error, and not a missing file


def _line_error(folder, file, number, problem):
    return ValueError(f"{os.path.join(folder, file)}, line {number}: {problem}")
