"""Folders of noise and rooms become arrays."""

import numpy as np
import pytest
import soundfile

from memo_jax.banks import describe_banks, load_banks

RATE = 16000


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, RATE)
    return samples


def noise(count, seed=0):
    return np.random.default_rng(seed).integers(-9999, 9999, count).astype(np.int16)


def test_long_recordings_are_cut_and_short_ones_repeated(tmp_path):
    long = write(tmp_path / "a" / "long.wav", noise(4 * 1600 + 700))
    short = write(tmp_path / "b" / "c" / "short.flac", noise(1000))
    (tmp_path / "LICENSE").write_text("free")
    bank = load_banks(noise=tmp_path, seconds=0.1)["noise"]
    assert bank.dtype == np.int16 and bank.shape == (5, 1600)
    np.testing.assert_array_equal(bank[:4].ravel(), long[:6400])
    np.testing.assert_array_equal(bank[4], np.concatenate([short, short[:600]]))


def test_only_the_kinds_given_are_there(tmp_path):
    write(tmp_path / "a.wav", noise(1600))
    assert load_banks() == {}
    assert load_banks(music=tmp_path, rirs=str(tmp_path), seconds=0.1).keys() == {"music", "rir"}


def test_rows_of_silence_are_dropped(tmp_path):
    sound = noise(1600)
    write(tmp_path / "a.wav", np.concatenate([sound, np.zeros(1600, np.int16), sound]))
    np.testing.assert_array_equal(load_banks(speech=tmp_path, seconds=0.1)["speech"], [sound, sound])
    write(tmp_path / "a.wav", np.zeros(1600, np.int16))
    with pytest.raises(ValueError, match="only silence for the noise bank"):
        load_banks(noise=tmp_path, seconds=0.1)


@pytest.mark.parametrize("after", [100, 9000])
def test_impulse_responses_start_with_the_direct_sound_at_unit_energy(tmp_path, after):
    response = np.zeros(500 + after)
    response[500:] = 0.02 * np.random.default_rng(0).uniform(-1, 1, after)
    response[500], response[530] = -0.1, 0.05
    # a second channel, which must not be mixed in
    write(tmp_path / "room.flac", np.stack([response, np.zeros(500 + after)], axis=1))
    bank = load_banks(rirs=tmp_path, rir_seconds=0.25)["rir"]
    assert bank.dtype == np.float32 and bank.shape == (1, 4000)
    np.testing.assert_allclose(np.square(bank).sum(), 1, rtol=1e-5)
    assert np.abs(bank[0]).argmax() == 0 and bank[0, 0] < 0
    np.testing.assert_allclose(bank[0, 30] / bank[0, 0], -0.5, atol=1e-3)


def test_a_limit_on_memory_chooses_by_seed(tmp_path):
    """Room for 4 of 12 rows: the same four again for a seed, others for another, in the order of the names."""
    everything = np.stack([write(tmp_path / f"{index:02d}.wav", noise(1600, index)) for index in range(12)])
    place = {row.tobytes(): index for index, row in enumerate(everything)}
    chosen = []
    for seed in (0, 0, 1, 2):
        bank = load_banks(noise=tmp_path, seconds=0.1, max_megabytes=4.5 * 3200 / 1e6, seed=seed)["noise"]
        assert bank.shape == (4, 1600)
        chosen.append([place[row.tobytes()] for row in bank])
    assert chosen[0] == chosen[1] and len(set(map(tuple, chosen))) > 1
    assert all(rows == sorted(rows) for rows in chosen)
    np.testing.assert_array_equal(load_banks(noise=tmp_path, seconds=0.1, seed=5)["noise"], everything)


def test_description(tmp_path):
    write(tmp_path / "a.wav", noise(3200))
    text = describe_banks(load_banks(noise=tmp_path, rirs=tmp_path, seconds=0.1))
    assert text == "noise: 2 rows of 0.1 s (0.0 MB); rir: 1 rows of 0.5 s (0.0 MB)"
    assert describe_banks({}) == "no augmentation banks"


def test_folders_that_give_nothing_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_banks(rirs=tmp_path / "nowhere")
    (tmp_path / "README.txt").write_text("nothing here")
    with pytest.raises(ValueError, match="no recordings for the music bank"):
        load_banks(music=tmp_path)
    (tmp_path / "broken.wav").write_text("no sound")
    with pytest.raises(ValueError, match="broken.wav: not readable"):
        load_banks(music=tmp_path)


@pytest.mark.parametrize("options", [{"seconds": 0}, {"rir_seconds": -1}, {"max_megabytes": 0},
                                     {"max_megabytes": 0.001}])
def test_numbers_out_of_range_are_named(tmp_path, options):
    write(tmp_path / "a.wav", noise(1600))
    with pytest.raises(ValueError, match=next(iter(options))):
        load_banks(noise=tmp_path, **options)
