"""Trial lists: pairs of recordings, each a target (same speaker) or a nontarget trial."""

import collections
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from memo_jax.audio import is_audio_name

VOXCELEB_LABELS = {"1": True, "0": False}
KALDI_LABELS = {"target": True, "nontarget": False}


@dataclasses.dataclass(frozen=True, eq=False)
class Trials:
    """N trials: recording names `enrol` and `test` (lists of N), and `target`, bool [N]."""

    enrol: list[str]
    test: list[str]
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.enrol)

    @property
    def recordings(self) -> list[str]:
        """Every recording the trials need, once, in order of first appearance (enrol sides first)."""
        return self._numbered[0]

    @property
    def pairs(self) -> np.ndarray:
        """The two recordings of every trial: int [N, 2] into `recordings`."""
        return self._numbered[1]

    @functools.cached_property
    def _numbered(self) -> tuple[list[str], np.ndarray]:
        # Names are looked up once for all purposes: half a million trials spend most of their time on it.
        numbers = collections.defaultdict()
        numbers.default_factory = numbers.__len__
        sides = map(numbers.__getitem__, itertools.chain(self.enrol, self.test))
        pairs = np.fromiter(sides, np.int64, 2 * len(self)).reshape(2, len(self)).T
        return list(numbers), np.ascontiguousarray(pairs)


def read_trials(path: str | os.PathLike) -> Trials:
    """Reads a trial list in VoxCeleb form (`1 enrol test`, `0 …`) or Kaldi form (`enrol test target|nontarget`).

    The first line decides the form. Fields are separated by white space, or by single tabs, and then names may
    contain spaces. LF and CRLF endings, a byte-order mark, a missing last newline and blank lines at the end are fine.

    Raises:
      ValueError: naming file and line, for an empty list, a line without exactly three fields, an unknown label, or
        bytes that are not UTF-8.
      OSError: when the file cannot be read.
    """
    with open(path, "rb") as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a trial list: not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines = text.rstrip().split("\n")
    if lines == [""]:
        raise ValueError(f"{path}: the trial list is empty")
    fields = _tabbed_fields if "\t" in text else str.split
    flat = [field for line in lines for field in fields(line)]  # a flat list: half a million small ones would be slow
    for number, count in enumerate(map(len, map(fields, lines)), 1):
        if count != 3:
            raise _line_error(path, lines, number, f"{count} fields where a trial has 3")
    if flat[2] in KALDI_LABELS:
        enrol, test, labels, values = flat[0::3], flat[1::3], flat[2::3], KALDI_LABELS
    else:
        labels, enrol, test, values = flat[0::3], flat[1::3], flat[2::3], VOXCELEB_LABELS
    if not values.keys() >= set(labels):
        number = next(number for number, label in enumerate(labels, 1) if label not in values)
        raise _line_error(path, lines, number, f"the label {labels[number - 1]!r} is not {' or '.join(values)}")
    return Trials(enrol, test, np.fromiter(map(values.__getitem__, labels), bool, len(labels)))


def _tabbed_fields(line: str) -> list[str]:
    """The fields of a line: between tabs when that gives three, between white space otherwise."""
    fields = [field.strip() for field in line.split("\t")]
    return fields if len(fields) == 3 and all(fields) else line.split()


def _line_error(path, lines: list[str], number: int, problem: str) -> ValueError:
    line = lines[number - 1].rstrip("\r")
    shown = line if len(line) <= 200 else line[:200] + "…"
    return ValueError(
        f"{path}, line {number}: {problem}: {shown!r}. Expected '1 enrol test' or 'enrol test target|nontarget', "
        "one form throughout, with tabs between fields if names contain spaces."
    )


def missing_recordings(trials: Trials, names: Sequence[str]) -> list[str]:
    """The recordings that trials mention and `names` lacks (`trial_pairs` says what counts), in order of appearance."""
    rows = _rows(trials, names)
    return [name for name in trials.recordings if name not in rows]


def trial_pairs(trials: Trials, names: Sequence[str]) -> np.ndarray:
    """Rows of the two recordings of every trial: int [N, 2] into `names` (and the embeddings in that order).

    A recording of a trial is the one of that name or, where there is none, the only one whose name is the same but for
    the extension of an audio file: VoxCeleb's lists say .wav of recordings that come as .m4a.

    Raises:
      ValueError: when a recording of a trial is missing from `names` (says which, and how many), or a name that a
        trial needs occurs twice.
    """
    rows = _rows(trials, names)
    if len(rows) < len(trials.recordings):
        missing = [name for name in trials.recordings if name not in rows]
        shown = ", ".join(map(repr, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise ValueError(
            f"{len(missing):,} of the {len(trials.recordings):,} recordings in the trials are missing from the data: "
            f"{shown}. Names in the list must equal those of the data (a path relative to the prepared folder), but "
            "for the extension."
        )
    return np.array([rows[name] for name in trials.recordings])[trials.pairs]


def _rows(trials: Trials, names: Sequence[str]) -> dict[str, int]:
    """Recording of a trial → row in `names`, without those that are missing."""
    index, needed = {name: row for row, name in enumerate(names)}, trials.recordings
    if len(index) < len(names):
        wanted = set(needed)
        twice = next((name for row, name in enumerate(names) if index[name] != row and name in wanted), None)
        if twice is not None:
            raise ValueError(f"the recording {twice!r} has two embeddings: names must be unique")
    rows = {name: index[name] for name in needed if name in index}
    if len(rows) < len(needed):
        by_stem = {}
        for name, row in index.items():
            by_stem.setdefault(_stem(name), []).append(row)
        alike = {name: by_stem.get(_stem(name), ()) for name in needed if name not in rows}
        rows |= {name: found[0] for name, found in alike.items() if len(found) == 1}
    return rows


def _stem(name: str) -> str:
    return os.path.splitext(name)[0] if is_audio_name(name) else name


def speaker_folder(name: str) -> str:
    """The speaker as VoxCeleb and most corpora write it: the first folder of a recording's name."""
    speaker, slash, _ = name.partition("/")
    if not slash:
        raise ValueError(f"the recording name {name!r} has no folder to take as its speaker: give a table of speakers")
    return speaker


def speaker_pairs(trials: Trials, speaker_of: Callable[[str], str] | Mapping[str, str] = speaker_folder) -> np.ndarray:
    """Speaker numbers of the two recordings of every trial: int [N, 2], for the bootstrap over speakers.

    Args:
      speaker_of: a function or table from recording name to speaker (`dict(zip(names, speakers))` for two arrays).

    Raises:
      ValueError: when a recording has no speaker, or speakers contradict the label of a trial.
    """
    numbers, of_recording = {}, []
    for name in trials.recordings:
        try:
            speaker = speaker_of(name) if callable(speaker_of) else speaker_of[name]
        except KeyError:
            raise ValueError(f"the table of speakers lacks the recording {name!r}") from None
        of_recording.append(numbers.setdefault(speaker, len(numbers)))
    pairs = np.array(of_recording)[trials.pairs]
    wrong = np.flatnonzero((pairs[:, 0] == pairs[:, 1]) != trials.target)
    if wrong.size:
        first = wrong[0]
        label = "target" if trials.target[first] else "nontarget"
        raise ValueError(
            f"the speakers given contradict {wrong.size:,} trial labels, first trial {first + 1}: "
            f"{trials.enrol[first]!r} and {trials.test[first]!r} is a {label} trial"
        )
    return pairs
