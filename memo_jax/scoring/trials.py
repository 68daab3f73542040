"""Trial lists: pairs of recordings, or of an enrolled speaker and a recording, with labels or without."""

import collections
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from memo_jax.audio import is_audio_name

BINARY_LABELS = {"1": True, "0": False}
KALDI_LABELS = {"target": True, "nontarget": False}


@dataclasses.dataclass(frozen=True, eq=False)
class Trials:
    """N trials.

    Attributes:
      enrol, test: the two sides of every trial, lists of N: names of recordings or, where `enrollments` has the name of
        the enrol side, of a speaker enrolled by several recordings.
      target: bool [N], true for the same speaker; None for a list without labels.
      enrollments: {speaker: recordings}, {} where every side is a recording.
      path: of the list, for messages.
    """

    enrol: list[str]
    test: list[str]
    target: np.ndarray | None
    enrollments: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    path: str = "the trial list"

    def __len__(self) -> int:
        return len(self.enrol)

    @property
    def sides(self) -> list[str]:
        """Every name in the list, once, in order of first appearance (enrol sides first)."""
        return self._numbered[0]

    @property
    def pairs(self) -> np.ndarray:
        """The two sides of every trial: int [N, 2] into `sides`."""
        return self._numbered[1]

    @functools.cached_property
    def recordings(self) -> list[str]:
        """Every recording that the trials need, once: `sides`, with enrolled speakers replaced by their recordings."""
        if not self.enrollments:
            return self.sides
        return list(dict.fromkeys(itertools.chain.from_iterable(map(self.recordings_of, self.sides))))

    def recordings_of(self, side: str) -> Sequence[str]:
        """Returns the recordings of a side: those of an enrolled speaker, or the recording itself."""
        return self.enrollments.get(side, (side,))

    def side_embeddings(self, embeddings: np.ndarray) -> np.ndarray:
        """Returns embeddings [S, …] of `sides`, given those of `recordings` [R, …].

        That of an enrolled speaker is the mean of those of the recordings, as they are (not scaled to length 1).
        """
        if not self.enrollments:
            return embeddings
        row = {name: i for i, name in enumerate(self.recordings)}
        return np.stack([embeddings[[row[name] for name in self.recordings_of(side)]].mean(0) for side in self.sides])

    @functools.cached_property
    def self_tests(self) -> np.ndarray:
        """Whether the test recording of a trial is one of its enrol side's: bool [N]. Such a trial shows nothing."""
        if not self.enrollments:
            return self.pairs[:, 0] == self.pairs[:, 1]
        return np.array([test in self.recordings_of(enrol) for enrol, test in zip(self.enrol, self.test)], bool)

    def require_both_kinds(self) -> None:
        """Raises ValueError, naming the list, unless it has target and nontarget trials, which error rates need."""
        if self.target is None:
            raise ValueError(f"{self.path} has no labels, so there are no error rates: only scores can be written")
        for kind, present in (("target", self.target.any()), ("nontarget", not self.target.all())):
            if not present:
                raise ValueError(f"{self.path} has no {kind} trial: error rates need both kinds")

    @functools.cached_property
    def _numbered(self) -> tuple[list[str], np.ndarray]:
        # Names are looked up once for all purposes: with half a million trials, that takes most of the time.
        numbers = collections.defaultdict()
        numbers.default_factory = numbers.__len__
        sides = map(numbers.__getitem__, itertools.chain(self.enrol, self.test))
        pairs = np.fromiter(sides, np.int64, 2 * len(self)).reshape(2, len(self)).T
        return list(numbers), np.ascontiguousarray(pairs)


