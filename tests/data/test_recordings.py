"""Folders, archives, Kaldi folders and shards: which recordings they hold, under which names, and their samples."""

import errno
import json
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

import tiny
from memo_jax.audio import AudioError, read
from memo_jax.data import recordings as recordings_module
from memo_jax.data.recordings import Kind, find_recordings, input_kind, read_recording
from memo_jax.data.trial_lists import labelled_recordings
from recording_files import WRITERS, audio_bytes, noise, write_files, write_tar, write_zip

VOXCELEB = ["id10270/5r0dWxy17C8/00001.wav", "id10270/5r0dWxy17C8/00002.wav", "id10271/1gtz-CUIygI/00001.wav"]


def named(recordings):
    return [(item.name, item.speaker) for item in recordings]


def test_a_folder_is_a_speaker(tmp_path):
    write_files(tmp_path / "in", {"b/x/1.wav": None, "a/1.wav": None, "flat.wav": None, "notes.txt": b"text"})
    recordings, left_out = find_recordings([tmp_path / "in"])
    assert named(recordings) == [("a/1.wav", "a"), ("b/x/1.wav", "b"), ("flat.wav", "")]
    assert left_out == [(str(tmp_path / "in" / "notes.txt"), "not a recording: extension .txt")]
    assert [item.source for item in recordings] == [str(tmp_path / "in" / item.name) for item in recordings]
    np.testing.assert_array_equal(read_recording(recordings[0]), noise(seed=1))


@pytest.mark.parametrize("given", ["", "dev", "dev/aac", "dev/aac/id10270", "dev/aac/id10270/5r0dWxy17C8"])
def test_voxceleb_is_named_as_its_lists_name_it_whatever_folder_is_given(tmp_path, given, monkeypatch):
    root = write_files(tmp_path / "vox", {f"dev/aac/{name}": None for name in VOXCELEB})
    expected = [
        (name, name[:7])
        for name in VOXCELEB
        if given.split("/")[2:] == name.split("/")[: len(given.split("/")) - 2] or given.count("/") < 2
    ]
    for path in (root / given, os.path.relpath(root / given, tmp_path / "vox" / "dev")):
        monkeypatch.chdir(tmp_path / "vox" / "dev")
        recordings, _ = find_recordings([path])
        assert named(recordings) == expected
        assert all(len(read_recording(item)) == len(noise()) for item in recordings)


def test_voxceleb_in_the_current_folder(tmp_path, monkeypatch):
    write_files(tmp_path, {f"id10270/{name}": None for name in ("a/1.wav", "b/1.wav")})
    monkeypatch.chdir(tmp_path / "id10270")
    recordings, _ = find_recordings(["."])
    assert named(recordings) == [("id10270/a/1.wav", "id10270"), ("id10270/b/1.wav", "id10270")]
    assert len(read_recording(recordings[0])) == len(noise())


