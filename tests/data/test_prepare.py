"""Folders become datasets: what goes in, under which name, what is left out, and that nothing half-written remains."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import soundfile

import tiny
from memo_jax.data import prepare as prepare_module
from memo_jax.data.batches import Utterances
from memo_jax.data.prepare import preparation_text, prepare
from memo_jax.scoring.trials import read_trials, trial_pairs
from recording_files import WRITERS

RATE = 16000


def write_recording(path, seconds=1.0, seed=0, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).integers(-9999, 9999, round(seconds * rate)).astype(np.int16)
    soundfile.write(path, samples, rate)
    return samples


@pytest.fixture
def speech(tmp_path):
    """Three speakers: six recordings of 0.6 to 1.1 s."""
    folder = tmp_path / "speech"
    for index, name in enumerate(["c/x/2.wav", "a/1.flac", "b/1.wav", "a/0.wav", "c/x/1.wav", "c/y/1.wav"]):
        write_recording(folder / name, 0.6 + index / 10, seed=index)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_utterances_carry_path_speaker_and_samples(speech, tmp_path):
    report = prepare(speech, tmp_path / "set", workers=1)
    utterances = Utterances(tmp_path / "set")
    assert utterances.names == ["a/0.wav", "a/1.flac", "b/1.wav", "c/x/1.wav", "c/x/2.wav", "c/y/1.wav"]
    assert utterances.speakers == ["a", "a", "b", "c", "c", "c"]
    for index, name in enumerate(utterances.names):
        np.testing.assert_array_equal(utterances[index], soundfile.read(speech / name, dtype="int16")[0])
    np.testing.assert_allclose(utterances.seconds, [len(samples) / RATE for samples in utterances])
    assert report["utterances"] == 6 and report["speakers"] == 3 and report["left_out"] == []
    assert report["fingerprint"] == utterances.fingerprint
    assert "6 utterances, 3 speakers" in preparation_text(report)


def test_flat_folders_have_no_speakers(tmp_path):
    write_recording(tmp_path / "in" / "one.wav")
    report = prepare(tmp_path / "in", tmp_path / "set", workers=1)
    assert Utterances(tmp_path / "set").speakers == [""]
    assert report["speakers"] == 0 and "speakers" not in preparation_text(report)


def test_several_folders_make_one_dataset(tmp_path):
    write_recording(tmp_path / "one" / "b" / "1.wav")
    write_recording(tmp_path / "two" / "a" / "1.wav")
    prepare([tmp_path / "one", tmp_path / "two"], tmp_path / "set", workers=1)
    assert Utterances(tmp_path / "set").names == ["a/1.wav", "b/1.wav"]
    write_recording(tmp_path / "two" / "b" / "1.wav")
    with pytest.raises(ValueError, match="would both be called b/1.wav"):
        prepare([tmp_path / "one", tmp_path / "two"], tmp_path / "other", workers=1)


def test_a_name_that_two_folders_give_a_speaker_is_reported(tmp_path, capsys):
    """But for VoxCeleb's, who are the same people everywhere; id00014 is in a folder as another corpus has it."""
    names = ("one/7", "two/7", "one/8", "two/9", "one/id00012/a", "two/id00012/b", "one/id00014", "two/id00014/a")
    for number, name in enumerate(names):
        write_recording(tmp_path / name / f"{number}.wav")
    report = prepare([tmp_path / "one", tmp_path / "two"], tmp_path / "set", workers=1)
    said = capsys.readouterr().err
    assert report["speakers"] == 5 and "2 speakers (7, id00014) in more than one input: treated as" in said


