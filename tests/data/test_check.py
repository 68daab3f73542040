"""`prepare --check`: an intact dataset passes, and any damage is named, by the check and on reading."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import soundfile

import tiny
from memo_jax.data import prepare as prepare_module
from memo_jax.data import records
from memo_jax.data.batches import Utterances
from memo_jax.data.check import check, check_text
from memo_jax.data.prepare import prepare

RATE = 16000


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Ten utterances of two speakers in five shards; the last is longer than two segments."""
    monkeypatch.setattr(prepare_module, "RECORDINGS_PER_SHARD", 2)
    rng = np.random.default_rng(0)
    for number in range(10):
        path = tmp_path / "speech" / f"s{number // 5}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        length = RATE + 1000 * number if number < 9 else 30 * RATE
        soundfile.write(path, rng.integers(-9999, 9999, length).astype(np.int16), RATE)
    prepare(tmp_path / "speech", tmp_path / "set", workers=1)
    return tmp_path / "set"


def shard(dataset, number):
    return dataset / f"speech-train.array_record-{number:05d}-of-00005"


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def only_problem(dataset):
    ((file, problem),) = check(dataset, workers=1)["problems"]
    return file, problem


def test_a_sound_dataset_has_no_problems_and_the_command_exits_0(dataset):
    report = check(dataset, workers=1)
    assert report["problems"] == [] and report["utterances"] == 10 and report["shards"] == 5
    status, text = tiny.here("prepare", "--check", dataset, "--workers", "2")
    assert status == 0 and "10 utterances, 0.01 hours, 5 shards, all as prepared" in text


def test_a_flipped_bit_anywhere_in_a_record_is_found_and_the_command_exits_2(dataset):
    path, name = shard(dataset, 1), "s0/2.wav"
    sound = path.read_bytes()
    samples = soundfile.read(dataset.parent / "speech" / name, dtype="int16")[0].tobytes()
    begin = sound.index(samples)
    for at in [sound.index(name.encode()), *np.linspace(begin, begin + len(samples) - 1, 7, dtype=int)]:
        data = bytearray(sound)
        data[at] ^= 1
        path.write_bytes(data)
        file, problem = only_problem(dataset)
        assert file == path.name and problem.startswith("record 0 cannot be read")
    status, text = tiny.here("prepare", "--check", dataset, "--workers", "1")
    assert status == 2 and "is damaged: 1 problem in 10 utterances" in text and f"{path.name}: record 0" in text


@pytest.mark.parametrize("kept", [0, 0.2, 0.5, 0.99])
def test_a_truncated_shard_is_named(dataset, kept):
    path = shard(dataset, 2)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    file, problem = only_problem(dataset)
    assert file == path.name and ("cannot be read" in problem or "records, expected 2" in problem)


def test_all_that_is_damaged_is_named_up_to_a_number(dataset, monkeypatch):
    os.unlink(shard(dataset, 0))
    path = shard(dataset, 4)
    path.write_bytes(path.read_bytes()[:100])
    report = check(dataset, workers=1)
    assert [file for file, _ in report["problems"]] == [shard(dataset, 0).name, path.name]
    assert "is gone" in report["problems"][0][1]
    monkeypatch.setattr("memo_jax.data.check.SHOWN_PROBLEMS", 1)
    assert check_text(dataset, report).count("\n  ") == 2
    assert "… and 1 more" in check_text(dataset, report)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("s0/1.wav", "s0/7.wav", "utterance s0/7.wav: the record's name and speaker are 's0/1.wav' 's0'"),
        ("s0/1.wav\ts0", "s0/1.wav\ts1", "utterance s0/1.wav: the record's name and speaker are 's0/1.wav' 's0'"),
        ("1.0625000", "1.0625001", r"utterance s0/1.wav: 1.0625000 s, the manifest says 1.0625001"),
        ("1.0625000\t", "1.0625000\t0", "utterance s0/1.wav: checksum "),
        ("name\tspeaker", "speaker\tname", "line 1 is not as prepare wrote it"),
        ("s0/1.wav\ts0\t", "s0/1.wav\t", "line 3 is not as prepare wrote it"),
    ],
)
def test_an_edited_manifest_is_named_with_what_was_edited(dataset, old, new, said):
    edit(dataset / "manifest.tsv", old, new)
    problems = check(dataset, workers=1)["problems"]
    assert problems[0][0] == "manifest.tsv" and any(said in problem for _, problem in problems)


def test_a_row_too_few_or_no_manifest_at_all(dataset):
    lines = (dataset / "manifest.tsv").read_text().splitlines(keepends=True)
    (dataset / "manifest.tsv").write_text("".join(lines[:4] + lines[5:]))
    assert only_problem(dataset) == ("manifest.tsv", "9 utterances, the dataset has 10")
    os.unlink(dataset / "manifest.tsv")
    assert only_problem(dataset)[0] == "manifest.tsv"


