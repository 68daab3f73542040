"""What `read_audio` makes of good recordings, and what it says of bad ones."""

import io
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import tiny
from memo_jax.audio import AudioError, audio_seconds, is_audio_name, read_audio, read_float_audio

RATE = 16000


def tone(seconds=1.0, rate=RATE, hertz=440.0, level=0.5):
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write(path, samples, rate=RATE, **options):
    soundfile.write(path, samples, rate, **options)
    return path


def test_16_bit_samples_come_back_as_they_are(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 3000).astype(np.int16)
    for name in ("a.wav", "a.flac"):
        read = read_audio(write(tmp_path / name, samples))
        assert read.dtype == np.int16
        np.testing.assert_array_equal(read, samples)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_other_rates_are_converted(tmp_path, rate):
    """A tone sampled at another rate is the same tone at 16 kHz, but for the ends, where the filter lacks input."""
    read = read_audio(write(tmp_path / "a.wav", tone(rate=rate), rate, subtype="FLOAT")) / 32768
    assert abs(len(read) - RATE) <= 1
    np.testing.assert_allclose(read[800:15200], tone()[800:15200], atol=2e-3)


@pytest.mark.parametrize("subtype, error", [("PCM_24", 1), ("PCM_32", 1), ("FLOAT", 1), ("DOUBLE", 1), ("PCM_U8", 257)])
def test_every_sample_format_gives_the_same_samples(tmp_path, subtype, error):
    read = read_audio(write(tmp_path / "a.wav", tone(), subtype=subtype))
    assert np.abs(read - tone() * 32768).max() <= error


@pytest.mark.parametrize(
    "name, options", [("a.ogg", {}), ("a.mp3", {}), ("a.opus", {"format": "OGG", "subtype": "OPUS"})]
)
def test_lossy_kinds_keep_length_and_tone(tmp_path, name, options):
    read = read_audio(write(tmp_path / name, tone(), **options))
    assert len(read) == RATE
    assert np.abs(np.fft.rfft(read)).argmax() == 440


def test_channels_are_averaged_or_picked(tmp_path):
    path = write(tmp_path / "a.wav", np.stack([tone(), -0.5 * tone()], axis=1), subtype="FLOAT")
    np.testing.assert_allclose(read_audio(path), 0.25 * tone() * 32768, atol=1)
    np.testing.assert_allclose(read_float_audio(path, channel=2), -0.5 * tone())
    with pytest.raises(AudioError, match="no channel 3: it has 2"):
        read_float_audio(path, channel=3)


def test_values_beyond_full_scale_are_clipped_not_wrapped(tmp_path):
    path = write(tmp_path / "a.wav", tone(level=3.0), subtype="FLOAT")
    read = read_audio(path)
    assert read.min() == -32768 and read.max() == 32767
    assert (read * tone() >= 0).all()
    assert np.abs(read_float_audio(path)).max() > 2.9


def test_silence_and_very_short_recordings_are_recordings(tmp_path):
    assert not read_audio(write(tmp_path / "silence.wav", np.zeros(RATE, np.float32))).any()
    assert len(read_audio(write(tmp_path / "short.wav", tone(0.01)))) == 160


