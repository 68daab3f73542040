"""What `read_audio` makes of good recordings, and what it says of bad ones."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import tiny
from memo_jax.audio import (
    AudioError,
    as_audio,
    audio_seconds,
    check_speech,
    is_audio_name,
    kinds,
    parse_channel,
    read_audio,
    read_float_audio,
)
from memo_jax.audio.mpeg import mp3_frame
from recording_files import memory_of_reading

RATE = 16000


def tone(seconds=1.0, rate=RATE, hertz=440.0, level=0.5):
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds=1.0, channels=1, seed=0):
    samples = np.random.default_rng(seed).normal(0, 0.1, (round(seconds * RATE), channels)).astype(np.float32)
    return samples if channels > 1 else samples[:, 0]


def write(path, samples, rate=RATE, **options):
    soundfile.write(path, samples, rate, **options)
    return path


def content_of(samples, rate=RATE, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **options)
    return file.getvalue()


def read_bytes(content, name="a recording", **options):
    file = io.BytesIO(content)
    file.name = name
    return read_audio(file, **options)


def ape_tag(flags):
    """The header, or the footer, of an APE tag without items."""
    return b"APETAGEX" + struct.pack("<4I", 2000, 32, 0, flags) + bytes(8)


# Every kind that libsndfile writes: the options of `soundfile.write`, and whether it is lossless.
KINDS = {
    "wav": ({"format": "WAV"}, True),
    "wavex": ({"format": "WAVEX", "subtype": "PCM_24"}, True),
    "rf64": ({"format": "RF64"}, True),
    "w64": ({"format": "W64"}, True),
    "aiff": ({"format": "AIFF"}, True),
    "au": ({"format": "AU"}, True),
    "au, little-endian": ({"format": "AU", "endian": "LITTLE"}, True),
    "caf": ({"format": "CAF"}, True),
    "sph": ({"format": "NIST"}, True),
    "flac": ({"format": "FLAC"}, True),
    "ogg": ({"format": "OGG", "subtype": "VORBIS"}, False),
    "opus": ({"format": "OGG", "subtype": "OPUS"}, False),
    "mp3": ({"format": "MP3"}, False),
    "mp3, variable": ({"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.5}, False),
}
every_kind = pytest.mark.parametrize("options, lossless", KINDS.values(), ids=KINDS)


def test_16_bit_samples_come_back_as_they_are(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 3000).astype(np.int16)
    for name in ("a.wav", "a.flac"):
        read = read_audio(write(tmp_path / name, samples))
        assert read.dtype == np.int16
        np.testing.assert_array_equal(read, samples)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_other_rates_are_converted(tmp_path, rate):
    """A tone sampled at another rate is the same tone at 16 kHz, except at the ends, where the filter lacks input."""
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
        ("text.flac", b"this is not sound\n" * 99, "not readable as audio: it holds text"),
        ("page.wav", b"<!DOCTYPE html><html>not found</html>", "not readable as audio: it holds a web page"),
        ("lfs.flac", b"version https://git-lfs.github.com/spec/v1\n", "not readable as audio: it holds a pointer"),
        ("noise.wav", bytes(range(1, 256)) * 99, "not readable as audio: it holds nothing known"),
    ],
)
def test_what_is_not_a_recording_is_named(tmp_path, name, content, reason):
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


@every_kind
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.6, 0.95, -300])
def test_files_that_end_early_are_refused_whatever_they_are(options, lossless, kept):
    """A fraction of the bytes, or all but the last 300."""
    content = content_of(noise(2.0), **options)
    with pytest.raises(AudioError, match="a recording: (truncated|damaged)"):
        read_bytes(content[: int(kept * len(content)) if kept > 0 else kept])


@every_kind
def test_a_kind_is_recognised_by_content_whatever_the_name(options, lossless):
    samples = noise(1.0)
    for name in ("a.wav", "a.m4a", "a.mp3", "a.txt", "a"):
        read = read_bytes(content_of(samples, **options), name)
        assert abs(len(read) - RATE) <= (0 if lossless else 2304)
    if lossless:
        np.testing.assert_allclose(read, samples * 32768, atol=1)


@every_kind
def test_recordings_that_follow_one_another_in_a_file_are_all_read(options, lossless):
    first, second = noise(1.0, seed=1), noise(0.5, seed=2)
    together = content_of(first, **options) + content_of(second, **options)
    read = read_bytes(together)
    expected = np.concatenate([read_bytes(content_of(first, **options)), read_bytes(content_of(second, **options))])
    np.testing.assert_array_equal(read, expected)
    np.testing.assert_allclose(read_bytes(together, start=1.1, end=1.4), expected[17600:22400], atol=300)
    with pytest.raises(AudioError, match="no such part"):
        read_bytes(together, start=1.6)


def test_recordings_of_different_kinds_rates_and_channels_that_follow_one_another_are_all_read():
    parts = [
        content_of(noise(1.0, 2), 44100, format="WAV"),
        content_of(noise(1.0), 8000, format="AIFF"),
        content_of(noise(1.0, 2), 48000, format="OGG", subtype="OPUS"),
        content_of(noise(1.0), 24000, format="MP3"),
        content_of(noise(1.0), 16000, format="FLAC"),
    ]
    read = read_bytes(b"".join(parts))
    expected = np.concatenate([read_bytes(part) for part in parts])
    np.testing.assert_array_equal(read, expected)
    with pytest.raises(AudioError, match="damaged"):  # where FLAC ends, only another FLAC tells
        read_bytes(parts[-1] + parts[0])


@pytest.mark.parametrize("header", [True, False])
def test_an_mp3_of_variable_bitrate_is_read_to_its_end_without_a_header_with_its_length(header):
    """Silence first, whose bitrate is the lowest: libsndfile's estimate of the length would be wrong."""
    samples = np.concatenate([noise(3.0), 0.001 * noise(3.0)])
    content = content_of(samples, format="MP3", bitrate_mode="VARIABLE", compression_level=0.1)
    frames = [match.start() for match in re.finditer(b"\xff[\xf2\xf3]", content)]
    if not header:
        assert re.search(b"Xing|Info", content[: frames[1]])
        first = next(place for place in frames[1:] if place > 100)
        content = content[first:]
    assert abs(len(read_bytes(content)) - len(samples)) < 2304
    part = read_bytes(content, start=4.0, end=5.5)
    assert len(part) == 1.5 * RATE
    if not header:
        twice = read_bytes(content + content)
        assert abs(len(twice) - 2 * len(samples)) < 4608


