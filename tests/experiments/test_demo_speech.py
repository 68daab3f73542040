"""The demo's synthetic corpus, and how the demo splits one's own recordings."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import demo  # noqa: E402
import demo_speech  # noqa: E402

SIZES = {"speakers": 3, "utterances": 2, "test_speakers": 2, "test_utterances": 3}


def make(folder, **changes):
    pytest.importorskip("espeakng_loader", reason="the extra `demo` (speech synthesis) is not installed")
    return demo_speech.make_corpus(folder, **(SIZES | {"seed": 1} | changes))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "a folder with spaces"
    make(folder, processes=1)
    return folder


def digests(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_the_corpus_holds_what_was_asked_for(corpus):
    for split, speakers, utterances in (("train", 3, 2), ("test", 2, 3)):
        counts = [len(list(folder.glob("*.wav"))) for folder in (corpus / split).iterdir()]
        assert counts == [utterances] * speakers
    for file in (corpus / "train").rglob("*.wav"):
        info = soundfile.info(file)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert 2 < info.duration < 9
        wave, _ = soundfile.read(file)
        assert -32 < 20 * np.log10(wave.std()) < -16
        assert np.mean(np.abs(wave) > 0.999) < 0.001
    assert len(list((corpus / "noise").iterdir())) > 10 and len(list((corpus / "rirs").iterdir())) > 10


def test_trials_name_test_recordings_and_agree_with_their_folders(corpus):
    trials = [line.split(" ") for line in (corpus / "trials.txt").read_text().splitlines()]
    assert len(trials) == json.loads((corpus / "corpus.json").read_text())["trials"] == 2 * 3 + 3 * 3
    for label, enrol, test in trials:
        assert (corpus / "test" / enrol).is_file() and (corpus / "test" / test).is_file()
        assert (label == "1") == (Path(enrol).parent == Path(test).parent)


def test_the_same_seed_gives_the_same_bytes_however_many_processes(corpus, tmp_path):
    """eSpeak NG carries state between utterances: this holds while each fresh process speaks a fixed list."""
    make(tmp_path / "again", processes=2)
    assert digests(tmp_path / "again") == digests(corpus)


def test_another_seed_gives_other_speech(corpus, tmp_path):
    make(tmp_path / "other", speakers=1, utterances=1, test_utterances=2, seed=2)
    same = set(digests(tmp_path / "other").values()) & set(digests(corpus).values())
    assert not same


def test_a_corpus_made_before_is_kept_and_anything_else_is_not_touched(corpus, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in corpus.rglob("*.wav")}
    make(corpus)
    assert {file: file.stat().st_mtime_ns for file in corpus.rglob("*.wav")} == before
    with pytest.raises(FileExistsError, match="not this demo corpus"):
        make(corpus, seed=2)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=tmp_path.name):
        make(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(demo_speech, "make_banks", fail)
    with pytest.raises(OSError, match="disk full"):
        make(tmp_path / "corpus", speakers=1, utterances=1, test_utterances=2)
    assert not list(tmp_path.iterdir())


def test_the_same_words_of_one_speaker_sound_different_in_every_recording():
    """The channel must move the mean log spectrum by several dB, or simple statistics would recognise speakers."""
    speech = np.random.default_rng(0).standard_normal(48000)
    spectra = []
    for number in range(8):
        wave = demo_speech.record(np.random.default_rng(number), speech).astype(float)
        power = np.abs(np.fft.rfft(wave[: 48000 // 480 * 480].reshape(-1, 480), axis=1)) ** 2
        spectra.append(10 * np.log10(power.mean(axis=0)[6:150]))  # 200 to 5000 Hz
    shapes = np.array(spectra) - np.mean(spectra, axis=1, keepdims=True)
    assert np.sqrt(shapes.var(axis=0).mean()) > 2


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_rooms_start_with_the_direct_sound_and_die_away(seed):
    response = demo_speech.room_response(np.random.default_rng(seed)).astype(float)
    assert response[0] == 1 and np.isfinite(response).all()
    assert 0.1 * 16000 < len(response) < 0.8 * 16000
    energy = response[1:] ** 2
    assert energy[-len(energy) // 4 :].sum() < 0.05 * energy.sum()


@given(st.integers(0, 2**32 - 1), st.integers(8000, 40000))
@settings(max_examples=30, deadline=None)
def test_noise_has_unit_power_and_no_gaps(seed, samples):
    noise = demo_speech.background_noise(np.random.default_rng(seed), samples)
    assert noise.shape == (samples,) and np.isfinite(noise).all()
    assert np.mean(noise**2) == pytest.approx(1, abs=0.05)


@given(st.integers(2, 5), st.integers(2, 6), st.integers(1, 8), st.integers(0, 9))
@settings(deadline=None)
def test_trials_hold_every_target_pair_and_no_pair_twice(speakers, utterances, ratio, seed):
    names = {f"s{s}": [f"s{s}/{u}.wav" for u in range(utterances)] for s in range(speakers)}
    trials = [line.split(" ") for line in demo_speech.make_trials(names, nontargets_per_target=ratio, seed=seed)]
    pairs = [frozenset(pair) for _, *pair in trials]
    assert len(set(pairs)) == len(pairs) and all(len(pair) == 2 for pair in pairs)
    targets = [pair for (label, *_), pair in zip(trials, pairs) if label == "1"]
    assert len(targets) == speakers * utterances * (utterances - 1) // 2
    possible = speakers * (speakers - 1) // 2 * utterances**2
    assert len(pairs) - len(targets) == min(ratio * len(targets), possible)


def test_trials_of_names_with_spaces_are_tabbed():
    lines = demo_speech.make_trials({"Ann B": ["Ann B/1.wav", "Ann B/2.wav"], "C": ["C/1.wav"]})
    assert all(len(line.split("\t")) == 3 for line in lines)


@pytest.mark.parametrize("names", [{}, {"a": ["a/1", "a/2"]}, {"a": ["a/1"], "b": ["b/1"]}])
def test_trials_need_two_speakers_and_one_target_pair(names):
    with pytest.raises(ValueError, match="at least two speakers"):
        demo_speech.make_trials(names)


# One's own recordings


def recordings(speakers, each):
    return [SimpleNamespace(name=f"{s}/{u}.wav", speaker=str(s)) for s in range(speakers) for u in range(each)]


@given(st.integers(10, 60), st.integers(2, 12), st.integers(0, 5))
@settings(deadline=None)
def test_ones_own_speakers_are_either_trained_or_tested_on(speakers, each, seed):
    splits = demo.split_by_speaker(recordings(speakers, each), seed)
    train, test = ({item.speaker for item in splits[name]} for name in ("train", "test"))
    assert train | test == {str(s) for s in range(speakers)} and not train & test
    assert len(test) == min(max(speakers // 5, 2), 40)
    assert len(splits["test"]) == len(test) * each


def test_many_recordings_of_ones_own_are_cut_to_what_fits_into_a_demo():
    splits = demo.split_by_speaker(recordings(300, 50), seed=0)
    assert len(splits["train"]) == demo.MAX_TRAIN and len(splits["test"]) <= demo.MAX_TEST
    assert len({item.speaker for item in splits["train"]}) > 200


def test_recordings_in_no_speakers_folder_are_refused_with_the_layout_to_use():
    flat = [SimpleNamespace(name=f"{number}.wav", speaker="") for number in range(5)]
    with pytest.raises(ValueError, match="0.wav .*SPEECH/speaker/"):
        demo.split_by_speaker(flat + recordings(20, 3), seed=0)


def test_too_few_speakers_are_refused_with_their_number():
    with pytest.raises(ValueError, match="found 4 speakers"):
        demo.split_by_speaker(recordings(4, 3), seed=0)


def test_a_folder_with_another_demo_is_refused_and_named(tmp_path):
    arguments = {"speech": "synthetic", "minutes": None, "seed": 0}
    demo.claim_output(tmp_path, arguments | {"speech": "/a/wrong/folder"})  # failed before it made anything
    demo.claim_output(tmp_path, arguments)
    (tmp_path / "speech").mkdir()
    demo.claim_output(tmp_path, arguments)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        demo.claim_output(tmp_path, arguments | {"seed": 1})


@pytest.mark.parametrize(("trained", "success"), [(0.10, True), (0.24, False), (0.40, False)])
def test_the_demo_says_plainly_whether_training_helped(trained, success, tmp_path, capsys):
    costs = {"min_dcf_0.01": 0.9, "min_dcf_0.05": 0.8}
    results = {
        "untrained": {"eer": 30.0} | costs,
        "trained": {"eer": 100 * trained, "trials": 50, "targets": 10, "log_mel_statistics": {"eer": 25.0} | costs}
        | costs,
    }
    assert demo.print_table(results, tmp_path) is success
    printed = capsys.readouterr().out
    assert ("NOT A SUCCESS" in printed) is not success
    assert "30.00 %" in printed and "25.00 %" in printed and f"{100 * trained:.2f} %" in printed
    assert str(tmp_path / "learning_curve.png") in printed and str(tmp_path / "det.png") in printed
