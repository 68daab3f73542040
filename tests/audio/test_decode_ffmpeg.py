"""What `read_audio` lets ffmpeg decode and how, and what it never passes to it."""

import io
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import soundfile

import tiny
from memo_jax.audio import AudioError, audio_seconds, decode_ffmpeg, read_audio
from recording_files import memory_of_reading

RATE = 16000
needs_the_program = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
M4A = struct.pack(">I4s4sI", 16, b"ftyp", b"M4A ", 0) + struct.pack(">I4s", 8, b"moov")  # for the stand-in for ffmpeg


def speech(seconds=3.0, channels=1):
    """A tone in noise, at a different level in each channel."""
    rng = np.random.default_rng(0)
    time = np.arange(round(seconds * RATE))[:, None] / RATE
    levels = np.linspace(0.3, 0.1, channels)
    samples = levels * np.sin(2 * np.pi * 440 * time) + 0.03 * rng.standard_normal((len(time), channels))
    return samples.astype(np.float32)


def encoded(folder, name, samples, *options):
    """Writes samples [L, channels] to a file of the kind that its name says, by ffmpeg."""
    soundfile.write(folder / "source.wav", samples, RATE, subtype="FLOAT", format="WAVEX")
    subprocess.run(
        ["ffmpeg", "-v", "error", "-y", "-i", folder / "source.wav", *options, f"file:{folder / name}"], check=True
    )
    return folder / name


def named(content, name="in.zip/a.m4a"):
    file = io.BytesIO(content)
    file.name = name
    return file


def fake_ffmpeg(folder, monkeypatch, script):
    """A shell script in place of ffmpeg."""
    (folder / "bin").mkdir(exist_ok=True)
    program = folder / "bin" / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")


def au_file(samples):
    """Mono samples as ffmpeg writes them to us."""
    return b".snd" + struct.pack(">5I8x", 32, 0xFFFFFFFF, 6, RATE, 1) + samples.astype(">f4").tobytes()


# What ffmpeg is never given ------------------------------------------------------------------------------------------

HOSTILE = {
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{victim}\n#EXT-X-ENDLIST\n",
    "HLS with a byte order mark": "\ufeff#EXTM3U\n#EXTINF:9,\n{victim}\n#EXT-X-ENDLIST\n",
    "HLS behind blank lines": "\n\n#EXTM3U\n#EXTINF:9,\n{victim}\n#EXT-X-ENDLIST\n",
    "HLS that never ends": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{victim}\n",
    "HLS of a host": "#EXTM3U\n#EXTINF:9,\nhttp://192.0.2.1/a.ts\n#EXT-X-ENDLIST\n",
    "DASH": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="audio/mp4">'
    '<Representation id="1" bandwidth="1"><BaseURL>{victim}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "concat": "ffconcat version 1.0\nfile '{victim}'\n",
    "IMF": '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"/>',
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    "M3U": "{victim}\n",
    "PLS": "[playlist]\nFile1={victim}\nNumberOfEntries=1\n",
    "ASX": '<asx version="3.0"><entry><ref href="{victim}"/></entry></asx>',
    "ASF reference": "[Reference]\nRef1={victim}\n",
    "RTSP redirection": "rtsptext\nrtsp://192.0.2.1/a\n",
    "subtitles": "1\n00:00:00,000 --> 00:00:09,000\ntext\n",
    "WebVTT": "WEBVTT\n\n00:00.000 --> 00:09.000\ntext\n",
    "TED captions": '{{"captions":[{{"duration":9000,"content":"x","startOfParagraph":true,"startTime":0}}]}}',
    "ffmetadata": ";FFMETADATA1\ntitle=x\n",
    "VobSub": "# VobSub index file, v7 (do not modify this line!)\nid: en, index: 0\n",
    "SVG": '<svg xmlns="http://www.w3.org/2000/svg"><image href="{victim}"/></svg>',
    "lavfi": "amovie={victim}\n",
    "webm_dash_manifest": "<MPD></MPD>\n",
    "G.729 in text": "sine=frequency=440\n",
}


