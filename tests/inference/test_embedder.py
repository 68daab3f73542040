"""The Python API as users see it: paths, arrays and lists in, embeddings, decisions and people out; bad input."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
import soundfile

import memo_jax
import tiny
from memo_jax.app.answers import Answers
from memo_jax.audio import AudioError, read_audio
from memo_jax.inference.embedder import DEFAULT_THRESHOLD, Embedder
from memo_jax.inference.model_file import ModelFileError, write_model
from memo_jax.scoring.embedding_file import OtherModelError, read_embeddings

RATE = 16000


@pytest.fixture(scope="module")
def embedder():
    return memo_jax.Embedder.load(tiny.model_file())


@pytest.fixture(scope="module")
def corpus():
    return tiny.material().corpus


def test_importing_the_package_imports_nothing_heavy_until_the_embedder_is_asked_for():
    code = (
        "import sys, memo_jax; print('numpy' in sys.modules); memo_jax.Embedder; "
        "print(*({'numpy', 'jax', 'flax', 'onnxruntime'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=tiny.environment(), capture_output=True, text=True)
    assert done.stdout.split() == ["False", "numpy"], done.stderr
    with pytest.raises(AttributeError, match="Embeder"):
        _ = memo_jax.Embeder


def test_a_recording_has_one_embedding_however_it_is_given(embedder, corpus):
    """Path, text, floats, integers, stereo, alone or in a list; within 1e-4 of the norm for 16 bits."""
    path = corpus / "s0" / "0.wav"
    samples, rate = soundfile.read(path)
    wanted = embedder.embed(path)
    assert wanted.shape == (embedder.dimension,) == (8,) and wanted.dtype == np.float32
    integers = read_audio(path)
    others = [
        str(path),
        (samples, rate),
        (samples.astype(np.float32), rate),
        (integers, rate),
        (np.stack([samples, samples], axis=1), rate),
        (jax.numpy.asarray(samples), rate),
    ]
    for other in others:
        np.testing.assert_allclose(embedder.embed(other), wanted, atol=1e-4 * np.linalg.norm(wanted))
    many = embedder.embed([*others, corpus / "s1" / "0.wav"])
    assert many.shape == (7, 8)
    np.testing.assert_allclose(many[:6], np.tile(wanted, (6, 1)), atol=1e-4 * np.linalg.norm(wanted))
    np.testing.assert_allclose(embedder.embed(samples, rate), wanted, atol=1e-4 * np.linalg.norm(wanted))
    np.testing.assert_allclose(embedder.embed([samples, samples], rate)[1], wanted, atol=1e-4 * np.linalg.norm(wanted))
    assert embedder.embed([]).shape == (0, 8)


def test_arguments_in_the_wrong_place_are_refused(embedder, corpus, tmp_path):
    """A threshold or a second recording where the rate belongs; and a threshold that no cosine reaches."""
    a, b = (str(corpus / "s0" / f"{number}.wav") for number in range(2))
    with pytest.raises(AudioError, match="sample rate out of range: 0.99 Hz"):
        embedder.verify(a, b, 0.99)
    for wrong in (lambda: embedder.embed(a, b), lambda: Embedder.load(tiny.model_file()).enroll("Ada", a, b)):
        with pytest.raises(ValueError, match="not a number of Hz: give several recordings as a list"):
            wrong()
    both = embedder.embed([a, b])
    np.testing.assert_array_equal(embedder.embed(np.array([a, b])), both)
    pairs = tuple(soundfile.read(path) for path in (a, b))
    np.testing.assert_allclose(embedder.embed(pairs), both, atol=1e-4 * np.linalg.norm(both))
    for threshold in (60, float("nan")):
        with pytest.raises(ValueError, match="the threshold is"):
            embedder.threshold = threshold


def test_another_rate_gives_nearly_the_same(embedder):
    """8 kHz loses what lies above 4 kHz, so a tone below it is compared; 48 kHz loses nothing."""
    time = np.arange(48000) / 48000
    tone = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 1320 * time)
    one, other = embedder.embed([(tone, 48000), (tone[::3], 16000)])
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.99


def test_verify_is_a_cosine_against_the_threshold_of_the_model(embedder, corpus):
    a, b = corpus / "s0" / "0.wav", corpus / "s1" / "0.wav"
    one, other = embedder.embed([a, b])
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    score, decision, threshold = embedder.verify(a, b)
    assert score == pytest.approx(cosine, abs=1e-5) and threshold == 0.4 and decision == (score >= 0.4)
    assert embedder.threshold_source == "a list"
    assert not embedder.verify(a, b, threshold=cosine + 0.001).decision
    assert embedder.verify(a, b, threshold=cosine - 0.001).decision
    same = embedder.verify(a, soundfile.read(a)[0], RATE)
    assert same.decision and same.score == pytest.approx(1, abs=1e-4) and same.score <= 1


def test_without_a_tuned_threshold_the_default_is_taken_and_said(tmp_path):
    path = write_model(tmp_path / "model", dataclasses.replace(tiny.untrained_model(), decision=None))
    loaded = Embedder.load(path)
    assert loaded.threshold == DEFAULT_THRESHOLD
    assert "not tuned" in loaded.threshold_source and "--save-threshold" in loaded.threshold_source


def test_people_are_enrolled_kept_in_a_file_and_found_again(corpus, tmp_path):
    gallery = tmp_path / "people.npz"
    first = Embedder.load(tiny.model_file(), gallery=gallery)
    first.enroll("Ada", [corpus / "s0" / "0.wav", corpus / "s0" / "1.wav"])
    first.enroll("Jürgen M", corpus / "s4" / "0.wav")
    second = Embedder.load(tiny.model_file(), gallery=gallery)
    assert second.gallery.names == ["Ada", "Jürgen M"]
    found = second.identify(corpus / "s4" / "0.wav")
    assert (found.name, found.nearest) == ("Jürgen M", "Jürgen M") and found.score == pytest.approx(1, abs=1e-4)
    stranger = second.identify(corpus / "s2" / "0.wav", threshold=1.0)
    assert stranger.name is None and stranger.nearest in ("Ada", "Jürgen M") and -1 <= stranger.score < 1
    ada = read_embeddings(gallery).embeddings[0]
    units = [row / np.linalg.norm(row) for row in first.embed([corpus / "s0" / "0.wav", corpus / "s0" / "1.wav"])]
    np.testing.assert_allclose(ada, sum(units) / np.linalg.norm(sum(units)), atol=1e-6)

    before = gallery.read_bytes()
    with pytest.raises(ValueError, match="'Ada' is enrolled already"):
        second.enroll("Ada", corpus / "s1" / "0.wav")
    for name, recordings in (("", [corpus / "s1" / "0.wav"]), ("Bob", []), ("Bob", [corpus / "none.wav"])):
        with pytest.raises(ValueError):
            second.enroll(name, recordings)
    assert gallery.read_bytes() == before and second.gallery.names == ["Ada", "Jürgen M"]
    second.gallery.remove("Ada")
    assert second.identify(corpus / "s0" / "0.wav").nearest == "Jürgen M"
    with pytest.raises(ValueError, match="nobody is enrolled as 'Ada'"):
        second.gallery.remove("Ada")


def test_nobody_enrolled_and_a_gallery_that_cannot_be_written(embedder, corpus, tmp_path):
    with pytest.raises(ValueError, match="nobody is enrolled yet"):
        embedder.identify(corpus / "s0" / "0.wav")
    (tmp_path / "file").write_text("")
    broken = Embedder.load(tiny.model_file(), gallery=tmp_path / "file" / "people.npz")
    with pytest.raises(OSError, match="file"):
        broken.enroll("Ada", corpus / "s0" / "0.wav")
    assert not broken.gallery.names


def test_what_others_do_to_the_file_of_a_gallery_is_seen(corpus, tmp_path):
    path, recording = tmp_path / "people.npz", corpus / "s0" / "0.wav"
    one, other = (Embedder.load(tiny.model_file(), gallery=path) for _ in range(2))
    one.enroll("Ada", recording)
    other.enroll("Bo", recording)
    with pytest.raises(ValueError, match="'Bo' is enrolled already"):
        one.enroll("Bo", recording)
    other.remove("Ada")
    one.enroll("Ada", recording)
    assert Answers(other).people() == ["Bo", "Ada"]
    assert one.gallery.names == other.gallery.names == ["Bo", "Ada"]
    with pytest.raises(ValueError, match="people.npy"):
        Embedder.load(tiny.model_file(), gallery=tmp_path / "people.npy").enroll("Ada", recording)
    assert [file.name for file in tmp_path.iterdir()] == ["people.npz"]


def test_a_gallery_of_another_model_is_refused(corpus, tmp_path):
    gallery = tmp_path / "people.npz"
    Embedder.load(tiny.model_file(), gallery=gallery).enroll("Ada", corpus / "s0" / "0.wav")
    model = tiny.untrained_model()
    other = dataclasses.replace(model, variables=jax.tree.map(lambda leaf: leaf * np.float32(1.5), model.variables))
    path = write_model(tmp_path / "other", other)
    with pytest.raises(OtherModelError, match="people.npz and the model in use are from different models"):
        Embedder.load(path, gallery=gallery)


def noise(seconds, **options):
    return options.get("level", 0.1) * np.random.default_rng(0).normal(size=round(seconds * RATE))


NAN = noise(1.0)
NAN[5000] = np.nan


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (noise(1), None, "needs its rate"),
        (None, None, "is not a path"),
        (noise(1), 0, "sample rate out of range: 0 Hz"),
        (noise(0), RATE, "no samples"),
        (noise(0.01), RATE, "shorter than 0.5 s: 0.010 s"),
        (np.zeros(RATE), RATE, "silence"),
        (NAN, RATE, "NaN or infinite"),
        (1e5 * noise(1), RATE, "samples out of range"),
        (np.ones(RATE, complex), RATE, "wrong type: complex128"),
        (np.arange(RATE), RATE, "wrong type: int64"),
        (np.zeros((2, 3, 4)), RATE, r"wrong shape: \[2, 3, 4\]"),
        (np.zeros((2, RATE)), RATE, r"wrong shape: \[2, 16000\], expected \[samples\] or \[samples, channels\]"),
    ],
)
def test_arrays_that_are_not_speech_are_reported_with_their_position(samples, rate, message, embedder):
    with pytest.raises(ValueError, match=f"recording 1.*{message}"):
        embedder.embed([(noise(1), RATE), samples if rate is None else (samples, rate)])


def test_clipped_arrays_and_others_beyond_full_scale_are_taken(embedder):
    assert np.isfinite(embedder.embed(noise(1, level=2.0), RATE)).all()


def test_files_that_cannot_be_used_are_named(embedder, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(AudioError, match="text.wav: not readable as audio"):
        embedder.verify(tmp_path / "text.wav", tmp_path / "text.wav")
    with pytest.raises(AudioError, match="none.wav: no such file"):
        embedder.embed([tmp_path / "none.wav"])


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such workdir or model file"):
        Embedder.load(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="is not the workdir of a run"):
        Embedder.load(tmp_path)
    (tmp_path / "text").write_text("text")
    with pytest.raises(ModelFileError, match="not a model file"):
        Embedder.load(tmp_path / "text")
    with pytest.raises(ValueError, match="is a file of resnet: --branch is for workdirs"):
        Embedder.load(tiny.model_file(), branch="ecapa")


def test_an_hour_is_embedded_in_windows(embedder):
    """Its embedding is the mean of the windows' embeddings, each the same as the window's alone."""
    second = (3000 * np.sin(np.arange(RATE) * 0.2)).astype(np.int16)
    long = np.concatenate([np.tile(second, 100), np.tile(second[::-1] // 2, 100)])
    got = embedder.embed(long, RATE)
    halves = embedder.embed([long[: 100 * RATE], long[100 * RATE :]], RATE)
    np.testing.assert_allclose(got, halves.mean(axis=0), atol=1e-4 * np.linalg.norm(got))


def test_the_network_of_the_package_needs_no_name(corpus):
    """It is read from the package, knows its threshold, and says what it was tuned on."""
    own = Embedder.load()
    assert own.dimension == 256 and own.fingerprint == "85cbcb0a60b086206cc809f78755ffc6"
    assert 0 < own.threshold < 1 and "trials" in own.threshold_source
    one, other = corpus / "s0" / "0.wav", corpus / "s1" / "0.wav"
    assert own.verify(one, one).score == pytest.approx(1, abs=1e-5)
    assert own.verify(one, other).score < 0.999
    status, text = tiny.here("verify", one, one)
    assert status == 0 and "score" in text.lower()


def test_a_person_is_removed_from_the_gallery_and_its_file(tmp_path, corpus):
    path = tmp_path / "people.npz"
    kept, forgotten = Embedder.load(tiny.model_file(), gallery=path), Embedder.load(tiny.model_file())
    for embedder in (kept, forgotten):
        for name in ("Ada", "Bob"):
            embedder.enroll(name, corpus / "s0" / "0.wav")
        embedder.remove("Ada")
        assert embedder.gallery.names == ["Bob"]
        with pytest.raises(ValueError, match="nobody is enrolled as 'Ada'"):
            embedder.remove("Ada")
    assert read_embeddings(path).names == ["Bob"]