@pytest.mark.parametrize(
    "before, behind",
    [
        (b"ID3\4\0\0\0\0\0\x0a" + bytes(10), b""),
        (b"", b"TAG" + bytes(125)),
        (b"", ape_tag(0xA0000000) + ape_tag(0x80000000)),
        (b"", bytes(100000)),
    ],
    ids=["ID3v2", "ID3v1", "APE", "zeros"],
)
@pytest.mark.parametrize("kind", ["wav", "mp3", "flac", "ogg", "aiff"])
def test_tags_around_a_recording_are_no_part_of_it(kind, before, behind):
    content = content_of(noise(1.0), **KINDS[kind][0])
    np.testing.assert_array_equal(read_bytes(before + content + behind), read_bytes(content))


def test_much_that_follows_a_recording_and_is_unknown_is_refused():
    """As when a header declares less than was written: the rest would be lost silently."""
    content = bytearray(content_of(noise(2.0), format="WAV"))
    content[40:44] = (RATE).to_bytes(4, "little")
    with pytest.raises(AudioError, match="damaged: 48,000 bytes follow the end of the wav data"):
        read_bytes(content)
    assert len(read_bytes(content_of(noise(1.0), format="WAV") + b"a few bytes")) == RATE


def test_a_second_chunk_of_samples_in_a_wav_is_refused():
    content = content_of(noise(1.0), format="WAV")
    with pytest.raises(AudioError, match="damaged: a second chunk of samples at byte 32,044"):
        read_bytes(content + content[36:])


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_whose_last_page_has_an_earlier_time_than_others_is_refused(subtype):
    """Decoders take that time for the length: of 20 s, they would return 2."""
    content = bytearray(content_of(noise(20.0), format="OGG", subtype=subtype))
    assert content.count(b"OggS") > 4
    last = content.rindex(b"OggS")
    content[last + 6 : last + 14] = (2 * RATE).to_bytes(8, "little")
    with pytest.raises(AudioError, match=f"damaged: the time of the page at byte {last:,} is before"):
        read_bytes(bytes(content))