def test_names_with_spaces_and_other_letters_and_open_files(tmp_path):
    path = write(tmp_path / "two words é 日本.wav", tone())
    assert len(read_audio(path)) == len(read_audio(str(path))) == RATE
    assert len(read_audio(io.BytesIO(path.read_bytes()))) == RATE


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("empty.wav", b"", "empty file"),
        ("zeros.wav", bytes(4096), "not readable as audio"),
        ("text.wav", b"this is not sound\n" * 99, "not readable as audio"),
        ("text.mp3", b"this is not sound\n" * 99, "not readable as audio"),
        ("text.flac", b"this is not sound\n" * 99, "not readable as audio"),
    ],
)
def test_what_is_no_recording_is_named(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError, match=f"{name}: {reason}"):
        read_audio(tmp_path / name)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(AudioError, match="none.wav: no such file"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(AudioError, match="not a file"):
        read_audio(tmp_path)
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(AudioError, match="not a file"):  # and does not wait for a writer
        read_audio(tmp_path / "pipe.wav")


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
def test_files_that_end_early_are_refused(tmp_path, name, kept):
    noise = np.random.default_rng(0).normal(0, 0.1, RATE)
    content = write(tmp_path / name, noise).read_bytes()
    (tmp_path / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(AudioError, match=f"{name}: (truncated|damaged)"):
        read_audio(tmp_path / name)


def test_a_header_alone_has_no_samples(tmp_path):
    with pytest.raises(AudioError, match="no samples"):
        read_audio(write(tmp_path / "a.wav", tone()[:0]))


def test_a_wav_from_a_pipe_has_no_length_in_its_header_and_is_read(tmp_path):
    content = bytearray(write(tmp_path / "a.wav", tone()).read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(content)
    assert len(read_audio(tmp_path / "a.wav")) == RATE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_samples_are_refused(tmp_path, value):
    samples = tone()
    samples[5000] = value
    with pytest.raises(AudioError, match="NaN or infinite"):
        read_audio(write(tmp_path / "a.wav", samples, subtype="FLOAT"))


def test_floats_in_the_range_of_integers_are_refused(tmp_path):
    with pytest.raises(AudioError, match="samples out of range"):
        read_audio(write(tmp_path / "a.wav", tone(level=20000.0), subtype="FLOAT"))


def test_a_recording_over_the_longest_is_refused(tmp_path):
    path = write(tmp_path / "a.flac", tone(3.0))
    assert len(read_audio(path, max_seconds=3)) == 3 * RATE
    with pytest.raises(AudioError, match="longer than 2.5 s"):
        read_audio(path, max_seconds=2.5)


@pytest.mark.parametrize(
    "place, value, reason",
    [
        ((40, 44), 2**31 - 2**20, "truncated"),  # bytes of data
        ((24, 28), 1, "sample rate out of range"),  # a rate of 1 Hz would make 16,000 samples out of each
        ((24, 28), 2 * 10**9, "sample rate out of range"),
    ],
)
def test_a_lying_header_is_refused_without_memory_for_its_lie(tmp_path, place, value, reason):
    """In a process of its own, whose memory may grow by 300 MB only."""
    content = bytearray(write(tmp_path / "a.wav", tone()).read_bytes())
    content[slice(*place)] = value.to_bytes(place[1] - place[0], "little")
    (tmp_path / "a.wav").write_bytes(content)
    program = (
        "import resource, sys, soundfile, soxr; from memo_jax.audio import AudioError, read_audio\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)\n"
        "try: read_audio(sys.argv[1])\n"
        "except AudioError as error: print(error)\n"
    )
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc to measure memory by")
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a.wav"], capture_output=True, text=True, timeout=60
    )
    assert reason in run.stdout, run.stderr


def test_a_long_recording_is_read_in_blocks(tmp_path):
    """Ten minutes of stereo at 48 kHz, 230 MB as floats, within 100 MB over the result's 19."""
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 48000, 2) as file:
        for _ in range(10):
            file.write(np.zeros((60 * 48000, 2), np.int16))
    program = (
        "import resource, sys, soundfile, soxr; from memo_jax.audio import read_audio\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); length = len(read_audio(sys.argv[1])); print(length, peak() - before)\n"
    )
    length, grown = map(
        int,
        subprocess.run(
            [sys.executable, "-c", program, tmp_path / "a.flac"], capture_output=True, text=True, timeout=60, check=True
        ).stdout.split(),
    )
    assert length == 600 * RATE
    assert grown * (1 if sys.platform == "darwin" else 1024) < 120e6


def test_m4a_without_ffmpeg_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.m4a").write_bytes(b"anything")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AudioError, match="ffmpeg is missing.*install"):
        read_audio(tmp_path / "a.m4a")


def fake_ffmpeg(folder, monkeypatch, script):
    program = folder / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_m4a_goes_through_ffmpeg(tmp_path, monkeypatch):
    """The stand-in for ffmpeg writes the samples that we expect back, and fails for what it cannot read."""
    (tmp_path / "samples").write_bytes(tone().astype("<f4").tobytes())
    (tmp_path / "a.m4a").write_bytes(b"anything")
    fake_ffmpeg(tmp_path, monkeypatch, f"cat '{tmp_path}/samples'")
    np.testing.assert_allclose(read_audio(tmp_path / "a.m4a"), tone() * 32768, atol=1)
    with pytest.raises(AudioError, match="longer than"):
        read_audio(tmp_path / "a.m4a", max_seconds=0.1)
    fake_ffmpeg(tmp_path, monkeypatch, "echo 'moov atom not found' >&2; exit 1")
    with pytest.raises(AudioError, match="a.m4a: ffmpeg failed: moov atom not found"):
        read_audio(tmp_path / "a.m4a")


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_a_real_m4a_is_read_from_a_file_from_memory_and_in_part(tmp_path):
    """As VoxCeleb2 comes. AAC keeps the tone, and the length but for its frames of 1,024 samples."""
    wav = write(tmp_path / "a.wav", tone(3.0))
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, tmp_path / "a.m4a"], check=True)
    samples = read_audio(tmp_path / "a.m4a")
    assert abs(len(samples) - 3 * RATE) <= 2048 and np.abs(np.fft.rfft(samples[:RATE])).argmax() == 440
    assert abs(audio_seconds(tmp_path / "a.m4a") - 3) < 0.13
    file = io.BytesIO((tmp_path / "a.m4a").read_bytes())
    file.name = "in.zip/a.m4a"
    np.testing.assert_array_equal(read_audio(file), samples)
    part = read_audio(tmp_path / "a.m4a", start=1.0, end=2.0)
    assert len(part) == RATE and np.abs(np.fft.rfft(part)).argmax() == 440
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, "-movflags", "+faststart", tmp_path / "b.m4a"], check=True)
    whole = (tmp_path / "b.m4a").read_bytes()  # its table comes first, so that a part of it can be decoded
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 99] = bytes(range(99))
    for content in (whole[:2000], whole[: len(whole) * 2 // 3], damaged):
        file = io.BytesIO(content)
        file.name = "in.zip/a.m4a"
        with pytest.raises(AudioError, match="in.zip/a.m4a: ffmpeg failed"):
            read_audio(file)


@pytest.mark.parametrize(
    "name, options",
    [("a.wav", {}), ("a.flac", {}), ("a.ogg", {}), ("a.mp3", {}), ("a.opus", {"format": "OGG", "subtype": "OPUS"})],
)
def test_a_part_is_that_part_of_the_whole(tmp_path, name, options):
    path = write(tmp_path / name, tone(3.0) * np.linspace(0, 1, 3 * RATE, dtype=np.float32), **options)
    whole = read_audio(path)
    for (start, stop), length in (
        ((0.0, 1.0), RATE),
        ((1.3, 2.0), 11200),
        ((2.0, None), RATE),
        ((2.5, 3.4), RATE // 2),
    ):
        part = read_audio(path, start=start, end=stop)
        assert len(part) == length
        np.testing.assert_allclose(part, whole[round(start * RATE) : round(start * RATE) + length], atol=150)
    for span in ((3.0, None), (2.0, 3.6)):
        with pytest.raises(AudioError, match="no such part"):
            read_audio(path, start=span[0], end=span[1])
    assert abs(audio_seconds(path) - 3) < 0.01


def test_mutated_recordings_are_read_or_refused(tmp_path):
    """No crash, hang or memory beyond what is allowed, and no other exception: see fuzz_audio.py."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc to measure memory by")
    program = Path(__file__).with_name("fuzz_audio.py")
    run = subprocess.run(
        [sys.executable, program, "400", "0", tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        env=tiny.environment(),
    )
    assert run.returncode == 0, f"{os.listdir(tmp_path)}: {run.stderr[-2000:]}"
    counts = json.loads(run.stdout)
    assert counts["read"] + counts["refused"] == 400 and min(counts["read"], counts["refused"]) > 40
    assert "Traceback" not in run.stderr and "RuntimeWarning" not in run.stderr


def test_errors_travel_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(AudioError("a.wav", "no samples")))
    assert str(error) == "a.wav: no samples" and error.reason == "no samples" and isinstance(error, ValueError)


def test_names_of_recordings():
    assert is_audio_name("a/B.WAV") and is_audio_name("x.m4a")
    assert not is_audio_name("wav") and not is_audio_name("a.wav.txt")
