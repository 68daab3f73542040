"""The harder list: what it writes is read by `prepare`, second recordings differ as they should, and it repeats."""

import sys

import numpy as np
import pytest
import soundfile

import tiny

sys.path.insert(0, str(tiny.ROOT / "experiments"))
import degrade  # noqa: E402
from memo_jax.data.batches import Utterances  # noqa: E402
from memo_jax.scoring.trials import read_trials  # noqa: E402

RATE = 16_000


@pytest.fixture
def folders(tmp_path):
    """Noise, and a room whose response is the direct sound and one echo."""
    for name, wave in (("noise", np.random.default_rng(0).normal(0, 0.1, RATE)), ("room", np.eye(1, 800)[0])):
        (tmp_path / name).mkdir()
        wave[400:401] += 0.5 * (name == "room")
        soundfile.write(tmp_path / name / "0.wav", wave, RATE)
    return tmp_path


def arguments(folders, output, *more):
    found = tiny.material()
    given = {"data": found.dataset, "trials": found.trials, "noise": folders / "noise", "rirs": folders / "room"}
    given |= {"output": folders / output}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))] + list(more)


def test_the_list_is_the_same_with_degraded_second_recordings(folders):
    assert degrade.main(arguments(folders, "one")) == 0
    recordings = folders / "one" / "recordings"
    status, text = tiny.here("prepare", "--input", recordings, "--output", folders / "dataset")
    assert status == 0, text
    original, harder = Utterances(tiny.material().dataset), Utterances(folders / "dataset")
    rows = {name: row for row, name in enumerate(harder.names)}
    before, after = read_trials(tiny.material().trials), read_trials(folders / "one" / "trials.txt")
    assert (after.target == before.target).all() and set(after.recordings) <= rows.keys()
    assert {name.split("/")[0] for name in harder.names} == set(harder.speakers) <= set(original.speakers)
    names = {name: row for row, name in enumerate(original.names)}
    for name, changed in zip(before.test, after.test):
        wave, heard = original[names[name]].astype(float), harder[rows[changed]].astype(float)
        np.testing.assert_array_equal(harder[rows[degrade.flac_name(name, False)]], wave)
        assert len(heard) == len(wave) and np.std(heard) == pytest.approx(np.std(wave), rel=0.01)
        assert 0.3 < np.corrcoef(wave, heard)[0, 1] < 0.998, "noise at 5 to 20 dB, with or without the room"


def test_the_same_seed_writes_the_same_recordings(folders):
    waves = []
    for output, seed in (("one", "0"), ("two", "0"), ("three", "1")):
        assert degrade.main(arguments(folders, output, "--seed", seed)) == 0
        path = min((folders / output / "recordings").rglob("*.degraded.flac"))
        waves.append(soundfile.read(path)[0])
    assert (waves[0] == waves[1]).all() and (waves[0] != waves[2]).any()


def test_what_is_missing_is_named(folders, capsys):
    (folders / "trials.txt").write_text("1 s0/0.wav s0/nobody.wav\n0 s0/0.wav s1/0.wav\n")
    assert degrade.main([*arguments(folders, "one"), "--trials", str(folders / "trials.txt")]) == 2
    assert "no recording 's0/nobody.wav'" in capsys.readouterr().err
    (folders / "noise" / "0.wav").unlink()
    assert degrade.main(arguments(folders, "one")) == 2
    assert f"{folders / 'noise'}: no recordings" in capsys.readouterr().err


def test_names_that_cannot_be_told_apart_and_lists_without_labels_are_refused(folders, capsys):
    lines = tiny.material().trials.read_text().splitlines()
    (folders / "pairs.txt").write_text("".join(f"{line.split(maxsplit=1)[1]}\n" for line in lines))
    (folders / "alike.txt").write_text("1 s0/0.wav s0/0.flac\n0 s0/0.wav s1/0.wav\n")
    for name, said in (("pairs", "pairs.txt has no labels"), ("alike", "differ only in their extensions")):
        assert degrade.main(arguments(folders, name, "--trials", str(folders / f"{name}.txt"))) == 2
        assert said in capsys.readouterr().err and not (folders / name).exists()
    assert degrade.flac_name("a b/utt.1", True) == "a b/utt.1.degraded.flac"