def test_other_readers_of_tfds_open_it_without_tensorflow(speech, tmp_path):
    prepare(speech, tmp_path / "set", workers=1)
    program = (
        "import sys, tensorflow_datasets as tfds\n"
        "first = tfds.builder_from_directory(sys.argv[1]).as_data_source('train')[0]\n"
        "print(first['name'].decode(), first['speaker'].decode(), first['samples'].dtype,"
        " len(first['samples']), 'tensorflow' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path / "set"], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["a/0.wav", "a", "int16", str(len(Utterances(tmp_path / "set")[0])), "False"]


def test_the_result_does_not_depend_on_the_workers(speech, tmp_path, monkeypatch):
    """Every byte of every file is the same from this process and from two others."""
    monkeypatch.setattr(prepare_module, "RECORDINGS_PER_SHARD", 2)
    one = prepare(speech, tmp_path / "one", workers=1)
    two = prepare(speech, tmp_path / "two", workers=2)
    assert one["shards"] == two["shards"] == 3
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_shards_are_bounded_in_bytes(speech, tmp_path, monkeypatch):
    """Six recordings of 19 to 35 kB and shards of 60 kB of samples at most: three shards of two, order kept."""
    prepare(speech, tmp_path / "whole", workers=1)
    monkeypatch.setattr(prepare_module, "BYTES_PER_SHARD", 60_000)
    report = prepare(speech, tmp_path / "parts", workers=1)
    whole, parts = Utterances(tmp_path / "whole"), Utterances(tmp_path / "parts")
    sizes = {
        folder: [path.stat().st_size for path in (tmp_path / folder).glob("*array_record*")]
        for folder in ("whole", "parts")
    }
    assert report["shards"] == len(sizes["parts"]) == 3 and max(sizes["parts"]) < min(sizes["whole"])
    assert whole.names == parts.names and whole.fingerprint == parts.fingerprint
    assert all((a == b).all() for a, b in zip(whole, parts))


def test_labels_change_nothing_but_labels(speech, tmp_path, monkeypatch):
    """Other speakers, with names of different lengths: the same order, shards, samples and fingerprint."""
    monkeypatch.setattr(prepare_module, "BYTES_PER_SHARD", 60_000)
    prepare(speech, tmp_path / "true", workers=1)
    true = Utterances(tmp_path / "true")
    labels = {name: f"scrambled {index * 7919}" for index, name in enumerate(true.names)}
    prepare(speech, tmp_path / "false", workers=1, speakers=labels)
    false = Utterances(tmp_path / "false")
    assert false.speakers == list(labels.values()) != true.speakers
    assert false.names == true.names and false.fingerprint == true.fingerprint
    for left, right in zip(true, false):
        np.testing.assert_array_equal(left, right)


def test_the_fingerprint_knows_names_and_audio(speech, tmp_path):
    before = prepare(speech, tmp_path / "0", workers=1)["fingerprint"]
    write_recording(speech / "a" / "0.wav", 0.9, seed=99)
    audio = prepare(speech, tmp_path / "1", workers=1)["fingerprint"]
    os.rename(speech / "a" / "0.wav", speech / "a" / "00.wav")
    name = prepare(speech, tmp_path / "2", workers=1)["fingerprint"]
    assert len({before, audio, name}) == 3


def test_bad_files_are_listed_and_left_out(speech, tmp_path):
    bad = {
        "a/empty.wav": "empty file",
        "a/text.wav": "not readable as audio",
        "a/short.wav": "shorter than 0.5 s",
        "b/silent.wav": "silence",
        "b/nan.wav": "NaN",
        "b/cut.wav": "truncated",
        "notes.txt": "not a recording",
        "c/tab\there.wav": "odd name",
    }
    (speech / "a/empty.wav").write_bytes(b"")
    (speech / "a/text.wav").write_text("not sound")
    write_recording(speech / "a/short.wav", 0.01)
    soundfile.write(speech / "b/silent.wav", np.zeros(RATE), RATE)
    soundfile.write(speech / "b/nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    write_recording(speech / "b/cut.wav")
    (speech / "b/cut.wav").write_bytes((speech / "b/cut.wav").read_bytes()[:9999])
    (speech / "notes.txt").write_text("not sound")
    write_recording(speech / "c/tab\there.wav")
    report = prepare(speech, tmp_path / "set", workers=1)
    reasons = {os.path.relpath(file, speech): reason for file, reason in report["left_out"]}
    assert reasons.keys() == bad.keys()
    assert all(reasons[name].startswith(reason) for name, reason in bad.items())
    lines = (tmp_path / "set" / "left_out.tsv").read_text().splitlines()
    assert len(lines) == 1 + len(bad) and all(len(line.split("\t")) == 2 for line in lines)
    assert report["utterances"] == 6 and "left out 8 files" in preparation_text(report)


def test_odd_names_rates_and_channels_are_taken(tmp_path):
    write_recording(tmp_path / "in" / "Zoë Müller" / "two words.wav", rate=48000)
    soundfile.write(tmp_path / "in" / "Zoë Müller" / "日本.flac", np.random.default_rng(0).random((8000, 2)), 8000)
    prepare(tmp_path / "in", tmp_path / "a set", workers=1)
    utterances = Utterances(tmp_path / "a set")
    assert utterances.names == ["Zoë Müller/two words.wav", "Zoë Müller/日本.flac"]
    assert [len(samples) for samples in utterances] == [RATE, RATE]


def test_the_manifest_and_what_was_left_out_open_in_pandas(tmp_path):
    """Names of every kind, including those that pandas would otherwise take for numbers, missing values or quotes."""
    names = ["007/1.wav", "NA/1.wav", 'x/"quoted.wav', "Zoë Müller/two words.wav", "x/1,2;3.wav"]
    for index, name in enumerate(names):
        write_recording(tmp_path / "in" / name, 0.5 + index / 10, index)
    (tmp_path / "in" / "x" / "empty.wav").write_bytes(b"")
    (tmp_path / "in" / "x" / "tab\there.wav").write_bytes(b"")
    prepare(tmp_path / "in", tmp_path / "set", workers=1)
    options = {"sep": "\t", "quoting": 3}
    table = pandas.read_csv(tmp_path / "set" / "manifest.tsv", **options, keep_default_na=False)
    assert list(table.columns) == ["name", "speaker", "seconds", "checksum", "source"]
    assert list(table["name"]) == sorted(names) and table["seconds"].dtype == float
    assert list(table["speaker"]) == ["007", "NA", "Zoë Müller", "x", "x"]
    assert list(table["source"]) == [str(tmp_path / "in" / name) for name in sorted(names)]
    np.testing.assert_allclose(table["seconds"].sum(), 5 * 0.5 + 1.0)
    assert len(pandas.read_csv(tmp_path / "set" / "manifest.tsv", **options)) == 5
    table = pandas.read_csv(tmp_path / "set" / "left_out.tsv", **options)
    assert list(table.columns) == ["source", "reason"]
    assert list(table["reason"]) == ["empty file", "odd name: a tab or a line break"]


def test_a_missing_ffmpeg_is_reported_before_the_work(tmp_path, monkeypatch, capsys):
    write_recording(tmp_path / "in" / "a" / "1.wav")
    (tmp_path / "in" / "a" / "2.m4a").write_bytes(b"something")
    monkeypatch.setenv("PATH", str(tmp_path))
    report = prepare(tmp_path / "in", tmp_path / "set", workers=1)
    assert "ffmpeg is missing: without it, 1 recording will be left out, such as" in capsys.readouterr().err
    assert report["utterances"] == 1 and [os.path.basename(file) for file, _ in report["left_out"]] == ["2.m4a"]
    os.unlink(tmp_path / "in" / "a" / "1.wav")
    with pytest.raises(ValueError, match="ffmpeg is missing, and all recordings need it, such as .*2.m4a: install it"):
        prepare(tmp_path / "in", tmp_path / "other", workers=1)
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_voxceleb2_as_it_comes_serves_trial_lists_that_say_wav(tmp_path, suffix):
    """m4a in an archive, below folders."""
    names, content = ["id00012/21Uxsk56VDQ/00001", "id00013/21Uxsk56VDQ/00001"], {}
    for name in names:
        write_recording(tmp_path / f"{name}.wav")
        subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / f"{name}.wav", tmp_path / f"{name}.m4a"], check=True)
        content[f"dev/aac/{name}.m4a"] = (tmp_path / f"{name}.m4a").read_bytes()
    content["dev/aac/id00013/21Uxsk56VDQ/00002.m4a"] = content["dev/aac/id00013/21Uxsk56VDQ/00001.m4a"][:3000]
    archive = WRITERS[suffix](tmp_path / f"vox2{suffix}", content)
    report = prepare(archive, tmp_path / "set", workers=1)
    (tmp_path / "trials.txt").write_text(f"0 {names[0]}.wav {names[1]}.wav\n")
    utterances = Utterances(tmp_path / "set")
    assert trial_pairs(read_trials(tmp_path / "trials.txt"), utterances.names).tolist() == [[0, 1]]
    assert utterances.speakers == ["id00012", "id00013"]
    assert [(file, reason.split(":")[0]) for file, reason in report["left_out"]] == [
        (f"{archive}/dev/aac/id00013/21Uxsk56VDQ/00002.m4a", "truncated")
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "no recordings in"),
        ({"a.wav": b""}, r"no usable recording in .* \(1 × empty file\)"),
        ({"a.txt": b"x"}, "no recordings in .* not a recording"),
    ],
)
def test_a_run_with_nothing_left_fails_and_leaves_nothing(tmp_path, content, message):
    (tmp_path / "in").mkdir()
    for name, data in content.items():
        (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "in", tmp_path / "out" / "set", workers=1)
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_a_missing_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        prepare(tmp_path / "nowhere", tmp_path / "set", workers=1)


