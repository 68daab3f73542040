"""Kaldi data folders: wav.scp, segments and utt2spk → the utterances that they name."""

import os
from typing import NamedTuple


class KaldiUtterance(NamedTuple):
    """`source` is a path, or a command when `is_command`; `span` in seconds or None for the whole."""

    name: str
    speaker: str
    source: str
    is_command: bool
    span: tuple[float, float | None] | None


def is_kaldi_folder(path) -> bool:
    """Whether a folder holds a wav.scp."""
    return os.path.isfile(os.path.join(path, "wav.scp"))


def kaldi_utterances(folder, run_commands: bool = False):
    """Yields the utterances of a Kaldi folder: those of segments where it has that file, else those of wav.scp.

    A path in wav.scp is relative to the current folder, as in Kaldi, or else to the Kaldi folder. Utterances that
    utt2spk does not have, or all where it is missing, have the speaker "".

    Raises:
      ValueError: a line that is not as Kaldi writes it, an identifier given twice, a segment of an unknown recording,
        or a command in wav.scp without `run_commands`; the message names file and line.
    """
    recordings = {name: rest for name, rest, _ in _table(folder, "wav.scp")}
    for number, (name, source) in enumerate(recordings.items(), 1):
        if source.endswith("|") and not run_commands:
            raise ValueError(
                f"{os.path.join(folder, 'wav.scp')}: {name} is the output of a command, {source!r}. "
                "Commands run with your rights: read them, and allow them with --run-commands"
            )
    speakers = {name: rest for name, rest, _ in _table(folder, "utt2spk")} if _has(folder, "utt2spk") else {}
    if not _has(folder, "segments"):
        for name, source in recordings.items():
            yield _utterance(folder, name, speakers, source, None)
        return
    for name, rest, number in _table(folder, "segments"):
        try:
            recording, begin, end = rest.split()
            span = float(begin), float(end) if float(end) >= 0 else None  # Kaldi's -1: to the end
            source = recordings[recording]
            if not 0 <= span[0] < (span[1] or float("inf")):
                raise ValueError
        except KeyError:
            raise _line_error(folder, "segments", number, f"wav.scp has no recording {recording!r}") from None
        except ValueError:
            raise _line_error(folder, "segments", number, "expected 'utterance recording begin end'") from None
        yield _utterance(folder, name, speakers, source, span)


def _utterance(folder, name, speakers, source, span):
    is_command = source.endswith("|")
    if is_command:
        source = source[:-1].strip()
    elif not os.path.isabs(source) and not os.path.exists(source):
        beside = os.path.join(folder, source)
        source = beside if os.path.exists(beside) else source
    return KaldiUtterance(name, speakers.get(name, ""), source, is_command, span)


def _table(folder, file):
    """Yields (first field, the rest, line number) of a table's lines."""
    seen = set()
    try:
        with open(os.path.join(folder, file), encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                fields = line.strip().split(maxsplit=1)
                if len(fields) == 1:
                    raise _line_error(folder, file, number, "one field only")
                if fields:
                    if fields[0] in seen:
                        raise _line_error(folder, file, number, f"{fields[0]!r} is there twice")
                    seen.add(fields[0])
                    yield fields[0], fields[1], number
    except UnicodeDecodeError:
        raise ValueError(f"{os.path.join(folder, file)}: not UTF-8 text") from None


def _has(folder, file):
    return os.path.isfile(os.path.join(folder, file))


def _line_error(folder, file, number, problem):
    return ValueError(f"{os.path.join(folder, file)}, line {number}: {problem}")