@pytest.mark.parametrize("suffix", WRITERS)
def test_archives_are_read_in_place(tmp_path, suffix):
    """Names are paths in the archive; the samples are those of the files, in every format."""
    samples = {
        f"s{index}/{index}.{kind.lower()}": (noise(seed=index), kind)
        for index, kind in enumerate(["WAV", "FLAC", "AIFF"])
    }
    content = {name: audio_bytes(*value) for name, value in samples.items()}
    path = WRITERS[suffix](tmp_path / f"in{suffix}", {"./README.md": b"text"} | content)
    assert input_kind(path) == "archive"
    recordings, left_out = find_recordings([path])
    assert named(recordings) == [(name, name[:2]) for name in samples]
    assert left_out == [(f"{path}/README.md", "not a recording: extension .md")]
    if not any(item.kind is Kind.STREAMED for item in recordings):
        for item in recordings:
            np.testing.assert_array_equal(read_recording(item), samples[item.name][0])
    assert [item.source for item in recordings] == [f"{path}/{name}" for name in samples]
    assert {item.archive for item in recordings} == {str(path)}


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_a_folder_in_an_archive_can_be_the_input_and_voxceleb_is_recognised(tmp_path, suffix):
    content = {f"LibriSpeech/train/{name}": audio_bytes(noise()) for name in ("19/198/0.wav", "26/495/0.wav")}
    path = WRITERS[suffix](tmp_path / f"in{suffix}", content)
    assert named(find_recordings([path / "LibriSpeech/train"])[0]) == [("19/198/0.wav", "19"), ("26/495/0.wav", "26")]
    path = WRITERS[suffix](tmp_path / f"vox{suffix}", {f"dev/aac/{name}": audio_bytes(noise()) for name in VOXCELEB})
    assert named(find_recordings([path])[0]) == [(name, name[:7]) for name in VOXCELEB]
    for folder in ("dev/aac/" + VOXCELEB[0][:7], "dev/aac/" + VOXCELEB[0].rpartition("/")[0]):
        found = named(find_recordings([path / folder])[0])
        assert found == [(name, name[:7]) for name in VOXCELEB if f"dev/aac/{name}".startswith(folder + "/")]
    with pytest.raises(FileNotFoundError, match="no such folder of recordings or archive"):
        find_recordings([tmp_path / "out.zip" / "folder"])


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EMFILE])
def test_faults_of_the_machine_are_none_of_a_recording(tmp_path, monkeypatch, error):
    """Else every recording that is read while a disk is full would be left out for ever."""
    write_files(tmp_path, {"a.wav": None})
    (recording,), _ = find_recordings([tmp_path])

    def failing(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(read.os, "open", failing)
    with pytest.raises(OSError, match=os.strerror(error)) as raised:
        read_recording(recording)
    assert not isinstance(raised.value, AudioError)


def test_faults_of_the_machine_are_none_of_an_archive(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "in.zip", {"a.wav": audio_bytes(noise())}, zipfile.ZIP_STORED)
    (recording,), _ = find_recordings([path])

    def failing(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(OSError, match="Too many open files"):
        read_recording(recording)
    monkeypatch.setattr(zipfile, "ZipFile", failing)
    with pytest.raises(OSError, match="Too many open files"):
        find_recordings([path])


@pytest.mark.parametrize("suffix", [".zip", ".stored.zip", ".tar", ".tar.gz", ".tar.xz"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_an_archive_cut_short_is_an_error(tmp_path, suffix, kept):
    path = WRITERS[suffix](
        tmp_path / f"in{suffix}", {f"{index}.wav": audio_bytes(noise(seed=index)) for index in range(20)}
    )
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"in{suffix}: not an archive, damaged or cut short .*get the file again"):
        find_recordings([path])


def test_what_is_damaged_in_an_archive_is_an_error_of_its_member(tmp_path):
    content = {f"{index}.wav": audio_bytes(noise(seed=index)) for index in range(3)}
    path = write_zip(tmp_path / "in.zip", content, zipfile.ZIP_STORED)
    recordings, _ = find_recordings([path])
    data = bytearray(path.read_bytes())
    data[recordings[1].extent.offset + 5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(AudioError, match="in.zip/1.wav: damaged in its archive: wrong checksum"):
        read_recording(recordings[1])
    np.testing.assert_array_equal(read_recording(recordings[2]), noise(seed=2))
    path.write_bytes(bytes(len(data)))
    with pytest.raises(AudioError, match="damaged in its archive: no header"):
        read_recording(recordings[0])
    os.unlink(path)
    with pytest.raises(AudioError, match="cannot be opened: No such file"):
        read_recording(recordings[0])


def test_links_and_encrypted_members_are_named(tmp_path):
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        info = tarfile.TarInfo("link.wav")
        info.type, info.linkname = tarfile.SYMTYPE, "a.wav"
        tar.addfile(info)
    path = write_zip(tmp_path / "in.zip", {"a.wav": audio_bytes(noise())})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        info = zipfile.ZipInfo("link.wav")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "a.wav")
    recordings, left_out = find_recordings([tmp_path / "in.tar", path, tmp_path / "link.zip"])
    assert recordings == [] and [reason for _, reason in left_out] == [
        "a link in its archive",
        "encrypted in its archive",
        "a link in its archive",
    ]


def test_no_archive_is_named(tmp_path):
    for name in ("a.zip", "a.tar", "a.tgz"):
        (tmp_path / name).write_bytes(b"something else" * 99)
        with pytest.raises(ValueError, match=f"{name}: not an archive"):
            find_recordings([tmp_path / name])
    (tmp_path / "a.wav").write_bytes(audio_bytes(noise()))
    with pytest.raises(ValueError, match="a.wav: expected a folder, a zip, a tar"):
        find_recordings([tmp_path / "a.wav"])


def kaldi_folder(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / name.replace("_", ".")).write_text("\n".join(lines) + "\n")
    return folder


def test_kaldi_folders_name_utterances_and_speakers(tmp_path):
    write_files(tmp_path / "audio", {"one.wav": None, "two words.wav": None})
    folder = kaldi_folder(
        tmp_path / "data",
        wav_scp=[f"utt-2 {tmp_path}/audio/two words.wav", "utt-1 ../audio/one.wav"],
        utt2spk=["utt-1 anna", "utt-2 bert"],
    )
    assert input_kind(folder) == "Kaldi folder"
    recordings, left_out = find_recordings([folder])
    assert named(recordings) == [("utt-1", "anna"), ("utt-2", "bert")] and left_out == []
    for seed, item in enumerate(recordings):
        np.testing.assert_array_equal(read_recording(item), noise(seed=seed))
    (folder / "utt2spk").unlink()
    assert named(find_recordings([folder])[0]) == [("utt-1", ""), ("utt-2", "")]


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_segments_of_kaldi_are_parts_of_recordings(tmp_path, kind):
    samples = noise(3.0)
    write_files(tmp_path, {"one.audio": audio_bytes(samples, kind)})
    folder = kaldi_folder(
        tmp_path / "data",
        wav_scp=[f"rec {tmp_path}/one.audio"],
        segments=["utt-a rec 0.5 1.25", "utt-b rec 2.0 -1", "utt-c rec 2.5 3.4", "utt-d rec 2.5 3.6", "utt-e rec 4 5"],
    )
    recordings, _ = find_recordings([folder])
    whole = read_recording(recordings[0]._replace(span=None))
    for item, (first, last) in zip(recordings, [(8000, 20000), (32000, 48000), (40000, 48000)]):
        np.testing.assert_allclose(read_recording(item), whole[first:last], atol=2)
    for item in recordings[3:]:
        with pytest.raises(AudioError, match="no such part"):
            read_recording(item)


def test_commands_of_kaldi_run_only_when_told(tmp_path):
    write_files(tmp_path, {"one.wav": None})
    folder = kaldi_folder(
        tmp_path / "data",
        wav_scp=[f"utt-1 touch {tmp_path}/ran; cat {tmp_path}/one.wav |", "utt-2 echo no such codec >&2; exit 3 |"],
    )
    with pytest.raises(ValueError, match="utt-1 is the output of a command, 'touch .*--run-commands"):
        find_recordings([folder])
    with pytest.raises(ValueError, match="no recording has a known speaker"):
        labelled_recordings(folder)  # reads names only
    assert not (tmp_path / "ran").exists()
    good, bad = find_recordings([folder], run_commands=True)[0]
    np.testing.assert_array_equal(read_recording(good), noise())
    with pytest.raises(AudioError, match="command failed: status 3: no such codec"):
        read_recording(bad)


def test_no_line_of_a_wav_scp_is_a_command_unless_kaldi_says_so(tmp_path, monkeypatch):
    """No path can spell a kind of source: these lines name files, which do not exist."""
    monkeypatch.chdir(tmp_path)
    lines = ["u1 |/touch ran", "u2 |touch ran", "u3 | /touch ran", "u4 tfds:x/0", "u5 tfds:librispeech:test/0"]
    for run_commands in (False, True):
        recordings, _ = find_recordings([kaldi_folder(tmp_path / "data", wav_scp=lines)], run_commands=run_commands)
        assert len(recordings) == 5
        for item in recordings:
            with pytest.raises(AudioError, match="no such file"):
                read_recording(item)
    assert not (tmp_path / "ran").exists()


def test_folders_and_archives_may_have_any_name(tmp_path, monkeypatch):
    """Names that once meant something else: those of commands and TFDS, and names like options or URLs."""
    monkeypatch.chdir(tmp_path)
    for number, folder in enumerate(("|", "tfds:x", "-rf", "a b", "http:", "x.zip", "$(touch ran)")):
        write_files(tmp_path / folder, {f"{number}/touch ran.wav": None})
        (item,) = find_recordings([folder])[0]
        assert (item.kind, item.name) == (Kind.FILE, f"{number}/touch ran.wav")
        assert len(read_recording(item)) == len(noise())
    path = write_tar(tmp_path / "|.tar", {"|/a.wav": audio_bytes(noise()), "tfds:x/0/a.wav": audio_bytes(noise())})
    recordings, _ = find_recordings([path])
    assert {item.kind for item in recordings} == {Kind.MEMBER}
    assert [len(read_recording(item)) for item in recordings] == [len(noise())] * 2
    assert not (tmp_path / "ran").exists()


def test_a_byte_order_mark_is_no_part_of_an_identifier(tmp_path):
    write_files(tmp_path, {"one.wav": None})
    folder = kaldi_folder(
        tmp_path / "data",
        wav_scp=[f"\ufeffu1 {tmp_path}/one.wav"],
        utt2spk=["\ufeffu1-a anna", "u1-b bert"],
        segments=["\ufeffu1-a u1 0 0.2", "u1-b u1 0.2 0.5"],
    )
    assert named(find_recordings([folder])[0]) == [("u1-a", "anna"), ("u1-b", "bert")]
    (tmp_path / "data" / "shards.list").write_text("\ufeff../in.tar\n")
    write_tar(tmp_path / "in.tar", {"a/1.wav": audio_bytes(noise())})
    assert named(find_recordings([tmp_path / "data" / "shards.list"])[0]) == [("a/1.wav", "a")]


def test_a_utt2spk_of_other_utterances_is_an_error_and_gaps_are_told(tmp_path, capsys):
    lines = [f"u{number} {number}.wav" for number in range(3)]
    folder = kaldi_folder(tmp_path / "data", wav_scp=lines, utt2spk=["x0 anna", "x1 bert"])
    with pytest.raises(ValueError, match="utt2spk: no speaker for any of the 3 utterances, .* 'u0' .it has 'x0'"):
        find_recordings([folder])
    (folder / "utt2spk").write_text("u1 bert\nx1 anna\n")
    assert named(find_recordings([folder])[0]) == [("u0", ""), ("u1", "bert"), ("u2", "")]
    assert "utt2spk: no speaker for 2 of 3 utterances, such as 'u0'" in capsys.readouterr().err
    (folder / "segments").write_text("u1-a u1 0 1\nu2-a u2 0 1\n")  # and the speaker of a whole recording
    assert named(find_recordings([folder])[0]) == [("u1-a", "bert"), ("u2-a", "")]


def test_forms_of_kaldi_paths(tmp_path, monkeypatch):
    """Unicode whitespace and bytes that are not UTF-8 are parts of a path; an offset points into an ark."""
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"M\xfcller.wav")
    write_files(tmp_path, {"no\u00a0break\u3000space.wav": None, odd: None, "one.wav:7": None, "a  b.wav": None})
    waves = [audio_bytes(noise(seed=number)) for number in range(2)]
    (tmp_path / "x.ark").write_bytes(b"u1 " + waves[0] + b"u2 " + waves[1])
    folder = kaldi_folder(tmp_path / "data")
    lines = [
        "1 no\u00a0break\u3000space.wav\r",
        f"2 {odd}",
        "3\tone.wav:7",
        "4 x.ark:3",
        f"5 x.ark:{6 + len(waves[0])}",
    ]
    (folder / "wav.scp").write_text("\n".join([*lines, "6 x.ark:4", "7 a  b.wav "]) + "\n", errors="surrogateescape")
    recordings, _ = find_recordings([folder])
    for item, seed in zip(recordings, (0, 1, 2, 0, 1, None, 3)):
        if seed is None:
            with pytest.raises(AudioError, match="x.ark:4: no wav at byte 4 of the ark"):
                read_recording(item)
        else:
            np.testing.assert_array_equal(read_recording(item), noise(seed=seed))
    (folder / "wav.scp").write_bytes(b"M\xfcller a.wav\n")
    with pytest.raises(ValueError, match="wav.scp, line 1: not UTF-8 text"):
        find_recordings([folder])


def test_channels_of_kaldi_segments(tmp_path):
    """The fifth field counts from 0, and takes precedence over the channel that is asked for."""
    left, right = noise(1.0, 0), noise(1.0, 1)
    write_files(tmp_path, {"two.wav": audio_bytes(np.stack([left, right], axis=1))})
    segments = ["a r 0 1 0", "b r 0.5 -1 1", "c r 0 1", "d r 0 1 2"]
    folder = kaldi_folder(tmp_path / "data", wav_scp=[f"r {tmp_path}/two.wav"], segments=segments)
    first, second, third, missing = find_recordings([folder])[0]
    np.testing.assert_array_equal(read_recording(first, channel=2), left)
    np.testing.assert_array_equal(read_recording(second), right[8000:])
    np.testing.assert_array_equal(read_recording(third, channel=2), right)
    assert not np.array_equal(read_recording(third), right)
    with pytest.raises(AudioError, match="no channel 3: it has 2"):
        read_recording(missing)


def test_a_command_with_too_much_output_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(recordings_module, "LARGEST_MEMBER", 1 << 20)
    folder = kaldi_folder(tmp_path / "data", wav_scp=["u yes |", "v yes error >&2; exit 1 |"])
    (folder / "wav.scp").write_text("u yes |\nv head -c 300000 /dev/zero >&2; exit 1 |\n")
    endless, noisy = find_recordings([folder], run_commands=True)[0]
    with pytest.raises(AudioError, match="command failed: more than 0.0 GB of output"):
        read_recording(endless)
    with pytest.raises(AudioError, match="command failed: status 1"):
        read_recording(noisy)


HIDDEN = ("._a.wav", "s1/._1.wav", ".trash/s1/1.wav", "__MACOSX/s1/._1.wav", "s1/.DS_Store")


@pytest.mark.parametrize("suffix", ["", ".zip", ".tar", ".tar.gz"])
def test_hidden_files_are_left_out_and_listed(tmp_path, suffix):
    """As macOS writes them beside recordings: they are named like recordings but hold none."""
    content = {"s1/1.wav": audio_bytes(noise()), "s2/1.wav": audio_bytes(noise())} | dict.fromkeys(HIDDEN, b"\0\5\x16")
    path = WRITERS[suffix](tmp_path / f"in{suffix}", content) if suffix else write_files(tmp_path / "in", content)
    recordings, left_out = find_recordings([path])
    assert named(recordings) == [("s1/1.wav", "s1"), ("s2/1.wav", "s2")]
    assert left_out == sorted((f"{path}/{name}", "hidden file") for name in HIDDEN)
    nested = write_files(tmp_path / ".cache" / "corpus", {"a/1.wav": None})  # the input itself may be hidden
    assert named(find_recordings([nested])[0]) == [("a/1.wav", "a")]


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_the_archive_of_a_folder_gives_what_the_folder_gives(tmp_path, suffix):
    content = {f"s{number}/x/{number}.wav": audio_bytes(noise()) for number in range(3)} | {
        "flat.wav": audio_bytes(noise())
    }
    expected = named(find_recordings([write_files(tmp_path / "corpus", content)])[0])
    packed = {f"corpus/{name}": data for name, data in content.items()} | {"README.md": b"text"}
    path = WRITERS[suffix](tmp_path / f"in{suffix}", packed)
    recordings, _ = find_recordings([path])
    assert sorted(named(recordings)) == expected and {speaker for _, speaker in expected} == {"s0", "s1", "s2", ""}
    assert all(item.source == f"{path}/corpus/{item.name}" for item in recordings)
    assert sorted(named(find_recordings([path / "corpus"])[0])) == expected
    path = WRITERS[suffix](tmp_path / f"vox{suffix}", {"id10270/v/1.wav": audio_bytes(noise())})
    assert named(find_recordings([path])[0]) == [("id10270/v/1.wav", "id10270")]
    # A folder with nothing but recordings may be a speaker, and each speaker has an archive.
    path = WRITERS[suffix](
        tmp_path / f"s1{suffix}", {"s1/1.wav": audio_bytes(noise()), "s1/2.wav": audio_bytes(noise())}
    )
    assert named(find_recordings([path])[0]) == [("s1/1.wav", "s1"), ("s1/2.wav", "s1")]


@pytest.mark.parametrize("suffix", ["", ".zip", ".tar", ".tar.gz"])
def test_every_file_is_a_recording_or_listed(tmp_path, suffix):
    """Names that a file system allows: not UTF-8, with line breaks and tabs."""
    odd = {os.fsdecode(b"a/M\xfcller.wav"): "not valid UTF-8", "a/new\nline.wav": "line break", "a/tab\t.wav": "a tab"}
    good = {"a/'quoted' \"x\" $(y) `z`.wav": None, "a/-v.wav": None, "a/b:c.wav": None, "a/日本 \u2028.wav": None}
    content = dict.fromkeys([*odd, *good], audio_bytes(noise()))
    if suffix == ".zip":  # Python writes UTF-8 only
        content.pop(next(iter(odd)))
    path = WRITERS[suffix](tmp_path / f"in{suffix}", content) if suffix else write_files(tmp_path / "in", content)
    recordings, left_out = find_recordings([path])
    assert {item.name for item in recordings} == set(good)
    assert len(recordings) + len(left_out) == len(content)
    for source, reason in left_out:
        assert reason.startswith("odd name") and odd[source.removeprefix(f"{path}/")] in reason
    if suffix != ".tar.gz":
        assert all(len(read_recording(item)) == len(noise()) for item in recordings)


def test_members_of_a_zip_that_cannot_be_read_are_listed(tmp_path):
    path = write_zip(tmp_path / "in.zip", {"a/1.wav": audio_bytes(noise())}, zipfile.ZIP_BZIP2)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/2.wav", audio_bytes(noise()))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/3.wav", audio_bytes(noise()))
    recordings, left_out = find_recordings([path])
    assert named(recordings) == [("a/3.wav", "a")]
    reason = "compressed in an unusual way: unpack the archive"
    assert left_out == [(f"{path}/a/1.wav", reason), (f"{path}/a/2.wav", reason)]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"wav_scp": ["utt"]}, "wav.scp, line 1: one field only"),
        ({"wav_scp": ["utt a.wav", "utt b.wav"]}, "wav.scp, line 2: 'utt' appears twice"),
        ({"wav_scp": ["utt a.wav"], "utt2spk": ["utt anna", "utt anna"]}, "utt2spk, line 2: 'utt' appears twice"),
        (
            {"wav_scp": ["rec a.wav"], "segments": ["utt rec 0 1", "utt2 other 0 1"]},
            "segments, line 2: .*no recording 'other'",
        ),
        (
            {"wav_scp": ["rec a.wav"], "segments": ["utt rec 1"]},
            "segments, line 1: expected 'utterance recording begin end'",
        ),
        ({"wav_scp": ["rec a.wav"], "segments": ["utt rec 2 1"]}, "segments, line 1: expected"),
        ({"wav_scp": ["rec a.wav"], "segments": ["utt rec 0 nan"]}, "segments, line 1: expected"),
        ({"wav_scp": ["rec a.wav"], "segments": ["utt rec 0 1 left"]}, "segments, line 1: expected .*channel"),
        ({"wav_scp": ["rec a.wav"], "segments": ["utt rec 0 1 -1"]}, "segments, line 1: expected .*channel"),
        ({"wav_scp": ["rec a.wav"], "segments": ["utt rec 0 1 0 0"]}, "segments, line 1: expected .*channel"),
        ({"wav_scp": ["rec a.wav"], "segments": ["utt \u3000"]}, "segments, line 1: expected"),
        ({"wav_scp": ["utt a.wav"], "utt2spk": ["utt anna mary"]}, "utt2spk, line 1: expected 'utterance speaker'"),
        ({"wav_scp": []}, "wav.scp: no recordings: the file is empty"),
        ({"wav_scp": ["rec a.wav"], "segments": []}, "segments: no utterances: the file is empty"),
    ],
)
def test_wrong_kaldi_files_are_named_with_their_line(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        find_recordings([kaldi_folder(tmp_path / "data", **files)])


def test_kaldi_files_in_utf_16_and_links_that_lead_nowhere_are_named(tmp_path):
    """A utt2spk that cannot be read is not treated as absent."""
    folder = kaldi_folder(tmp_path / "data", wav_scp=["utt a.wav"])
    (folder / "utt2spk").symlink_to("moved")
    with pytest.raises(FileNotFoundError, match="utt2spk"):
        find_recordings([folder])
    (folder / "utt2spk").unlink()
    (folder / "utt2spk").write_text("utt anna\n", encoding="utf-16")
    with pytest.raises(ValueError, match="utt2spk, line 1: UTF-16 text: save it as UTF-8"):
        find_recordings([folder])


def test_shards_of_wespeaker(tmp_path, monkeypatch):
    """Keys are the names, and may look like file names; speakers are those of the shards."""
    for shard in range(2):
        write_tar(
            tmp_path / f"shards_{shard}.tar",
            {
                f"id1000{shard}/v/1.wav.spk": f"id1000{shard}".encode(),
                f"id1000{shard}/v/1.wav.wav": audio_bytes(noise()),
                f"utt{shard}.spk": b"other",
                f"utt{shard}.flac": audio_bytes(noise(seed=1), "FLAC"),
            },
        )
    expected = [("id10000/v/1.wav", "id10000"), ("id10001/v/1.wav", "id10001"), ("utt0", "other"), ("utt1", "other")]
    (tmp_path / "shard.list").write_text(f"{tmp_path}/shards_0.tar\nshards_1.tar\n")
    assert input_kind(tmp_path / "shard.list") == "list of shards"
    recordings, left_out = find_recordings([tmp_path / "shard.list"])
    assert named(recordings) == expected and left_out == []
    np.testing.assert_array_equal(read_recording(recordings[2]), noise(seed=1))
    assert named(find_recordings([tmp_path / "shards_0.tar", tmp_path / "shards_1.tar"])[0]) == expected
    (tmp_path / "bad.list").write_text("shards_0.tar\n\nshards_7.tar\n")
    with pytest.raises(FileNotFoundError, match="bad.list, line 3: shards_7.tar: no such file"):
        find_recordings([tmp_path / "bad.list"])


def test_inputs_of_all_kinds_mix_and_names_must_differ(tmp_path):
    write_files(tmp_path / "folder", {"a/1.wav": None})
    kaldi_folder(tmp_path / "kaldi", wav_scp=[f"b/1 {tmp_path}/folder/a/1.wav"])
    inputs = [tmp_path / "folder", tmp_path / "kaldi"]
    for suffix in (".zip", ".tar", ".tar.gz"):
        inputs.append(WRITERS[suffix](tmp_path / f"in{suffix}", {f"{suffix[1:]}/1.wav": audio_bytes(noise())}))
    assert [item.name for item in find_recordings(inputs)[0]] == [
        "a/1.wav",
        "b/1",
        "tar/1.wav",
        "zip/1.wav",
        "tar.gz/1.wav",
    ]
    write_zip(tmp_path / "same.zip", {"a/1.wav": audio_bytes(noise())})
    with pytest.raises(ValueError, match="folder/a/1.wav and .*same.zip/a/1.wav would both be called a/1.wav"):
        find_recordings([*inputs, tmp_path / "same.zip"])


def test_a_member_that_is_there_twice_is_an_error_that_says_so(tmp_path):
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("a/1.wav")
            tar.addfile(info)
    with pytest.raises(ValueError, match="in.tar/a/1.wav appears twice"):
        find_recordings([tmp_path / "in.tar"])


def test_no_name_leads_out_of_an_archive(tmp_path):
    path = write_tar(
        tmp_path / "in.tar", {"../../etc/1.wav": audio_bytes(noise()), "/a/../b/2.wav": audio_bytes(noise())}
    )
    assert named(find_recordings([path])[0]) == [("b/2.wav", "b"), ("etc/1.wav", "etc")]


def test_the_benchmark_of_listing_runs():
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no /proc to measure memory by")
    program = tiny.ROOT / "experiments" / "benchmarks" / "listing.py"
    run = subprocess.run(
        [sys.executable, program, "--recordings", "100", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=tiny.environment(),
    )
    results = json.loads(run.stdout)
    assert results.keys() == {"folder", "zip", "tar", "tar.gz"}
    for row in results.values():
        assert row.keys() == {"recordings", "list_seconds", "list_megabytes", "read_plan_seconds"}
        assert row["recordings"] == 100