def test_two_records_that_changed_places_are_found(dataset):
    """Each shard is sound, and all counts agree."""
    one, two = shard(dataset, 0), shard(dataset, 1)
    one_bytes, two_bytes = one.read_bytes(), two.read_bytes()
    one.write_bytes(two_bytes), two.write_bytes(one_bytes)
    problems = check(dataset, workers=1)["problems"]
    assert {file for file, _ in problems} == {one.name, two.name}
    assert any("utterance s0/0.wav: the record's name and speaker are 's0/2.wav'" in problem for _, problem in problems)


def edit_index(dataset, row, column, by):
    index = np.load(dataset / "index.npy")
    index[row, column] += by
    np.save(dataset / "index.npy", index)


def agree(dataset):
    """Makes the checksums match the files, as a bug or a forger would."""
    records._write_checksums(dataset)


@pytest.mark.parametrize("by", [1, -1, 1_000_000, -(1 << 62)])
def test_a_wrong_length_in_the_index_is_named(dataset, by):
    edit_index(dataset, 3, 1, by)
    assert only_problem(dataset) == ("index.npy", "damaged or changed")
    agree(dataset)
    file, problem = check(dataset, workers=1)["problems"][0]
    assert file == "index.npy" or f"index.npy says {19_000 + by:,}" in problem


def test_an_index_that_claims_a_terabyte_takes_no_memory(dataset):
    path = dataset / "index.npy"
    claimed = path.read_bytes().replace(b"(10, 3), }        ", b"(9999999999, 3), }")
    assert len(claimed) == path.stat().st_size and claimed != path.read_bytes()
    path.write_bytes(claimed)
    agree(dataset)
    assert only_problem(dataset) == ("index.npy", "does not account for the records")
    with pytest.raises(ValueError, match="index.npy is damaged"):
        Utterances(dataset)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "metadata.json"])
@pytest.mark.parametrize("damage", ["cut", "other", "missing"])
def test_damaged_metadata_is_one_clear_line(dataset, name, damage):
    path = dataset / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40] if damage == "cut" else path.read_bytes().replace(b"1", b"2"))
    assert (name, "missing" if damage == "missing" else "damaged or changed") in check(dataset, workers=1)["problems"]
    status, text = tiny.here("prepare", "--check", dataset)
    assert status == 2 and f"{name}: " in text
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name} is (gone|damaged).*prepare the dataset again"):
        Utterances(dataset)


def test_a_wrong_fingerprint_with_right_checksums_is_found(dataset):
    metadata = json.loads((dataset / "metadata.json").read_text())
    (dataset / "metadata.json").write_text(json.dumps(metadata | {"fingerprint": "0" * 32}))
    agree(dataset)
    assert "fingerprint 000" in only_problem(dataset)[1]


def test_a_dataset_of_another_version_is_named(dataset):
    (dataset / "checksums.txt").unlink()
    assert "was not made by this version of memo-jax prepare" in only_problem(dataset)[1]
    with pytest.raises(ValueError, match="set was not made by this version.*prepare it again"):
        Utterances(dataset)


def test_the_checksums_are_those_of_sha256sum(dataset):
    for line in (dataset / "checksums.txt").read_text().splitlines():
        digest, name = line.split("  ")
        assert digest == hashlib.sha256((dataset / name).read_bytes()).hexdigest()


def test_a_shard_of_another_dataset_is_noticed_when_it_is_read(dataset, monkeypatch):
    """A dataset with the same names and lengths, so that only the sound differs."""
    other = dataset.parent / "other"
    shutil.copytree(dataset.parent / "speech", other)
    rng = np.random.default_rng(1)
    for path in other.rglob("*.wav"):
        length = soundfile.info(path).frames
        soundfile.write(path, rng.integers(-9999, 9999, length).astype(np.int16), RATE)
    prepare(other, dataset.parent / "set2", workers=1)
    shutil.copy(shard(dataset.parent / "set2", 1), shard(dataset, 1))
    utterances = Utterances(dataset)
    for number in (2, 3):
        with pytest.raises(OSError, match="record . cannot be read .it belongs to another utterance or dataset"):
            utterances[number]
    crop = np.empty(100, np.int16)
    with pytest.raises(OSError, match="it belongs to another utterance or dataset"):
        utterances.fill(2, [crop], [0.5])
    assert len(utterances[1]) == RATE + 1000  # other shards are as they were
    problems = check(dataset, workers=1)["problems"]
    assert len(problems) == 2 and all("checksum" in problem for _, problem in problems)


def test_what_is_no_dataset_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a dataset"):
        check(tmp_path)
    for arguments in (["--check", tmp_path, "--output", "x"], ["--output", "x"], ["--input", "x"]):
        status, text = tiny.here("prepare", *arguments)
        assert status == 2 and ("stands alone" in text or "is missing" in text)
