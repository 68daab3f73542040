"""Records: what is written is what TFDS and our own parser read, and a crop costs the segments that it touches."""

import itertools
import pickle
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from memo_jax.data import records
from memo_jax.data.batches import Utterances, training_batches
from memo_jax.data.records import Shards, ShardWriter, samples_of, serialized, write_metadata

LENGTHS = (700, 1000, 1001, 4321, 1, 2999)  # in segments of 1000 samples: 1, 1, 2, 5, 1, 3


def utterance(number):
    return np.random.default_rng(number).integers(-(2**15), 2**15, LENGTHS[number]).astype(np.int16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Six utterances in two shards, segments of 1000 samples."""
    folder, written = tmp_path_factory.mktemp("set"), []
    for shard in range(2):
        writer = ShardWriter(folder / f"part {shard}", segment_samples=1000)
        for number in range(3 * shard, 3 * shard + 3):
            writer.write(f"name {number}", "", utterance(number))
        written.append(writer.close())
    write_metadata(folder, written, {"fingerprint": "six"})
    return folder


def test_utterances_come_whole_out_of_segments(dataset):
    utterances = Utterances(dataset)
    assert utterances.lengths.tolist() == list(LENGTHS)
    for number, samples in enumerate(utterances):
        np.testing.assert_array_equal(samples, utterance(number))
    copy = pickle.loads(pickle.dumps(utterances))
    np.testing.assert_array_equal(copy[3], utterance(3))
    assert len(pickle.dumps(utterances)) < 2000  # an index of a million would be sent to every worker


def test_tfds_reads_segments_in_order_without_tensorflow(dataset):
    program = (
        "import sys, tensorflow_datasets as tfds\n"
        "for record in tfds.builder_from_directory(sys.argv[1]).as_data_source('train'):\n"
        "    print(record['name'].decode(), record['start'], len(record['samples']), sep=',')\n"
        "print('tensorflow' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, dataset], capture_output=True, text=True, check=True)
    expected = [
        f"name {number},{start},{min(1000, length - start)}"
        for number, length in enumerate(LENGTHS)
        for start in range(0, length, 1000)
    ]
    assert run.stdout.splitlines() == [*expected, "False"]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_parser_agrees_with_protobuf(data):
    """Any example with samples, its fields in any order, among others: the bytes that protobuf finds."""
    example = tf_example_pb2.Example()
    names = data.draw(st.permutations(["samples", *data.draw(st.sets(st.text(max_size=9), max_size=4))]))
    for name in names:
        feature = example.features.feature[name]
        if name == "samples":
            feature.bytes_list.value.append(data.draw(st.binary(max_size=400).filter(lambda x: len(x) % 2 == 0)))
        elif data.draw(st.booleans()):
            feature.bytes_list.value.extend(data.draw(st.lists(st.binary(max_size=200), max_size=3)))
        else:
            feature.int64_list.value.extend(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3)))
    record = example.SerializeToString(deterministic=data.draw(st.booleans()))
    assert samples_of(record).tobytes() == example.features.feature["samples"].bytes_list.value[0]


def test_damaged_records_are_refused_and_nothing_else_happens():
    """Cut anywhere, or with changed bytes: a ValueError, or samples if the damage is elsewhere in the record."""
    record = serialized("0123456789abcdef", "a name", "a speaker", 5, np.arange(300, dtype=np.int16))
    rng = random.Random(0)
    assert samples_of(record).tolist() == list(range(300))
    for size in range(len(record) - 1):
        with pytest.raises(ValueError):
            samples_of(record[:size])
    for _ in range(2000):
        changed = bytearray(record)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        try:
            assert samples_of(bytes(changed)).dtype == np.int16
        except ValueError:
            pass


def test_a_crop_reads_only_the_segments_it_touches(dataset, monkeypatch):
    utterances, read = Utterances(dataset), []
    segments = Shards.segments
    monkeypatch.setattr(Shards, "segments", lambda self, *what: read.append(what) or segments(self, *what))
    for place, size, touched in (
        (0, 1000, [0]),
        (0, 1001, [0, 1]),
        (999, 2, [0, 1]),
        (1000, 1000, [1]),
        (2500, 1600, [2, 3, 4]),
        (4320, 1, [4]),
        (0, 4321, [0, 1, 2, 3, 4]),
    ):
        crop = np.empty(size, np.int16)
        utterances.fill(3, [crop], [(place + 0.5) / (4321 - size + 1)])
        np.testing.assert_array_equal(crop, utterance(3)[place : place + size])
        assert read.pop() == (3, touched)
    first, last = np.empty(10, np.int16), np.empty(10, np.int16)
    utterances.fill(3, [first, last], [0.0, 0.9999])
    np.testing.assert_array_equal(np.concatenate([first, last]), utterance(3)[[*range(10), *range(4311, 4321)]])
    assert read.pop() == (3, [0, 4])


def test_segments_change_no_batch(dataset, tmp_path):
    """The same utterances as one record each yield the same batches, bit for bit; crops exceed some of them."""
    writer = ShardWriter(tmp_path / "shard")
    for number in range(len(LENGTHS)):
        writer.write(f"name {number}", "", utterance(number))
    write_metadata(tmp_path, [writer.close()], {"fingerprint": "six"})
    options = {"batch_size": 3, "seed": 0, "global_seconds": 1500 / 16000, "local_seconds": 300 / 16000}
    cut, whole = (itertools.islice(training_batches(path, **options), 8) for path in (dataset, tmp_path))
    for one, other in zip(cut, whole, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_shard_that_cannot_be_created_is_an_error(tmp_path):
    with pytest.raises(OSError, match="^No such file or directory$"):
        writer = ShardWriter(tmp_path / "missing" / "shard")
        writer.write("name", "", utterance(0))
        writer.close()


def test_what_is_no_dataset_of_ours_is_named(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a dataset.*memo-jax prepare"):
        Shards(tmp_path)
    copy = shutil.copytree(dataset, tmp_path / "copy")
    (copy / records.INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="index.npy is gone"):
        Shards(copy)
    shutil.copy(dataset / records.INDEX, copy)
    (copy / records.CHECKSUMS).unlink()
    with pytest.raises(ValueError, match="prepare it again"):
        Shards(copy)


def test_records_of_another_length_than_the_index_says_are_named(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    index = np.load(copy / records.INDEX)
    index[3, 1] += 100
    np.save(copy / records.INDEX, index)
    with pytest.raises(ValueError, match="index.npy is damaged or was changed: restore the file"):
        Utterances(copy)
    records._write_checksums(copy)
    with pytest.raises(OSError, match=r"00001-of-00002: record 4 cannot be read \(321 samples, 421 expected\)"):
        Utterances(copy)[3]
