"""Splits a folder of labelled speech into a validation list and what is left to train on.

    python experiments/validation.py --input speech/commonvoice/train --output lists/validation

Choices (sizes, learning rates, lengths) are made on the validation list, so that the test lists stay unseen. Its
speakers are left out of training with all their recordings. The input is a folder with one folder per speaker.
Recordings are called LANGUAGE_NUMBER.EXTENSION, as in Common Voice. Numbers far apart mostly mean another day, so
the target trials are of such pairs where a speaker has any.

Writes into the output folder: `trials.txt` (VoxCeleb form), `validation/` and `train/` (Kaldi data folders, inputs of
`memo-jax prepare`). train/ has no utt2spk: nothing that learns from it can see a label. `study/` is a part of train/
that is small enough for many epochs: some recordings of every speaker who has several, with utt2spk.
"""

import argparse
import itertools
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

NUMBERED = re.compile(r"(?P<language>[^_]+)_(?P<number>\d+)\.\w+$")


def recordings_by_speaker(folder: Path) -> dict[str, list[str]]:
    """Returns {speaker: names of recordings, relative to `folder`, sorted}; ValueError names what does not fit."""
    found = defaultdict(list)
    for path in sorted(folder.glob("*/*")):
        if not NUMBERED.match(path.name):
            raise ValueError(f"{path}: expected a recording called LANGUAGE_NUMBER.EXTENSION")
        if re.search(r"\s", str(path.absolute())):
            raise ValueError(f"{path}: white space in a path, which Kaldi's tables cannot hold")
        found[path.parent.name].append(f"{path.parent.name}/{path.name}")
    if not found:
        raise ValueError(f"{folder}: no recordings in folders of speakers")
    return dict(found)


def language(name: str) -> str:
    """Returns the language that a recording's name begins with."""
    return NUMBERED.match(Path(name).name)["language"]


def pairs_apart(names: list[str], gap: int) -> list[tuple[str, str]]:
    """Returns the pairs of a speaker's recordings whose numbers differ by more than `gap`."""
    number = {name: int(NUMBERED.match(Path(name).name)["number"]) for name in names}
    return [(a, b) for a, b in itertools.combinations(names, 2) if abs(number[a] - number[b]) > gap]


def choose_speakers(of_speaker: dict[str, list[str]], count: int, most: int, gap: int, rng) -> list[str]:
    """Returns `count` speakers with 2 to `most` recordings, those with recordings far apart first, sorted."""
    fit = [speaker for speaker, names in sorted(of_speaker.items()) if 2 <= len(names) <= most]
    if len(fit) < count:
        raise ValueError(f"only {len(fit)} speakers have 2 to {most} recordings: --speakers can be {len(fit)} at most")
    order = [fit[i] for i in rng.permutation(len(fit))]
    order.sort(key=lambda speaker: not pairs_apart(of_speaker[speaker], gap))  # stable: still random within each kind
    return sorted(order[:count])


def make_trials(of_speaker: dict[str, list[str]], gap: int, targets: int, nontargets: int, rng):
    """Returns trials (label, enrol, test) of these speakers, in random order.

    Args:
      of_speaker: {speaker: names}, the validation speakers only.
      gap: target pairs are of recordings whose numbers differ by more than this, where a speaker has such.
      targets: most target trials of a speaker, so that none of them dominates.
      nontargets: trials of different speakers for each target trial. Every other one is of one language, as far as the
        enrolled speaker's language has other speakers.
      rng: a NumPy generator.
    """
    of_language = defaultdict(list)
    for speaker, names in of_speaker.items():
        of_language[language(names[0])].append(speaker)
    trials, seen = [], set()
    for speaker, names in of_speaker.items():
        pairs = pairs_apart(names, gap) or list(itertools.combinations(names, 2))
        chosen = [pairs[i] for i in sorted(rng.permutation(len(pairs))[:targets])]
        trials += [(1, a, b) for a, b in chosen]
        everybody = [other for other in of_speaker if other != speaker]
        neighbours = [other for other in of_language[language(names[0])] if other != speaker]
        for number in range(nontargets * len(chosen)):
            others = neighbours if neighbours and number % 2 else everybody
            for _ in range(20):  # a small language soon has no new pair
                other = of_speaker[others[rng.integers(len(others))]]
                pair = names[rng.integers(len(names))], other[rng.integers(len(other))]
                if frozenset(pair) not in seen:
                    seen.add(frozenset(pair))
                    trials.append((0, *pair))
                    break
    return [trials[i] for i in rng.permutation(len(trials))]


