"""`memo-jax trials`: lists are seeded, balanced, without duplicates or pairs within a session, and can be scored."""

import collections
import json

import pytest

import tiny
from memo_jax.data.trial_lists import make_trials, session
from memo_jax.scoring.trials import read_trials

# Six speakers of very different sizes, in sessions.
SPEAKERS = {
    f"s{i}/day{day}/{number}.wav": f"s{i}"
    for i, numbers in enumerate((1, 2, 3, 5, 8, 40))
    for day in range(2)
    for number in range(numbers)
}
GENDERS = {f"s{i}": "fm"[i % 2] for i in range(6)}


def speakers_of(trial):
    return SPEAKERS[trial[1]], SPEAKERS[trial[2]]


def test_labels_are_right_no_pair_is_there_twice_and_targets_cross_sessions():
    trials = make_trials(SPEAKERS, targets=60, nontargets=500, seed=1)
    assert sum(same for same, *_ in trials) == 60 and len(trials) == 560
    assert all(same == (len(set(speakers_of((same, a, b)))) == 1) for same, a, b in trials)
    assert len({frozenset(pair) for _, *pair in trials}) == 560 and all(a != b for _, a, b in trials)
    assert all(session(a) != session(b) for same, a, b in trials if same)
    within = make_trials(SPEAKERS, targets=60, nontargets=1, same_session=True)
    assert any(session(a) == session(b) for same, a, b in within if same)
    labels = "".join(str(int(same)) for same, *_ in trials)
    assert "1" in labels[:60] and "0" in labels[-60:]  # shuffled


def test_trials_are_shared_out_evenly_whatever_a_speaker_has():
    trials = make_trials(SPEAKERS, targets=60, nontargets=120)
    targets = collections.Counter(speakers_of(trial)[0] for trial in trials if trial[0])
    assert targets == {"s0": 1, "s1": 4, "s2": 9, "s3": 16, "s4": 15, "s5": 15}  # the first have no more pairs
    enrolled = collections.Counter(speakers_of(trial)[0] for trial in trials if not trial[0])
    assert set(enrolled.values()) == {20}
    tested = collections.Counter(speakers_of(trial)[1] for trial in trials if not trial[0])
    assert max(tested.values()) < 3 * min(tested.values()) and len(tested) == 6
    default = make_trials(SPEAKERS)
    targets = collections.Counter(speakers_of(trial)[0] for trial in default if trial[0])
    assert targets == {"s0": 1, "s1": 4, "s2": 9, "s3": 10, "s4": 10, "s5": 10} and len(default) == 2 * 44


def test_a_list_depends_on_its_seed_alone():
    backwards = dict(reversed(SPEAKERS.items()))
    assert make_trials(SPEAKERS, seed=3) == make_trials(backwards, seed=3) != make_trials(SPEAKERS, seed=4)


def test_within_a_gender():
    trials = make_trials(SPEAKERS, genders=GENDERS, nontargets=400)
    assert all(GENDERS[a] == GENDERS[b] for a, b in map(speakers_of, trials))
    with pytest.raises(ValueError, match="lacks 1 speaker, such as 's5'"):
        make_trials(SPEAKERS, genders={who: gender for who, gender in GENDERS.items() if who != "s5"})


def test_all_pairs_there_are_can_be_had_and_no_more():
    few = {f"{who}/{i}.wav": who for who in "abc" for i in range(3)}
    trials = make_trials(few, targets=9, nontargets=27)
    assert len({frozenset(pair) for _, *pair in trials}) == 36 == 9 * 8 // 2
    with pytest.raises(
        ValueError, match="10 target trials are wanted and there are 9 pairs of recordings of one speaker$"
    ):
        make_trials(few, targets=10)
    with pytest.raises(ValueError, match="28 nontarget trials are wanted and there are 27 pairs"):
        make_trials(few, nontargets=28)
    with pytest.raises(ValueError, match="all recordings come from 'a'"):
        make_trials({"a/1.wav": "a", "a/2.wav": "a"})
    with pytest.raises(ValueError, match="0 pairs of recordings of one speaker of different sessions"):
        make_trials({"a/x/1.wav": "a", "a/x/2.wav": "a", "b/x/1.wav": "b"}, targets=1)


@pytest.mark.parametrize("form", ["voxceleb", "kaldi"])
def test_the_command_writes_a_list_that_eval_and_score_read(form, tmp_path):
    material = tiny.material()
    (tmp_path / "genders").write_text("s0 f\ns1 m\ns2 f\ns3 m\ns4 f\n")
    command = ["trials", "--form", form, "--seed", 5, "--targets", 20, "--nontargets", 30]
    outputs = []
    for name, source in (("dataset", material.dataset), ("folder", material.corpus)):
        status, text = tiny.here(*command, source, "-o", tmp_path / name, "--same-gender", tmp_path / "genders")
        assert status == 0 and "20 target trials and 30 nontarget ones of 5 speakers" in text, text
        outputs.append((tmp_path / name).read_text())
    assert outputs[0] == outputs[1]  # names are those that prepare gives
    trials = read_trials(tmp_path / "dataset")
    assert len(trials) == 50 and trials.target.sum() == 20
    assert all((a[:2] == b[:2]) == same for a, b, same in zip(trials.enrol, trials.test, trials.target))
    status, text = tiny.here("trials", material.corpus, "-o", tmp_path / "t", "--json")
    assert status == 0 and json.loads(text)["targets"] == 5 * 6 == json.loads(text)["nontargets"]


def test_names_with_spaces_are_separated_by_tabs(tmp_path):
    folder = tiny.write_corpus(tmp_path / "in", speakers=2, utterances=2)
    (folder / "s0" / "0.wav").rename(folder / "s0" / "my voice.wav")
    status, text = tiny.here("trials", folder, "-o", tmp_path / "list")
    assert status == 0 and "s0/my voice.wav" in read_trials(tmp_path / "list").recordings, text


def test_impossible_requests_are_reported_and_nothing_is_written(tmp_path):
    corpus = tiny.material().corpus
    (tmp_path / "bad").write_text("s0\n")
    (tmp_path / "twice").write_text("s0 f\ns0 m\n")
    (tmp_path / "empty").mkdir()
    flat = tiny.write_corpus(tmp_path / "one", speakers=1) / "s0"
    for arguments, message in (
        ((tmp_path / "gone",), "gone: no such folder of recordings"),
        ((tmp_path / "empty",), f"no recordings in {tmp_path / 'empty'}"),
        ((flat,), "no recording has a known speaker"),
        ((corpus, "--targets", "0"), "'0' is not a whole number of at least 1"),
        ((corpus, "--targets", "99"), "99 target trials are wanted and there are 30 pairs"),
        ((corpus, "--same-gender", tmp_path / "bad"), "bad, line 1: expected `speaker gender`"),
        ((corpus, "--same-gender", tmp_path / "twice"), "twice, line 2: the gender of 's0' is 'm' here and 'f' before"),
    ):
        status, text = tiny.here("trials", *arguments, "-o", tmp_path / "list")
        assert status == 2 and message in text, text
    assert not (tmp_path / "list").exists()