def test_existing_output_is_kept_unless_told(speech, tmp_path):
    prepare(speech, tmp_path / "set", workers=1)
    write_recording(speech / "d" / "1.wav")
    with pytest.raises(FileExistsError, match="--overwrite"):
        prepare(speech, tmp_path / "set", workers=1)
    assert len(Utterances(tmp_path / "set")) == 6
    prepare(speech, tmp_path / "set", workers=1, overwrite=True)
    assert len(Utterances(tmp_path / "set")) == 7
    assert sorted(os.listdir(tmp_path)) == ["set", "speech"]


def test_only_datasets_are_ever_replaced(speech, tmp_path):
    """Overwriting must not delete somebody's folder, least of all the recordings."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a dataset"):
        prepare(speech, tmp_path / "thesis", workers=1, overwrite=True)
    for output in (speech, tmp_path):
        with pytest.raises(ValueError, match="is or contains the input"):
            prepare(speech, output, workers=1, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists() and (speech / "a" / "0.wav").exists()


def test_an_output_inside_the_input_is_not_an_input(speech):
    prepare(speech, speech / "set", workers=1)
    prepare(speech, speech / "set", workers=1, overwrite=True)
    assert len(Utterances(speech / "set")) == 6


def test_an_output_that_cannot_be_created_is_named(speech, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        prepare(speech, tmp_path / "file" / "set", workers=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_named(speech, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(PermissionError, match="Permission denied.*out/set"):
        prepare(speech, tmp_path / "out" / "set", workers=1)


def test_a_disk_that_fills_is_an_error_that_leaves_nothing(speech, tmp_path):
    """A limit on the size of a file stands in for a full disk: the same failing write, without mounting one."""
    program = (
        "import resource, sys; from memo_jax.data.prepare import prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))\n"
        "try: prepare(sys.argv[1], sys.argv[2], workers=1)\n"
        "except OSError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, speech, tmp_path / "out" / "set"], capture_output=True, text=True, timeout=60
    )
    assert f"cannot write {tmp_path / 'out' / 'set'}: File too large" in run.stdout, run.stderr
    assert os.listdir(tmp_path) == ["speech"]


def test_what_a_killed_run_left_is_no_obstacle(speech, tmp_path):
    (tmp_path / ".set.partial").mkdir()
    (tmp_path / ".set.partial" / "task-00000-00000").write_bytes(b"half a shard")
    prepare(speech, tmp_path / "set", workers=1)
    assert len(Utterances(tmp_path / "set")) == 6
    assert sorted(os.listdir(tmp_path)) == ["set", "speech"]


def test_a_channel_can_be_chosen(tmp_path):
    """One of two channels that cancel in their mean; a recording without that channel is listed as left out."""
    left = write_recording(tmp_path / "in" / "a" / "mono.wav", seed=1)
    soundfile.write(tmp_path / "in" / "a" / "two.wav", np.stack([left, -left], axis=1), RATE)
    status, text = tiny.here("prepare", "--input", tmp_path / "in", "--output", tmp_path / "mean", "--workers", "1")
    assert status == 0 and "1 utterance, 1 speaker, 0.00 hours, 1 shard\nleft out 1 file (1 × " in text
    status, _ = tiny.here(
        *("prepare", "--input", tmp_path / "in", "--output", tmp_path / "second", "--workers", "1", "--channel", "2")
    )
    assert status == 0 and Utterances(tmp_path / "second").names == ["a/two.wav"]
    np.testing.assert_array_equal(Utterances(tmp_path / "second")[0], -left)
    assert "mono.wav\tno channel 2: it has 1" in (tmp_path / "second" / "left_out.tsv").read_text()
    status, text = tiny.here("prepare", "--input", "x", "--output", "y", "--channel", "left")
    assert status == 2 and "channel 'left': expected mean, or a number from 1" in text


def test_two_at_once_end_with_one_dataset_and_one_refusal(speech, tmp_path):
    command = ["prepare", "--input", speech, "--output", tmp_path / "set", "--workers", "1"]
    command = [sys.executable, "-m", "memo_jax", *map(str, command)]
    both = [subprocess.Popen(command, env=tiny.environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    refused = errors[0 if both[0].returncode else 1]
    assert "set is in use by process" in refused or "set exists already" in refused
    assert len(Utterances(tmp_path / "set")) == 6
    assert sorted(os.listdir(tmp_path)) == ["set", "speech"]