def test_a_header_alone_has_no_samples(tmp_path):
    with pytest.raises(AudioError, match="no samples"):
        read_audio(write(tmp_path / "a.wav", tone()[:0]))


def with_length(kind, length):
    """One second of a kind, with another length written into its header at a given position."""
    content = bytearray(content_of(noise(1.0), **KINDS[kind][0]))
    if kind == "flac":
        content[21:26] = ((content[21] & 0xF0) << 32 | length).to_bytes(5, "big")
        return bytes(content)
    after, offset, size, order = {
        "wav": (b"data", 4, 4, "little"),
        "rf64": (b"", 28, 8, "little"),
        "w64": (b"data\xf3\xac", 16, 8, "little"),
        "aiff": (b"SSND", 4, 4, "big"),
        "au": (b"", 8, 4, "big"),
        "caf": (b"data", 4, 8, "big"),
    }[kind]
    place = content.index(after) + offset
    content[place : place + size] = (length % 2 ** (8 * size)).to_bytes(size, order)
    return bytes(content)


@pytest.mark.parametrize(
    "kind, length",
    [
        *(("wav", length) for length in (0, -1, 2**31 - 1, 0x7FFFF000, 32002, 31999, 32044, 32100)),
        *(("rf64", length) for length in (0, -1, 32044)),
        *(("w64", length) for length in (0, -1, 2**63 - 1, 32024 + 44)),
        *(("aiff", length) for length in (0, -1, 0x7F000000, 32008 + 10)),
        *(("au", length) for length in (0, -1, 32010)),
        *(("caf", length) for length in (-1, 32004 + 10)),
        ("flac", 0),
    ],
)
def test_placeholders_for_the_length_and_lengths_off_by_a_few_bytes_are_read(kind, length):
    """As left by programs that write to a pipe, or that count their header as samples."""
    expected = read_bytes(content_of(noise(1.0), **KINDS[kind][0]))
    read = read_bytes(with_length(kind, length))
    assert abs(len(read) - RATE) <= 1
    np.testing.assert_array_equal(read, expected[: len(read)])


def test_flac_of_unknown_length_is_refused_when_it_ends_within_a_frame():
    content = with_length("flac", 0)
    np.testing.assert_array_equal(read_bytes(content, start=0.3, end=0.6), read_bytes(content)[4800:9600])
    with pytest.raises(AudioError, match="truncated: its last frame is incomplete"):
        read_bytes(content[:-1])
    with pytest.raises(AudioError, match="no such part"):
        read_bytes(content, start=1.5)


def test_an_mp3_with_the_header_of_fraunhofer_is_read_whole_and_refused_when_frames_are_missing():
    content = content_of(noise(3.0), 44100, format="MP3", bitrate_mode="VARIABLE", compression_level=0.3)
    mark = re.search(b"Xing|Info", content).start()
    content = content[content.rindex(b"\xff\xfb", 0, mark) :]
    first, mark = mp3_frame(content)[0], re.search(b"Xing|Info", content).start()
    frames = int.from_bytes(content[mark + 8 : mark + 12], "big")
    header = bytearray(content[:first])
    header[4:] = bytes(len(header) - 4)
    header[36:40], header[50:54] = b"VBRI", frames.to_bytes(4, "big")
    read = read_bytes(bytes(header) + content[first:])
    assert abs(len(read) - 48000 * 16000 / 44100) < 1500
    header[50:54] = (frames + 9).to_bytes(4, "big")
    with pytest.raises(AudioError, match="truncated: .* frames that its header promises"):
        read_bytes(bytes(header) + content[first:])


def test_mp3_inside_wav_is_read():
    mp3 = content_of(noise(1.0), format="MP3")
    form = struct.pack("<HHIIHHH", 0x55, 1, RATE, 8000, 1, 0, 12) + bytes(12)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(mp3)) + mp3
    content = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
    np.testing.assert_array_equal(read_bytes(content), read_bytes(mp3))
    with pytest.raises(AudioError, match="truncated"):
        read_bytes(content[:-1000])