@pytest.mark.parametrize("name", ["a.m4a", "a.mp4", "a.webm", "a.wav", "a.mp3"])
def test_no_playlist_or_script_reaches_ffmpeg_whatever_it_is_called(tmp_path, monkeypatch, name):
    """From a folder and from memory; the stand-in for ffmpeg would leave a file."""
    soundfile.write(tmp_path / "victim.wav", speech(), RATE)
    fake_ffmpeg(tmp_path, monkeypatch, f"touch '{tmp_path}/called'")
    for kind, text in HOSTILE.items():
        content = text.format(victim=tmp_path / "victim.wav").encode()
        (tmp_path / name).write_bytes(content)
        for source in (tmp_path / name, named(content, name)):
            with pytest.raises(AudioError, match=f"{name}: not readable as audio: it holds ."):
                read_audio(source)
        assert not (tmp_path / "called").exists(), kind


@pytest.mark.parametrize(
    "text, what", [("#EXTM3U\n", "an HLS playlist"), ("ffconcat version 1.0\n", "a list of files")]
)
def test_the_message_tells_what_was_found_inside(text, what):
    with pytest.raises(AudioError, match=f"in.zip/a.m4a: not readable as audio: it holds {what}"):
        read_audio(named(text.encode()))


@needs_the_program
def test_a_container_followed_by_a_playlist_is_decoded_as_that_container(tmp_path):
    """What follows the container is recognised only so that it is refused; it is never opened."""
    content = encoded(tmp_path, "a.m4a", speech()).read_bytes()
    with pytest.raises(AudioError, match="damaged: 9,.* bytes follow the end of the mp4 data"):
        read_audio(named(content + (b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n" * 300)))


def test_ffmpeg_is_told_the_container_and_limited_to_it_and_to_files(tmp_path, monkeypatch):
    """The name is not an argument, the input is an open file, there is no terminal and no standard input."""
    (tmp_path / "samples").write_bytes(au_file(speech()[:, 0]))
    fake_ffmpeg(
        tmp_path,
        monkeypatch,
        f"printf '%s\\n' \"$@\" > '{tmp_path}/told'; cat > '{tmp_path}/stdin'; cat '{tmp_path}/samples'",
    )
    (tmp_path / "-y.m4a").write_bytes(M4A)
    np.testing.assert_allclose(read_audio(tmp_path / "-y.m4a"), speech()[:, 0] * 32768, atol=1)
    told = (tmp_path / "told").read_text().split("\n")
    for option, value in (("-protocol_whitelist", "file,pipe"), ("-format_whitelist", "mov"), ("-f", "mov")):
        assert told[told.index(option) + 1] == value and told.index(option) < told.index("-i")
    assert "-nostdin" in told and not any("m4a" in argument for argument in told)
    assert told[told.index("-i") + 1].startswith("file:/dev/fd/")
    assert (tmp_path / "stdin").read_bytes() == b""


@needs_the_program
def test_names_that_would_be_options_protocols_or_patterns(tmp_path, monkeypatch):
    expected = read_audio(encoded(tmp_path, "a.m4a", speech()))
    monkeypatch.chdir(tmp_path)
    names = (
        "-i.m4a",
        "-.m4a",
        "pipe:0.m4a",
        "http:x.m4a",
        "concat:a|b.m4a",
        "data:,.m4a",
        "a%03d.m4a",
        "%d.webm",
        "*.m4a",
    )
    for name in (*names, "a:b.m4a", "a b.m4a", "'.m4a", "\n.m4a", "é.m4a", "$(id).m4a", "|id.m4a", "a", "a.wav"):
        shutil.copy("a.m4a", f"./{name}") if name != "a.m4a" else None
        np.testing.assert_array_equal(read_audio(name), expected)
    (tmp_path / os.fsdecode(b"\xff.m4a")).write_bytes((tmp_path / "a.m4a").read_bytes())
    np.testing.assert_array_equal(read_audio(os.fsdecode(b"\xff.m4a")), expected)


@needs_the_program
def test_a_movie_that_refers_to_other_files_gets_nothing_of_them(tmp_path):
    """A QuickTime movie whose samples are in a separate file, by absolute path and by alias."""
    soundfile.write(tmp_path / "victim.wav", speech(), RATE, subtype="PCM_16")
    victim = str(tmp_path / "victim.wav").encode()
    content = encoded(tmp_path, "a.mov", speech(), "-c:a", "pcm_s16le").read_bytes()
    place = content.index(b"dref") + 12  # its first entry
    size = int.from_bytes(content[place : place + 4], "big")
    for entry in (
        struct.pack(">I4sI", 12 + len(victim) + 1, b"url ", 0) + victim + b"\0",
        struct.pack(">I4sI", 12 + 150 + 8 + len(victim), b"alis", 0)
        + bytes(150)
        + struct.pack(">HH", 18, len(victim))
        + victim
        + struct.pack(">HH", 0xFFFF, 0),
    ):
        other = bytearray(content[:place] + entry + content[place + size :])
        grown = len(entry) - size
        for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
            at = other.rindex(box, 0, place) - 4
            other[at : at + 4] = (int.from_bytes(other[at : at + 4], "big") + grown).to_bytes(4, "big")
        data = other.index(b"mdat") + 4
        other[data : data + 6 * RATE] = bytes(6 * RATE)  # the movie itself holds silence
        try:
            assert not read_audio(named(bytes(other))).any()
        except AudioError as error:
            assert "ffmpeg failed" in str(error)


# ffmpeg hangs, dies, is missing --------------------------------------------------------------------------------------


def is_running(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{number}/stat") as file:  # a zombie has ended
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    "script", ["sleep 1000", "head -c 40 '{samples}'; sleep 1000", "cat '{samples}'; exec >&-; sleep 99"]
)
def test_a_hanging_ffmpeg_is_killed_with_its_children(tmp_path, monkeypatch, script):
    (tmp_path / "samples").write_bytes(au_file(speech()[:, 0]))
    script = script.format(samples=tmp_path / "samples")
    fake_ffmpeg(tmp_path, monkeypatch, f"sleep 1000 & echo $! > '{tmp_path}/number'; {script}")
    monkeypatch.setattr(decode_ffmpeg, "PATIENCE", 0.5)
    begun = time.monotonic()
    with pytest.raises(AudioError, match="in.zip/a.m4a: ffmpeg hangs: gave up on this mp4 after"):
        read_audio(named(M4A))
    assert time.monotonic() - begun < 20
    number = int((tmp_path / "number").read_text())
    wait_for(lambda: not is_running(number))  # the system ends a process soon after the signal, not with it


def test_a_slow_ffmpeg_is_waited_for_as_long_as_it_delivers(tmp_path, monkeypatch):
    """Each second decoded buys another second."""
    (tmp_path / "samples").write_bytes(au_file(np.zeros(100 * RATE)))
    monkeypatch.setattr(decode_ffmpeg, "BLOCK_SAMPLES", 10 * RATE)
    fake_ffmpeg(
        tmp_path, monkeypatch, f"head -c 2000000 '{tmp_path}/samples'; sleep 2; tail -c +2000001 '{tmp_path}/samples'"
    )
    monkeypatch.setattr(decode_ffmpeg, "PATIENCE", 1.0)
    assert len(read_audio(named(M4A))) == 100 * RATE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("setpriv", [True, False])
def test_ffmpeg_ends_with_its_parent(tmp_path, monkeypatch, setpriv):
    if setpriv and not decode_ffmpeg._setpriv():
        pytest.skip("setpriv is not installed")
    fake_ffmpeg(
        tmp_path,
        monkeypatch,
        f"echo $$ > '{tmp_path}/number.part'; mv '{tmp_path}/number.part' '{tmp_path}/number'; exec sleep 1000",
    )
    (tmp_path / "a.m4a").write_bytes(M4A)
    program = "import sys; from memo_jax.audio import decode_ffmpeg, read_audio\n"
    program += "" if setpriv else "decode_ffmpeg._setpriv = lambda: None\n"
    program += "read_audio(sys.argv[1])"
    parent = subprocess.Popen([sys.executable, "-c", program, tmp_path / "a.m4a"], env=tiny.environment())
    try:
        wait_for((tmp_path / "number").exists, 60)
        number = int((tmp_path / "number").read_text())
        assert is_running(number)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not is_running(number))


def test_a_missing_ffmpeg_is_named_with_what_needs_it(tmp_path, monkeypatch):
    (tmp_path / "a.ogg").write_bytes(M4A)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AudioError, match="a.ogg: ffmpeg is missing: it is needed to decode mp4; install it"):
        read_audio(tmp_path / "a.ogg")


def test_what_ffmpeg_says_is_reported_and_nothing_is_left_open(tmp_path, monkeypatch):
    before = set(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    (tmp_path / "samples").write_bytes(au_file(speech()[:, 0]))
    fake_ffmpeg(tmp_path, monkeypatch, f"cat '{tmp_path}/samples'")
    with pytest.raises(AudioError, match="longer than 0.1 s"):
        read_audio(named(M4A), max_seconds=0.1)
    for script, reason in (
        ("echo '[mov @ 0x55d0] one' >&2; echo 'file:/dev/fd/5: Invalid data found' >&2; exit 1", "Invalid data found"),
        ("exit 1", "it failed without a message"),
        ("kill -SEGV $$", "signal SIGSEGV"),
        (f"cat '{tmp_path}/samples'; echo 'Error while decoding' >&2; exit 69", "Error while decoding"),
        ("exit 0", "it decoded no samples from this mp4"),
        ("yes | head -c 1000000 >&2; echo the end >&2; exit 1", "the end"),
    ):
        fake_ffmpeg(tmp_path, monkeypatch, script)
        with pytest.raises(AudioError, match=f"in.zip/a.m4a: ffmpeg failed: {reason}"):
            read_audio(named(M4A))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == len(before)


# What it decodes -----------------------------------------------------------------------------------------------------

KINDS = {  # name, options of ffmpeg, largest difference in length in samples
    "a.m4a": ((), 2048),
    "alac.m4a": (("-c:a", "alac"), 0),
    "a.mp4": (("-movflags", "+faststart"), 2048),
    "fragments.mp4": (("-movflags", "frag_keyframe+empty_moov"), 2048),
    "a.mov": (("-c:a", "pcm_s16le"), 0),
    "a.aac": ((), 4096),
    "a.webm": (("-b:a", "96k"), 400),
    "a.mkv": (("-c:a", "flac"), 0),
    "a.wma": ((), 4096),
    "a.avi": (("-c:a", "pcm_s16le"), 0),
    "flac.oga": (("-c:a", "flac"), 0),
    "g722.wav": (("-c:a", "g722"), 0),
    "alac.caf": (("-c:a", "alac"), 0),
}
every_kind = pytest.mark.parametrize("name, options, difference", [(k, *v) for k, v in KINDS.items()], ids=KINDS)


@needs_the_program
@every_kind
def test_every_kind_is_read_whole_in_part_and_from_memory_under_any_name(tmp_path, name, options, difference):
    samples = speech()
    path = encoded(tmp_path, name, samples, *options)
    whole = read_audio(path)
    assert abs(len(whole) - len(samples)) <= difference and abs(audio_seconds(path) - len(whole) / RATE) < 1e-6
    assert np.abs(np.fft.rfft(whole[RATE : 2 * RATE])).argmax() == 440
    assert abs(20 * np.log10(whole[4800:-4800].std() / samples[4800:-4800].std() / 32768)) < 0.2  # dB
    np.testing.assert_array_equal(read_audio(named(path.read_bytes(), "in.zip/a.wav")), whole)
    part = read_audio(path, start=1.0, end=2.0)
    assert len(part) == RATE
    around = np.correlate(whole[RATE - 320 : 2 * RATE + 320].astype(float), part.astype(float), "valid")
    assert abs(np.argmax(around) - 320) <= 160  # 10 ms
    for start, end in ((4.0, None), (2.0, 4.0)):
        with pytest.raises(AudioError, match="no such part"):
            read_audio(path, start=start, end=end)


@needs_the_program
@every_kind
def test_every_kind_is_refused_when_it_ends_early_and_read_when_it_follows_another(tmp_path, name, options, difference):
    content = encoded(tmp_path, name, speech(), *options).read_bytes()
    whole = read_audio(named(content))
    for kept in (0.1, 0.5, 0.6, 0.95):
        with pytest.raises(AudioError, match="truncated"):
            read_audio(named(content[: int(kept * len(content))]))
    twice = read_audio(named(content + content))
    assert abs(len(twice) - 2 * len(whole)) <= difference // 4
    if name != "a.aac":
        expected, seam = np.concatenate([whole, whole]), slice(len(whole) - 200, len(whole) + 200)
        if name == "a.webm":  # where the rate changes, both sides of the seam hear each other
            twice[seam] = expected[seam] = 0
        np.testing.assert_allclose(twice, expected, atol=1 if name == "a.webm" else 0)
        np.testing.assert_array_equal(read_audio(named(content + content), start=len(whole) / RATE), whole)


@needs_the_program
@pytest.mark.parametrize("form", ["webm", "matroska"])
def test_webm_from_a_pipe_has_no_length_and_is_refused_when_it_ends_within_a_block(tmp_path, form):
    path = encoded(tmp_path, "a.wav", speech())
    content = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", path, "-f", form, "-"], stdout=subprocess.PIPE, check=True
    ).stdout
    assert abs(len(read_audio(named(content))) - 3 * RATE) < 400
    assert abs(len(read_audio(named(content + content))) - 6 * RATE) < 800
    with pytest.raises(AudioError, match="truncated"):
        read_audio(named(content[: len(content) * 2 // 3]))


@needs_the_program
@pytest.mark.parametrize(
    "name, codec, channels",
    [
        *(("a.mov", "pcm_f32le", channels) for channels in (1, 2, 3, 4, 5, 6, 7, 8, 12)),
        *(("a.m4a", "alac", channels) for channels in (2, 6, 8)),
        *(("a.webm", "libopus", channels) for channels in (2, 6)),
    ],
)
def test_the_mean_of_all_channels_whatever_their_number_and_layout(tmp_path, name, codec, channels):
    samples = 3.3 * speech(1.0, channels).clip(-0.3, 0.3)  # near full scale: a sum would clip
    mapping = ("-mapping_family", "255") if codec == "libopus" else ()
    try:
        path = encoded(tmp_path, name, samples, "-c:a", codec, *mapping)
    except subprocess.CalledProcessError:
        pytest.skip("this ffmpeg cannot encode it")
    read = read_audio(path)[: len(samples)] / 32768
    error = (read - samples[: len(read)].mean(1))[1600:-1600]
    assert np.abs(error).max() < (0.15 if codec == "libopus" else 1e-3)
    for channel in {1, channels}:
        one = read_audio(path, channel=channel)[: len(samples)] / 32768
        if codec != "libopus":  # ffmpeg and Opus order the channels of a layout differently
            expected = samples[: len(one), channel - 1]
            assert channel > 2 or np.abs(one - expected)[1600:-1600].max() < 1e-3
    with pytest.raises(AudioError, match=f"no channel {channels + 1}: it has {channels}"):
        read_audio(path, channel=channels + 1)


@needs_the_program
def test_a_movie_yields_its_sound_and_one_without_sound_says_so(tmp_path):
    picture = ["ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i", "color=s=32x32:d=3"]
    soundfile.write(tmp_path / "a.wav", speech(), RATE)
    subprocess.run([*picture, "-i", tmp_path / "a.wav", "-c:a", "aac", tmp_path / "a.mp4"], check=True)
    assert abs(len(read_audio(tmp_path / "a.mp4")) - 3 * RATE) < 2048
    subprocess.run([*picture, tmp_path / "silent.mp4"], check=True)
    with pytest.raises(AudioError, match="silent.mp4: no sound: this mp4 has no audio track"):
        read_audio(tmp_path / "silent.mp4")


@needs_the_program
def test_amr_is_read_to_its_last_frame():
    """Of frames of zeros."""
    content = b"#!AMR\n" + 100 * (b"\x3c" + bytes(31))
    assert len(read_audio(named(content))) == 2 * RATE
    assert len(read_audio(named(content + content))) == 4 * RATE
    with pytest.raises(AudioError, match="truncated: its last frame is incomplete"):
        read_audio(named(content + b"\x3c" + bytes(30)))
    with pytest.raises(AudioError, match="damaged: no AMR frame at byte 3,206"):
        read_audio(named(content + b"\x6c"))


@needs_the_program
def test_damage_within_an_m4a_is_refused(tmp_path):
    damaged = bytearray(encoded(tmp_path, "a.m4a", speech(), "-movflags", "+faststart").read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 99] = bytes(range(99))
    with pytest.raises(AudioError, match="in.zip/a.m4a: ffmpeg failed"):
        read_audio(named(damaged))


@needs_the_program
def test_a_member_of_a_zip_is_read(tmp_path):
    path = encoded(tmp_path, "a.m4a", speech())
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "a.m4a")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open("a.m4a") as member:
        np.testing.assert_array_equal(read_audio(member), read_audio(path))


@needs_the_program
def test_a_long_recording_takes_the_memory_of_its_samples(tmp_path):
    path = tmp_path / "a.m4a"
    source = ["-f", "lavfi", "-i", "sine=440:r=16000", "-t", "600"]
    subprocess.run(["ffmpeg", "-v", "error", *source, "-c:a", "aac", "-b:a", "16k", path], check=True)
    length, grown = memory_of_reading(path)
    assert abs(length - 600 * RATE) < 4096
    assert grown < 2 * length + 30e6
