"""Trial lists made from labelled recordings: seeded, balanced over speakers, within a gender, across sessions."""

import collections
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memo_jax.data.batches import Utterances
from memo_jax.data.recordings import find_recordings
from memo_jax.files import write_text
from memo_jax.log import plural, say
from memo_jax.scoring.trials import read_table

TARGETS_OF_SPEAKER = 10  # by default, at most
TRIES = 50  # of a random pair before all pairs are listed

Trial = tuple[bool, str, str]  # whether the speakers are the same, and two recordings
NamePair = tuple[str, str]


def labelled_recordings(path: str | os.PathLike) -> dict[str, str]:
    """Returns {recording: speaker} of a dataset, or of anything that `memo-jax prepare` reads.

    Recordings of unknown speakers, and files that cannot be recordings, are left out, and how many is printed.

    Raises:
      FileNotFoundError: no such dataset or input.
      ValueError: no recordings, no speaker is known, or the input is damaged.
    """
    unusable: Sequence = ()
    if (Path(path) / "dataset_info.json").is_file():
        utterances = Utterances(path)
        speakers = dict(zip(utterances.names, utterances.speakers, strict=True))
    else:
        found, unusable = find_recordings([path], run_commands=True)  # for their names: none is run
        speakers = {recording.name: recording.speaker for recording in found}
    if not speakers:
        raise ValueError(f"no recordings in {path}")
    known = {name: speaker for name, speaker in speakers.items() if speaker}
    if not known:
        raise ValueError(
            f"{path}: no recording has a known speaker: give each speaker a folder, or give a Kaldi folder with utt2spk"
        )
    if len(known) < len(speakers):
        say(f"{path}: left out {plural(len(speakers) - len(known), 'recording')} of unknown speakers")
    if unusable:
        say(f"{path}: left out {plural(len(unusable), 'file')}, such as {unusable[0][0]} ({unusable[0][1]})")
    return known


def session(name: str) -> str:
    """Returns the session of a recording: its folders, as in `speaker/session/utterance.wav`.

    Without folders below the speaker's nothing is known, and every recording counts as a session of its own.
    """
    folders = name.split("/")[:-1]
    return "/".join(folders) if len(folders) > 1 else name


def make_trials(
    speakers: Mapping[str, str],
    *,
    targets: int | None = None,
    nontargets: int | None = None,
    genders: Mapping[str, str] | None = None,
    same_session: bool = False,
    seed: int = 0,
) -> list[Trial]:
    """Returns trials in random order, no pair twice.

    Target trials are distributed evenly over the speakers, as far as each has pairs. Each speaker is on the enrol side
    of as many nontarget trials as the others. The speakers on the test side are drawn at random, whatever their number
    of recordings.

    Args:
      speakers: {recording: speaker}.
      targets: how many trials of the same speaker; by default up to TARGETS_OF_SPEAKER of each speaker.
      nontargets: how many of different speakers; by default as many as there are target trials.
      genders: {speaker: gender}; nontarget trials are then of speakers of the same gender.
      same_session: allow target trials within a session (`session`).
      seed: of everything random; the list depends on it and on the other arguments alone.

    Raises:
      ValueError: fewer than two speakers, a speaker without gender, or too few pairs.
    """
    rng = np.random.default_rng(seed)
    of_speaker = collections.defaultdict(list)
    for name in sorted(speakers):
        of_speaker[speakers[name]].append(name)
    if len(of_speaker) < 2:
        raise ValueError(f"all recordings come from {next(iter(of_speaker))!r}: nontarget trials need a second speaker")
    order = [sorted(of_speaker)[i] for i in rng.permutation(len(of_speaker))]
    groups = _groups(order, genders)

    room = {who: _target_pairs(of_speaker[who], same_session) for who in order}
    wanted = sum(min(count, TARGETS_OF_SPEAKER) for count in room.values()) if targets is None else targets
    if wanted > sum(room.values()) or not wanted:
        within = sum(_target_pairs(names, same_session=True) for names in of_speaker.values()) > sum(room.values())
        across = " of different sessions (--same-session allows those of one)" if within else ""
        raise ValueError(
            f"{wanted:,} target trials are wanted and there are {sum(room.values()):,} pairs of recordings of one "
            f"speaker{across}"
        )
    trials: list[Trial] = []
    for who, count in _shared_out(wanted, room).items():
        trials += [(True, *pair) for pair in _draw_targets(of_speaker[who], count, room[who], same_session, rng)]

    wanted = len(trials) if nontargets is None else nontargets
    trials += [(False, *pair) for pair in _draw_nontargets(of_speaker, groups, wanted, rng)]
    return [trials[i] for i in rng.permutation(len(trials))]


def _groups(speakers: Sequence[str], genders) -> dict[str, list[str]]:
    """{speaker: all speakers that a nontarget trial may pair them with, and themselves}."""
    if genders is None:
        return dict.fromkeys(speakers, list(speakers))
    missing = [who for who in speakers if who not in genders]
    if missing:
        raise ValueError(f"the table of genders lacks {plural(len(missing), 'speaker')}, such as {min(missing)!r}")
    of_gender = collections.defaultdict(list)
    for who in speakers:
        of_gender[genders[who]].append(who)
    return {who: of_gender[genders[who]] for who in speakers}