def read_trials(path: str | os.PathLike, enrollments: str | os.PathLike | None = None) -> Trials:
    """Reads a trial list.

    The first line decides the form: `1 enrol test` (VoxCeleb), `enrol test target|nontarget` (Kaldi), `enrol test 1`
    (CN-Celeb), or `enrol test` (no labels). Fields are separated by white space, or by single tabs, and then names may
    contain spaces. LF and CRLF endings, a byte-order mark, a missing last newline and blank lines at the end are fine.

    Args:
      path: of the list.
      enrollments: table with lines `speaker recording recording …`: the enrol sides are such speakers.

    Raises:
      ValueError: naming file and line, for an empty list, a line of another form, an unknown label, bytes that are not
        UTF-8, a pair that is both target and nontarget, or an enrol side that the table lacks.
      OSError: when a file cannot be read.
    """
    lines = text_lines(path, "trial list")
    fields = _tabbed_fields if any("\t" in line for line in lines) else str.split
    width = len(fields(lines[0]))
    if width not in (2, 3):
        raise _line_error(path, lines, 1, f"{width} fields where a trial has 3, or 2 without a label")
    flat = [field for line in lines for field in fields(line)]  # a flat list: half a million small ones would be slow
    for number, count in enumerate(map(len, map(fields, lines)), 1):
        if count != width:
            raise _line_error(path, lines, number, f"{count} fields where the first trial has {width}")
    columns = [flat[i::width] for i in range(width)]
    target = None
    if width == 2:
        enrol, test = columns
    else:
        if columns[2][0] in KALDI_LABELS:
            enrol, test, labels, values = *columns, KALDI_LABELS
        elif columns[2][0] in BINARY_LABELS and not BINARY_LABELS.keys() >= set(columns[0]):
            enrol, test, labels, values = *columns, BINARY_LABELS
        else:
            (labels, enrol, test), values = columns, BINARY_LABELS
        if not values.keys() >= set(labels):
            number = next(number for number, label in enumerate(labels, 1) if label not in values)
            raise _line_error(path, lines, number, f"the label {labels[number - 1]!r} is not {' or '.join(values)}")
        target = np.fromiter(map(values.__getitem__, labels), bool, len(labels))
    trials = Trials(enrol, test, target, {} if enrollments is None else read_enrollments(enrollments), str(path))
    _check_contradictions(trials)
    if enrollments is not None:
        missing = next((name for name in enrol if name not in trials.enrollments), None)
        if missing is not None:
            raise ValueError(f"{enrollments} does not enrol {missing!r}, which {path} tests")
        both = next((name for name in test if name in trials.enrollments), None)
        if both is not None:
            raise ValueError(f"{both!r} is a speaker in {enrollments} and a recording in {path}: rename one of them")
    return trials


def read_enrollments(path: str | os.PathLike) -> dict[str, list[str]]:
    """Reads a table of enrolled speakers, lines `speaker recording recording …`; a speaker may have several lines.

    Raises:
      ValueError: naming file and line, for a speaker without recordings or an empty table. OSError: cannot be read.
    """
    table: dict[str, list[str]] = {}
    for number, line in enumerate(text_lines(path, "table of enrolled speakers"), 1):
        fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
        fields = [field for field in fields if field]
        if len(fields) < 2:
            raise ValueError(f"{path}, line {number}: expected `speaker recording …`, not {line.strip()[:200]!r}")
        known = table.setdefault(fields[0], [])
        known.extend(name for name in dict.fromkeys(fields[1:]) if name not in known)
    return table


def read_table(path: str | os.PathLike, key: str, value: str) -> dict[str, str]:
    """Returns {key: value} of a table with lines `key value`, split at the line's tab, or else its last space.

    Args:
      path: of the file, such as Kaldi's utt2spk or spk2gender.
      key: what the keys are, such as "speaker", for errors.
      value: likewise, such as "gender".

    Raises:
      ValueError: naming file and line: another form, a key with two values, no line, or not UTF-8.
      OSError: the file cannot be read.
    """
    table: dict[str, str] = {}
    for number, line in enumerate(text_lines(path, f"table of {value}s"), 1):
        if not line.strip():
            continue
        parts = line.strip().split("\t") if "\t" in line else line.strip().rsplit(None, 1)
        fields = [field.strip() for field in parts if field.strip()]
        if len(fields) != 2:
            raise ValueError(f"{path}, line {number}: expected `{key} {value}`, not {line.strip()[:200]!r}")
        if table.setdefault(*fields) != fields[1]:
            before = table[fields[0]]
            raise ValueError(
                f"{path}, line {number}: the {value} of {fields[0]!r} is {fields[1]!r} here and {before!r} before"
            )
    return table


def text_lines(path: str | os.PathLike, kind: str) -> list[str]:
    """Returns the lines of a text file, without blank ones at its end.

    Raises ValueError, naming the file as that `kind`, when it is empty or not UTF-8.
    """
    with open(path, "rb") as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a {kind}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines = text.rstrip().split("\n")
    if lines == [""]:
        raise ValueError(f"{path}: the {kind} is empty")
    return lines


def _check_contradictions(trials: Trials) -> None:
    """Raises ValueError for a pair that is both a target and a nontarget trial, or a nontarget of one recording."""
    if trials.target is None:
        return
    wrong = np.flatnonzero(trials.self_tests & ~trials.target)
    if wrong.size:
        raise ValueError(
            f"{trials.path}: trial {wrong[0] + 1} tests {trials.test[wrong[0]]!r} against itself and says nontarget: "
            "remove it"
        )
    low, high = np.sort(trials.pairs, axis=1).T
    keys = low * len(trials.sides) + high
    order = np.argsort(keys, kind="stable")
    differ = (keys[order][1:] == keys[order][:-1]) & (trials.target[order][1:] != trials.target[order][:-1])
    if differ.any():
        first, second = np.sort(order[np.flatnonzero(differ)[0] :][:2])
        raise ValueError(
            f"{trials.path}: trials {first + 1} and {second + 1} compare {trials.enrol[first]!r} and "
            f"{trials.test[first]!r}, once as target and once as nontarget: remove the wrong one"
        )


