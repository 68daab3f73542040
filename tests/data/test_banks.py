"""Folders of noise and rooms become arrays."""

import shutil

import numpy as np
import pytest
import soundfile

from memo_jax.data import banks
from memo_jax.data.banks import load_banks

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
    """Room for 4 of 12 rows: always the same four for a seed, others for another, in the order of the names."""
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


def test_beyond_the_limit_every_recording_gives_rows_and_no_more_is_decoded(tmp_path, monkeypatch):
    """Three long recordings (of 40, 30 and 2 rows) and room for 12: 5, 5 and 2 rows, each contiguous in its file."""
    whole = [write(tmp_path / f"{index}.wav", noise(1600 * rows, index)) for index, rows in enumerate((40, 30, 2))]
    decoded, read = [], banks.read_audio
    monkeypatch.setattr(
        banks, "read_audio", lambda *a, **k: (lambda samples: (decoded.append(len(samples)), samples)[1])(read(*a, **k))
    )
    chosen = [
        load_banks(noise=tmp_path, seconds=0.1, max_megabytes=12.5 * 3200 / 1e6, seed=seed)["noise"]
        for seed in (0, 0, 1)
    ]
    for bank in chosen:
        assert bank.shape == (12, 1600)
        for samples, piece in zip(whole, (bank[:5], bank[5:10], bank[10:])):
            assert piece.tobytes() in samples.tobytes()
    np.testing.assert_array_equal(chosen[0], chosen[1])
    assert not np.array_equal(chosen[0], chosen[2])
    assert sum(decoded) < 3 * 12 * 1600 * 1.1


def test_musan_gives_each_kind_its_part(tmp_path):
    for index, kind in enumerate(("music", "noise", "speech")):
        write(tmp_path / "musan" / kind / "us-gov" / f"{kind}-0000.wav", noise(1600, index))
    (tmp_path / "musan" / "noise" / "free-sound").mkdir()
    (tmp_path / "musan" / "noise" / "ANNOTATIONS").write_text("text")
    root = tmp_path / "musan"
    found = load_banks(noise=root, music=root, speech=root, seconds=0.1)
    for index, kind in enumerate(("music", "noise", "speech")):
        np.testing.assert_array_equal(found[kind], [noise(1600, index)])
        np.testing.assert_array_equal(load_banks(noise=root / kind, seconds=0.1)["noise"], [noise(1600, index)])
    with pytest.raises(
        ValueError, match="musan: nothing for the rir bank here; of MUSAN it has noise and music and spee"
    ):
        load_banks(rirs=root)
    shutil.rmtree(root / "music")
    with pytest.raises(ValueError, match="nothing for the music bank here; of MUSAN it has noise and speech"):
        load_banks(music=root)


@pytest.mark.parametrize("listed", [True, False])
def test_rirs_noises_gives_rooms_and_point_sources_but_no_noise_as_a_room(tmp_path, listed):
    root, real = tmp_path / "RIRS_NOISES", "real_rirs_isotropic_noises"

    def room(name, at):
        samples = np.zeros((1600, 2))
        samples[0, 0], samples[at] = 0.9, 0.5
        write(root / name, samples)

    room("simulated_rirs/smallroom/Room001/Room001-00001.wav", 10)
    room(f"{real}/RVB2014_type1_rir_largeroom1_far_angla.wav", 20)
    room(f"{real}/air_type1_air_binaural_booth_0_1.wav", 30)
    write(root / real / "RVB2014_type1_noise_largeroom1_1.wav", noise(1600, 1))
    write(root / "pointsource_noises" / "noise-free-sound-0000.wav", noise(1600, 2))
    if listed:
        (root / real / "rir_list").write_text(
            "".join(
                f"--rir-id 0000{index} --room-id room{index} RIRS_NOISES/{real}/{name}\n"
                for index, name in enumerate(
                    ["RVB2014_type1_rir_largeroom1_far_angla.wav", "air_type1_air_binaural_booth_0_1.wav"]
                )
            )
        )
    found = load_banks(noise=root, rirs=root, seconds=0.1, rir_seconds=0.1)
    np.testing.assert_array_equal(found["noise"], [noise(1600, 2)])
    assert [np.flatnonzero(row).tolist() for row in found["rir"]] == [[0, 20], [0, 30], [0, 10]]  # the first channel
    assert len(load_banks(rirs=root / "simulated_rirs")["rir"]) == 1 and len(load_banks(rirs=root / real)["rir"]) == 2
    np.testing.assert_array_equal(load_banks(noise=root / real, seconds=0.1)["noise"], [noise(1600, 1)])
    with pytest.raises(ValueError, match="nothing for the music bank here; of RIRS_NOISES it has noise and rir"):
        load_banks(music=root)


def test_a_folder_of_ones_own_may_have_parts_of_any_name(tmp_path):
    """That one of them has a name from MUSAN does not make it MUSAN."""
    write(tmp_path / "sounds" / "speech" / "a.wav", noise(1600))
    write(tmp_path / "sounds" / "rain" / "a.wav", noise(1600, 1))
    assert len(load_banks(noise=tmp_path / "sounds", seconds=0.1)["noise"]) == 2


def test_hidden_files_are_passed_over_and_counted(tmp_path, capsys):
    """What macOS writes beside a recording has its extension, but is not sound."""
    write(tmp_path / "a.wav", noise(1600))
    for name in ("._a.wav", ".trash/b.wav", "__MACOSX/a.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7 no sound")
    assert len(load_banks(noise=tmp_path, seconds=0.1)["noise"]) == 1
    assert "passed over 3 hidden files for the noise bank, such as" in capsys.readouterr().err


def test_folders_that_give_nothing_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_banks(rirs=tmp_path / "nowhere")
    (tmp_path / "README.txt").write_text("nothing here")
    with pytest.raises(ValueError, match="no recordings for the music bank"):
        load_banks(music=tmp_path)
    (tmp_path / "broken.wav").write_text("no sound")
    with pytest.raises(ValueError, match="broken.wav: not readable"):
        load_banks(music=tmp_path)


@pytest.mark.parametrize(
    "options", [{"seconds": 0}, {"rir_seconds": -1}, {"max_megabytes": 0}, {"max_megabytes": 0.001}]
)
def test_numbers_out_of_range_are_named(tmp_path, options):
    write(tmp_path / "a.wav", noise(1600))
    with pytest.raises(ValueError, match=next(iter(options))):
        load_banks(noise=tmp_path, **options)