@pytest.mark.parametrize("coding", ["pcm,embedded-shorten-v2.00", "ulaw,embedded-shorten-v1.1", "pcm,embedded-wavpack"])
def test_compressed_sph_is_named(coding):
    content = content_of(noise(1.0), format="NIST")
    field = f"sample_coding -s{len(coding)} {coding}\n".encode()
    header = re.sub(rb"sample_coding.*\n", field, content[:1024])[:1024].ljust(1024)
    with pytest.raises(AudioError, match=f"compressed with {'shorten' if 'shorten' in coding else 'wavpack'}"):
        read_bytes(header + content[1024:])


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg"])
def test_a_constant_recording_is_silence_at_any_rate(kind):
    samples = read_bytes(content_of(np.full(66150, 0.125), 44100, **KINDS[kind][0]))
    if kind in ("wav", "flac"):
        assert (samples == 4096).all()
        with pytest.raises(AudioError, match="silence"):
            check_speech("a recording", samples, 0.5)
    assert abs(len(samples) - 24000) < 2304


@pytest.mark.parametrize("decibels, subtype", [(-60, "PCM_24"), (-80, "PCM_24"), (-100, "FLOAT"), (-130, "DOUBLE")])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_recordings_too_quiet_for_16_bits_are_amplified_and_keep_their_shape(decibels, subtype, rate):
    samples = noise(2.0)
    loud = as_audio(samples, rate).astype(float)
    quiet = read_bytes(content_of(samples.astype(float) * 10 ** (decibels / 20), rate, format="WAV", subtype=subtype))
    assert 2**13 <= np.abs(quiet.astype(int)).max() <= 2**14
    scale = np.dot(quiet, loud) / np.dot(loud, loud)
    error = np.square(quiet - scale * loud).mean() / np.square(quiet.astype(float)).mean()
    assert error < (1e-6 if subtype != "PCM_24" else 1e-3)


def test_16_bit_samples_are_never_amplified_and_quiet_beginnings_stay_quiet():
    quiet = np.random.default_rng(0).integers(-3, 4, RATE).astype(np.int16)
    np.testing.assert_array_equal(read_bytes(content_of(quiet, format="WAV")), quiet)
    samples = np.concatenate([1e-5 * noise(70.0), noise(1.0)])
    read = read_bytes(content_of(samples, format="WAV", subtype="FLOAT"))
    np.testing.assert_allclose(read, samples * 32768, atol=0.51)
    np.testing.assert_allclose(as_audio(samples, RATE), samples * 32768, atol=0.51)


@pytest.mark.parametrize("dither", [0.0, 1e-4])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_phase_inverted_channels_are_named(dither, rate):
    speech = noise(1.0)
    stereo = np.stack([speech, -speech + dither * noise(1.0, seed=1)], 1)
    content = content_of(stereo, rate, format="WAV", subtype="FLOAT")
    with pytest.raises(AudioError, match="phase-inverted channels.*such as channel 1"):
        read_bytes(content)
    with pytest.raises(AudioError, match="phase-inverted"):
        as_audio(stereo, rate)
    assert read_bytes(content, channel=2).std() > 1000


@pytest.mark.parametrize("channels", [2, 5, 64])
def test_channels_that_are_silent_or_unlike_are_not_phase_inverted(channels):
    assert read_bytes(content_of(noise(0.5, channels), format="WAV")).any()
    silent = np.zeros((8000, channels), np.float32)
    assert not read_bytes(content_of(silent, format="WAV")).any()
    silent[:, 0] = noise(0.5)
    np.testing.assert_allclose(read_bytes(content_of(silent, format="WAV")), silent[:, 0] / channels * 32768, atol=1)
    offset = np.stack([0.05 * noise(0.5) + 0.5, 0.05 * noise(0.5) - 0.5], 1)
    assert read_bytes(content_of(offset, format="WAV", subtype="FLOAT")).std() > 100