def _tabbed_fields(line: str) -> list[str]:
    """The fields of a line: between tabs when that yields two or three, between white space otherwise."""
    fields = [field.strip() for field in line.split("\t")]
    return fields if len(fields) in (2, 3) and all(fields) else line.split()


def _line_error(path, lines: list[str], number: int, problem: str) -> ValueError:
    line = lines[number - 1].rstrip("\r")
    shown = line if len(line) <= 200 else line[:200] + "…"
    return ValueError(
        f"{path}, line {number}: {problem}: {shown!r}. Expected '1 enrol test', 'enrol test target|nontarget', "
        "'enrol test 1' or 'enrol test', one form throughout, with tabs between fields if names contain spaces."
    )


def recording_rows(trials: Trials, names: Sequence[str], source: str | os.PathLike = "the data") -> np.ndarray:
    """Returns the rows in `names` of the recordings that trials need: int [R], in the order of `trials.recordings`.

    A recording of a trial is the one of that name or, where there is none, the only one whose name is the same but for
    the extension of an audio file: VoxCeleb's lists say .wav for recordings that come as .m4a. Messages call what has
    the recordings `source`.

    Raises:
      ValueError: when a recording of a trial is missing from `names` (says which, and how many), or a name that a
        trial needs occurs twice.
    """
    rows = _rows(trials, names)
    if len(rows) < len(trials.recordings):
        missing = [name for name in trials.recordings if name not in rows]
        shown = ", ".join(map(repr, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise ValueError(
            f"{trials.path}: {len(missing):,} of the {len(trials.recordings):,} recordings in the trials are missing "
            f"from {source}: {shown}. Names in the list must equal those there (a path relative to the prepared "
            "folder), except for the extension."
        )
    return np.array([rows[name] for name in trials.recordings])


def trial_pairs(trials: Trials, names: Sequence[str]) -> np.ndarray:
    """Returns the two recordings of every trial, int [N, 2] into `names`; for an enrolled speaker, the first one.

    Raises ValueError like `recording_rows`.
    """
    rows = dict(zip(trials.recordings, recording_rows(trials, names)))
    return np.array([rows[trials.recordings_of(side)[0]] for side in trials.sides])[trials.pairs]


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
            by_stem.setdefault(name_without_extension(name), []).append(row)
        alike = {name: by_stem.get(name_without_extension(name), ()) for name in needed if name not in rows}
        rows |= {name: found[0] for name, found in alike.items() if len(found) == 1}
    return rows


def name_without_extension(name: str) -> str:
    """Returns a recording's name without the extension of an audio file."""
    return os.path.splitext(name)[0] if is_audio_name(name) else name


def speaker_folder(name: str) -> str:
    """Returns the speaker as VoxCeleb and most corpora write it: the first folder of a recording's name.

    Raises:
      ValueError: the name has no folder.
    """
    speaker, slash, _ = name.partition("/")
    if not slash:
        raise ValueError(f"the recording name {name!r} has no folder to take as its speaker: give a table of speakers")
    return speaker


def speaker_pairs(trials: Trials, speaker_of: Callable[[str], str] | Mapping[str, str] = speaker_folder) -> np.ndarray:
    """Returns numbers of the two speakers of every trial, int [N, 2], for the bootstrap over speakers.

    Args:
      trials: with labels.
      speaker_of: a function or table from recording name to speaker (`dict(zip(names, speakers))` for two arrays).

    Raises:
      ValueError: when a recording has no speaker, an enrolled speaker's recordings have several, or speakers contradict
        the label of a trial.
    """
    numbers: dict[str, int] = {}
    of_side = []
    for side in trials.sides:
        speakers = set()
        for name in trials.recordings_of(side):
            try:
                speakers.add(speaker_of(name) if callable(speaker_of) else speaker_of[name])
            except KeyError:
                raise ValueError(f"the table of speakers lacks the recording {name!r}") from None
        if len(speakers) > 1:
            raise ValueError(f"{side!r} is enrolled by recordings of several speakers: {', '.join(sorted(speakers))}")
        of_side.append(numbers.setdefault(speakers.pop(), len(numbers)))
    pairs = np.array(of_side)[trials.pairs]
    wrong = np.flatnonzero((pairs[:, 0] == pairs[:, 1]) != trials.target)
    if wrong.size:
        first = wrong[0]
        label = "target" if trials.target[first] else "nontarget"
        raise ValueError(
            f"{trials.path}: the speakers given contradict {wrong.size:,} trial labels, first trial {first + 1}: "
            f"{trials.enrol[first]!r} and {trials.test[first]!r} is a {label} trial"
        )
    return pairs
