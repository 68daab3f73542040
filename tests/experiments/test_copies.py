"""Copies of recordings: what they are named, whose they are, and that they sound as they should."""

import shutil
import sys

import numpy as np
import pytest
import soundfile

import tiny

sys.path.insert(0, str(tiny.ROOT / "experiments"))
import copies  # noqa: E402
from memo_jax.data.batches import Utterances  # noqa: E402


def made(folder, *more):
    """The dataset that the copies become."""
    given = ("--data", str(tiny.material().dataset), "--output", str(folder / "copies"))
    assert copies.main([*given, *more]) == 0
    status, text = tiny.here("prepare", "--input", folder / "copies", "--output", folder / "dataset")
    assert status == 0, text
    return Utterances(folder / "dataset")


def loudest_frequency(wave):
    """In Hz, of int16 [L]."""
    return np.argmax(np.abs(np.fft.rfft(wave))) * 16_000 / len(wave)


def test_a_faster_copy_is_shorter_and_higher_and_of_another_speaker(tmp_path):
    original, copied = Utterances(tiny.material().dataset), made(tmp_path, "--speed", "1.25")
    rows = {name: row for row, name in enumerate(original.names)}
    assert {name.removeprefix("speed-1.25/") for name in copied.names} == set(rows)
    for name, speaker, wave in zip(copied.names, copied.speakers, copied):
        row = rows[name.removeprefix("speed-1.25/")]
        assert speaker == f"speed-1.25/{original.speakers[row]}"
        assert len(wave) == pytest.approx(len(original[row]) / 1.25, abs=2)
        assert loudest_frequency(wave) == pytest.approx(1.25 * loudest_frequency(original[row]), rel=0.02)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_a_copy_through_a_codec_is_of_the_same_speaker(tmp_path):
    original, copied = Utterances(tiny.material().dataset), made(tmp_path, "--codec", "mp3:32k")
    rows = {name: row for row, name in enumerate(original.names)}
    assert len(copied) == len(original)
    for name, speaker, wave in zip(copied.names, copied.speakers, copied):
        row = rows[name.removeprefix("mp3-32k/")]
        assert speaker == original.speakers[row] and len(wave) >= len(original[row])
        assert loudest_frequency(wave) == pytest.approx(loudest_frequency(original[row]), rel=0.02)


def test_a_name_with_a_space_is_refused(tmp_path, capsys):
    """It could not be read back."""
    (tmp_path / "speech" / "a").mkdir(parents=True)
    soundfile.write(tmp_path / "speech" / "a" / "one two.wav", np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    status, text = tiny.here("prepare", "--input", tmp_path / "speech", "--output", tmp_path / "spaced")
    assert status == 0, text
    given = ("--data", str(tmp_path / "spaced"), "--output", str(tmp_path / "copies"))
    assert copies.main([*given, "--speed", "0.9"]) == 2 and "'a/one two.wav' has a space" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "give --speed or --codec"),
        (("--speed", "3"), "--speed 3: must be between 0.5 and 2"),
        (("--codec", "opus"), "expected CODEC:RATE"),
        (("--codec", "amr:8k"), "of opus, mp3, vorbis"),
    ],
)
def test_bad_arguments(more, message, tmp_path, capsys):
    given = ("--data", str(tiny.material().dataset), "--output", str(tmp_path / "copies"))
    assert copies.main([*given, *more]) == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "copies").exists()