def test_channels_are_chosen_by_number(tmp_path):
    samples = noise(1.0, 3)
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    for channel in (1, 2, 3):
        np.testing.assert_allclose(read_audio(path, channel=channel), samples[:, channel - 1] * 32768, atol=1)
        np.testing.assert_array_equal(read_float_audio(path, channel=channel), samples[:, channel - 1])
        np.testing.assert_allclose(as_audio(samples, RATE, channel=channel), samples[:, channel - 1] * 32768, atol=1)
    with pytest.raises(AudioError, match=r"a.wav: no channel 4: it has 3"):
        read_audio(path, channel=4)
    for wrong in (0, -1, 1.5, True, "left", None):
        with pytest.raises(ValueError, match="expected mean, or a number from 1"):
            read_audio(path, channel=wrong)
    assert parse_channel("mean") == "mean" and parse_channel("2") == 2
    for wrong in ("0", "-1", "left", "", "²", "1.0"):
        with pytest.raises(ValueError, match="expected mean, or a number from 1"):
            parse_channel(wrong)


@pytest.mark.parametrize(
    "start, end", [(-1, None), (2, 1), (float("nan"), None), (0, float("nan")), (float("inf"), None)]
)
def test_an_excerpt_that_makes_no_sense_is_refused(tmp_path, start, end):
    with pytest.raises(ValueError, match="no excerpt"):
        read_audio(write(tmp_path / "a.wav", tone()), start=start, end=end)


def test_reading_leaves_no_file_open(tmp_path):
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc to count open files by")
    paths = [write(tmp_path / name, noise(1.0)) for name in ("a.wav", "a.flac", "a.mp3")]
    (tmp_path / "cut.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:9000])
    (tmp_path / "text.wav").write_bytes(b"text")
    before = len(os.listdir("/proc/self/fd"))
    for path in (*paths, tmp_path / "cut.flac", tmp_path / "text.wav"):
        for options in ({}, {"max_seconds": 0.5}, {"channel": 2}, {"start": 5.0}):
            try:
                read_audio(path, **options)
            except AudioError:
                pass
    assert len(os.listdir("/proc/self/fd")) == before


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
    """In a process of its own, whose memory may grow by only 300 MB."""
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


@pytest.mark.parametrize(
    "name, seconds, rate, channels", [("a.wav", 3600, 16000, 1), ("a.flac", 600, 16000, 6), ("a.wav", 300, 48000, 2)]
)
def test_a_long_recording_takes_the_memory_of_its_samples(tmp_path, name, seconds, rate, channels):
    """In a process of its own: the result, and less than 30 MB besides."""
    minute = np.random.default_rng(0).integers(-999, 999, (60 * rate, 1)).astype(np.int16) * np.ones(channels, np.int16)
    with soundfile.SoundFile(tmp_path / name, "w", rate, channels) as file:
        for _ in range(seconds // 60):
            file.write(minute if name.endswith("wav") else minute * 0)
    length, grown = memory_of_reading(tmp_path / name)
    assert length == seconds * RATE
    assert grown < 2 * length + 30e6


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
    """No crash, hang, other exception, or memory beyond what is allowed: see tests/soak/recordings.py."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc to measure memory by")
    run = subprocess.run(
        [sys.executable, "-m", "soak.recordings", "400", "0", tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        env=tiny.environment(),
        cwd=Path(__file__).parents[1],
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


def test_no_header_of_size_zero_stalls_a_reader():
    """A size of zero, or a negative one, must not keep a reader in one place: every object has at least a header."""
    starts = [mark for marks in kinds.MARKS.values() for mark in marks]
    starts += [b"RIFF\0\0\0\0WAVE", b"RIFF\0\0\0\0AVI ", b"FORM\0\0\0\0AIFF", b"\0\0\0\1ftyp", b"\0\0\0\0moov"]
    starts += [b"\xff\xfb\x10\0", b"\xff\xf1\x50\x80\0\x1f\xfc", b"#!AMR\n", b"#!AMR-WB\n", b"NIST_1A\n   -16\n"]
    fills = (b"\0", b"\1", b"\xff", b"\0\0\0\1", b"\1\0\0\0", b"\xff\xff\xff\xf8")

    def too_long(*_):
        raise TimeoutError

    before, refused = signal.signal(signal.SIGALRM, too_long), 0
    try:
        for start in starts:
            for fill in fills:
                signal.alarm(20)
                try:
                    read_bytes((start + 64 * fill)[:139])
                except AudioError:
                    refused += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert refused > 0.9 * len(starts) * len(fills), "a few are read: zeros are frames of AMR"