def few_of_each(of_speaker: dict[str, list[str]], least: int, most: int, rng) -> list[str]:
    """Returns up to `most` recordings, chosen at random, of every speaker who has at least `least`."""
    return [
        names[i]
        for names in of_speaker.values()
        if len(names) >= least
        for i in sorted(rng.permutation(len(names))[:most])
    ]


def write_kaldi(folder: Path, root: Path, names: list[str], with_speakers: bool) -> None:
    """Writes a Kaldi data folder whose utterances are called as they are in `root`."""
    folder.mkdir(parents=True, exist_ok=True)
    root = root.absolute()
    (folder / "wav.scp").write_text("".join(f"{name} {root / name}\n" for name in names))
    if with_speakers:
        (folder / "utt2spk").write_text("".join(f"{name} {name.split('/')[0]}\n" for name in names))


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, help="folder with one folder per speaker")
    parser.add_argument("--output", type=Path, required=True, help="folder for the lists")
    parser.add_argument("--speakers", type=int, default=200, help="how many to validate on")
    parser.add_argument("--most", type=int, default=16, help="speakers with more recordings stay in training")
    parser.add_argument("--gap", type=int, default=20_000, help="numbers that differ by more are of another day")
    parser.add_argument("--targets", type=int, default=15, help="most target trials of a speaker")
    parser.add_argument("--nontargets", type=int, default=5, help="trials of different speakers for each target trial")
    parser.add_argument("--study-least", type=int, default=3, help="recordings that a speaker in study/ has at least")
    parser.add_argument("--study-most", type=int, default=4, help="how many of them study/ takes at most")
    parser.add_argument("--seed", type=int, default=0, help="of speakers and trials")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(options.seed)
    try:
        everybody = recordings_by_speaker(options.input)
        chosen = choose_speakers(everybody, options.speakers, options.most, options.gap, rng)
        validation = {speaker: everybody[speaker] for speaker in chosen}
        trials = make_trials(validation, options.gap, options.targets, options.nontargets, rng)
        needed = sorted({name for _, *pair in trials for name in pair})
        others = {speaker: names for speaker, names in everybody.items() if speaker not in validation}
        train = [name for names in others.values() for name in names]
        study = few_of_each(others, options.study_least, options.study_most, rng)
        write_kaldi(options.output / "validation", options.input, needed, True)
        write_kaldi(options.output / "train", options.input, train, False)
        write_kaldi(options.output / "study", options.input, study, True)
        (options.output / "trials.txt").write_text("".join(f"{label} {a} {b}\n" for label, a, b in trials))
    except (ValueError, OSError) as error:
        print(f"validation.py: error: {error}", file=sys.stderr)
        return 2
    targets = sum(label for label, *_ in trials)
    alike = sum(not label and language(a) == language(b) for label, a, b in trials)
    apart = sum(bool(pairs_apart(names, options.gap)) for names in validation.values())
    print(
        f"{len(validation)} validation speakers ({apart} with recordings far apart), {len(needed)} recordings, "
        f"{targets} target and {len(trials) - targets} nontarget trials ({alike} of these of one language); "
        f"{len(train)} recordings of {len(others)} speakers are left to train on, "
        f"{len(study)} of {len({name.split('/')[0] for name in study})} speakers for the study"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