def _target_pairs(names: Sequence[str], same_session: bool) -> int:
    """How many target trials a speaker's recordings allow."""
    sessions = () if same_session else collections.Counter(map(session, names)).values()
    return math.comb(len(names), 2) - sum(math.comb(count, 2) for count in sessions)


def _shared_out(total: int, room: Mapping[str, int]) -> dict[str, int]:
    """Shares a total out as evenly as the room of each allows, earlier ones first."""
    given = dict.fromkeys(room, 0)
    while total:
        open_ = [who for who in room if given[who] < room[who]]
        each = max(total // len(open_), 1)
        for who in open_[:total]:
            more = min(each, room[who] - given[who])
            given[who] += more
            total -= more
    return given


def _draw_targets(names: Sequence[str], count: int, room: int, same_session: bool, rng) -> list[NamePair]:
    if count * 3 > room:
        pairs = [
            pair for pair in itertools.combinations(names, 2) if same_session or session(pair[0]) != session(pair[1])
        ]
        return [pairs[i] for i in rng.permutation(len(pairs))[:count]]
    found: dict[frozenset, NamePair] = {}
    while len(found) < count:  # at least two of three draws are new
        a, b = (names[i] for i in rng.integers(len(names), size=2))
        if a != b and (same_session or session(a) != session(b)):
            found.setdefault(frozenset((a, b)), (a, b))
    return list(found.values())


def _draw_nontargets(of_speaker, groups, count: int, rng) -> list[NamePair]:
    sizes = {who: len(names) for who, names in of_speaker.items()}
    room = sum(sizes[who] * (sum(sizes[other] for other in groups[who]) - sizes[who]) for who in groups) // 2
    if count > room:
        raise ValueError(f"{count:,} nontarget trials are wanted and there are {room:,} pairs of different speakers")
    found: dict[frozenset, NamePair] = {}
    enrol = itertools.cycle(who for who in groups if len(groups[who]) > 1)
    while len(found) < count:
        who = next(enrol)
        others = groups[who]
        for _ in range(TRIES):
            other = others[rng.integers(len(others))]
            a, b = (names[rng.integers(len(names))] for names in (of_speaker[who], of_speaker[other]))
            if who != other and frozenset((a, b)) not in found:
                found[frozenset((a, b))] = a, b
                break
        else:  # this speaker has hardly a new pair left
            left = [
                (a, b)
                for other in others
                if other != who
                for a, b in itertools.product(of_speaker[who], of_speaker[other])
                if frozenset((a, b)) not in found
            ]
            if left:
                a, b = left[rng.integers(len(left))]
                found[frozenset((a, b))] = a, b
    return list(found.values())


def write_trials(path: str | os.PathLike, trials: Sequence[Trial], form: str = "voxceleb") -> None:
    """Writes trials in the form "voxceleb" (`1 enrol test`) or "kaldi" (`enrol test target`), whole or not at all.

    Fields are separated by tabs where a name has white space.
    """
    separator = "\t" if any(len(name.split()) > 1 for _, *names in trials for name in names) else " "
    lines = []
    for same, enrol, test in trials:
        fields = [str(int(same)), enrol, test]
        if form == "kaldi":
            fields = [enrol, test, "target" if same else "nontarget"]
        lines.append(separator.join(fields) + "\n")
    write_text(path, "".join(lines))


def trials_of(
    path: str | os.PathLike,
    output: str | os.PathLike,
    *,
    genders: str | os.PathLike | None = None,
    form: str = "voxceleb",
    **options: Any,
) -> dict:
    """Makes a trial list of labelled recordings and writes it; options as for `make_trials`.

    Returns {"output", "targets", "nontargets", "speakers", "recordings", "seed"}, the last two counted in the list.
    Raises like `labelled_recordings`, `read_table` and `make_trials`.
    """
    table = None if genders is None else read_table(genders, "speaker", "gender")
    speakers = labelled_recordings(path)
    trials = make_trials(speakers, genders=table, **options)
    write_trials(output, trials, form)
    used = {name for _, *names in trials for name in names}
    return {
        "output": str(output),
        "targets": sum(same for same, *_ in trials),
        "nontargets": sum(not same for same, *_ in trials),
        "speakers": len({speakers[name] for name in used}),
        "recordings": len(used),
        "seed": options.get("seed", 0),
    }


def trials_text(report: Mapping) -> str:
    """Returns the report of `trials_of` as human-readable text."""
    return (
        f"{plural(report['targets'], 'target trial')} and {report['nontargets']:,} nontarget ones of "
        f"{plural(report['speakers'], 'speaker')} and {plural(report['recordings'], 'recording')}, "
        f"seed {report['seed']}\n{report['output']}"
    )
