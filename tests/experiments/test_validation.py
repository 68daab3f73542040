"""The validation list: whose recordings it takes, what it leaves to train on, and that it is reproducible."""

import sys

import pytest

import tiny

sys.path.insert(0, str(tiny.ROOT / "experiments"))
import validation  # noqa: E402
from memo_jax.data.kaldi import kaldi_utterances  # noqa: E402
from memo_jax.scoring.trials import read_trials  # noqa: E402

DAYS_APART, SAME_DAY, SINGLE = 8, 8, 6  # speakers


@pytest.fixture
def corpus(tmp_path):
    """Empty recordings, since none is read: in two languages; for half of the speakers with several, from two days."""
    folder, number = tmp_path / "corpus", 17_000_000
    for speaker in range(DAYS_APART + SAME_DAY + SINGLE):
        of_speaker = folder / f"cv{speaker:03}"
        of_speaker.mkdir(parents=True)
        days = [0, 0, 50_000, 50_000] if speaker < DAYS_APART else [0, 0, 0][: 1 if speaker >= 16 else 3]
        for clip, later in enumerate(days):
            number += 10
            (of_speaker / f"{'cy' if speaker % 2 else 'fy-NL'}_{number + later + clip}.opus").touch()
    return folder


def made(corpus, output, *more):
    status = validation.main(["--input", str(corpus), "--output", str(output), *more])
    return status, read_trials(output / "trials.txt") if status == 0 else None


def speaker(name):
    return name.split("/")[0]


def number(name):
    return int(name.split("_")[-1].removesuffix(".opus"))


def test_validation_speakers_are_left_out_of_training_and_trials_are_theirs(corpus, tmp_path):
    status, trials = made(corpus, tmp_path / "lists", "--speakers", "6")
    train, held_out = (list(kaldi_utterances(tmp_path / "lists" / part)) for part in ("train", "validation"))
    assert status == 0
    chosen = {speaker(name) for name in trials.recordings}
    assert len(chosen) == 6 and {u.name for u in held_out} == set(trials.recordings)
    assert {u.speaker for u in held_out} == chosen
    everybody = {path.parent.name for path in corpus.glob("*/*")}
    assert {speaker(u.name) for u in train} == everybody - chosen, "nobody else is missing"
    assert all(u.speaker == "" for u in train), "training sees no label"
    assert all(u.source == str(corpus / u.name) for u in train + held_out)


def test_target_trials_are_of_different_days_and_half_the_others_of_one_language(corpus, tmp_path):
    _, trials = made(corpus, tmp_path / "lists", "--speakers", str(DAYS_APART), "--nontargets", "4")
    pairs = list(zip(trials.enrol, trials.test, trials.target))
    assert all((speaker(a) == speaker(b)) == target for a, b, target in pairs)
    assert all(abs(number(a) - number(b)) > 20_000 for a, b, target in pairs if target)
    others = [validation.language(a) == validation.language(b) for a, b, target in pairs if not target]
    assert len(others) == 4 * trials.target.sum() and sum(others) >= len(others) / 2
    assert len({frozenset(pair[:2]) for pair in pairs}) == len(pairs), "no trial twice"


def test_speakers_of_one_day_are_taken_where_others_do_not_suffice(corpus, tmp_path):
    status, trials = made(corpus, tmp_path / "lists", "--speakers", "12", "--targets", "2")
    chosen = {speaker(name) for name in trials.recordings}
    assert status == 0 and len(chosen) == 12 and {f"cv{i:03}" for i in range(DAYS_APART)} <= chosen
    of_speaker = [speaker(a) for a, target in zip(trials.enrol, trials.target) if target]
    assert {of_speaker.count(name) for name in chosen} == {2}


def test_a_seed_decides_the_lists(corpus, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert made(corpus, tmp_path / name, "--speakers", "5", "--seed", seed)[0] == 0
    texts = [
        [(tmp_path / name / file).read_text() for file in ("trials.txt", "train/wav.scp", "validation/utt2spk")]
        for name in "abc"
    ]
    assert texts[0] == texts[1] and all(a != c for a, c in zip(texts[0], texts[2]))


def test_what_does_not_fit_is_named(corpus, tmp_path, capsys):
    assert made(corpus, tmp_path / "lists", "--speakers", "17")[0] == 2
    assert "only 16 speakers have 2 to 16 recordings" in capsys.readouterr().err
    (corpus / "cv000" / "notes.txt").touch()
    assert made(corpus, tmp_path / "lists", "--speakers", "2")[0] == 2
    assert "notes.txt: expected a recording called LANGUAGE_NUMBER" in capsys.readouterr().err
    assert made(tmp_path / "nowhere", tmp_path / "lists")[0] == 2
    assert "no recordings" in capsys.readouterr().err
    assert not (tmp_path / "lists").exists()
