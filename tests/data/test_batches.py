"""Utterances by number, and batches of crops that are a function of dataset, seed and step alone."""

import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from memo_jax.data.batches import Utterances, steps_per_epoch, training_batches
from memo_jax.data.prepare import prepare
from memo_jax.data.records import ShardWriter, write_metadata

RATE = 16000
CROPS = {"global_seconds": 0.05, "local_seconds": 0.02}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Ten utterances of 0.5 to 0.77 s; sample t of utterance i is 3000·i − 15000 + t mod 2900: a crop reveals both."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(10):
        samples = (3000 * index - 15000 + np.arange(8000 + 480 * index) % 2900).astype(np.int16)
        soundfile.write(folder / f"{index}.wav", samples, RATE)
    prepare(folder, folder / "set", workers=1)
    return folder / "set"


def utterance_of(crop):
    return (int(crop.reshape(-1)[0]) + 15000) // 3000


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(left, right):
    for one, two in zip(left, right, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


def test_utterances_are_a_sequence(dataset):
    utterances = Utterances(dataset)
    assert len(utterances) == len(utterances.names) == len(list(utterances)) == 10
    assert utterances[np.int64(3)].dtype == np.int16 and len(utterances[3]) == 8000 + 480 * 3
    for index in (10, -1):
        with pytest.raises(IndexError, match="of 10"):
            utterances[index]
    copy = pickle.loads(pickle.dumps(utterances))
    np.testing.assert_array_equal(copy[7], utterances[7])
    assert copy.names == utterances.names


def test_what_is_no_dataset_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a dataset.*memo-jax prepare"):
        Utterances(tmp_path)


def test_shapes_follow_the_crops(dataset):
    batch = next(training_batches(dataset, batch_size=4, seed=0, global_crops=3, local_crops=5, **CROPS))
    assert {name: (crops.shape, crops.dtype) for name, crops in batch.items()} == {
        "global": ((4, 3, 800), np.int16),
        "local": ((4, 5, 320), np.int16),
    }
    assert next(training_batches(dataset, batch_size=4, seed=0, local_crops=0, **CROPS)).keys() == {"global"}


def test_crops_of_a_row_are_parts_of_one_utterance(dataset):
    utterances = Utterances(dataset)
    batch = next(training_batches(utterances, batch_size=10, seed=3, **CROPS))
    for row in range(10):
        whole = utterances[utterance_of(batch["global"][row])]
        for crops in batch.values():
            windows = np.lib.stride_tricks.sliding_window_view(whole, crops.shape[-1])
            for crop in crops[row]:
                assert (windows == crop).all(axis=1).any()


def test_starts_are_uniform_over_all_places(tmp_path):
    """Crops of 900 out of 902 samples: three positions, each a third of the time (600 draws, deviation 11.5)."""
    soundfile.write(tmp_path / "a.wav", np.arange(8000, dtype=np.int16), RATE)
    prepare(tmp_path, tmp_path / "set", workers=1)
    batches = training_batches(
        tmp_path / "set", batch_size=1, seed=0, global_crops=600, global_seconds=7998 / RATE, local_crops=0
    )
    starts = next(batches)["global"][0, :, 0]
    assert np.bincount(starts).tolist() == pytest.approx([200] * 3, abs=50)


def test_a_short_utterance_is_repeated(dataset):
    """A crop longer than its utterance repeats the utterance, from any position in it."""
    utterances = Utterances(dataset)
    batch = next(training_batches(utterances, batch_size=10, seed=0, global_seconds=2.0, local_crops=0))
    for row in batch["global"]:
        for crop in row:
            length = next(len(whole) for whole in utterances if set(whole) >= set(crop.tolist()))
            np.testing.assert_array_equal(crop[length:], crop[:-length])
    assert len({crop[0] for row in batch["global"] for crop in row}) > 10


def test_an_epoch_takes_every_utterance_at_most_once_and_epochs_differ(dataset):
    """Batches of 3 out of 10: nine utterances per epoch, and the one dropped is not always the same."""
    batches = training_batches(dataset, batch_size=3, seed=1, **CROPS)
    assert steps_per_epoch(10, 3) == 3
    epochs = [[utterance_of(row) for batch in take(batches, 3) for row in batch["global"]] for _ in range(8)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert len({(set(range(10)) - set(epoch)).pop() for epoch in epochs}) > 1


def test_crops_differ_between_epochs(dataset):
    """The positions of the same utterance's crops, known from its samples mod 3000, in two epochs."""
    first, second = (
        {utterance_of(row): (row[:, 0] % 3000).tolist() for row in batch["global"]}
        for batch in take(training_batches(dataset, batch_size=10, seed=1, **CROPS), 2)
    )
    assert first.keys() == second.keys() and all(first[key] != second[key] for key in first)


def test_the_seed_is_everything(dataset):
    one, same, other = (take(training_batches(dataset, batch_size=5, seed=seed, **CROPS), 3) for seed in (1, 1, 2))
    assert_same(one, same)
    assert one[0]["global"].tolist() != other[0]["global"].tolist()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_see_together_what_one_sees(dataset, processes):
    """Concatenated in the order of the processes, their rows are the batch of a single process, over epochs."""
    whole = take(training_batches(dataset, batch_size=4, seed=5, **CROPS), 6)
    parts = [
        take(training_batches(dataset, batch_size=4, seed=5, process_index=index, process_count=processes, **CROPS), 6)
        for index in range(processes)
    ]
    joined = [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts)]
    assert_same(joined, whole)


@pytest.mark.parametrize("start", [0, 1, 4])
def test_a_start_in_between_continues_exactly(dataset, start):
    """In the middle of an epoch or not: the step is the position."""
    whole = take(training_batches(dataset, batch_size=3, seed=1, **CROPS), start + 5)
    assert_same(take(training_batches(dataset, batch_size=3, seed=1, start=start, **CROPS), 5), whole[start:])


def test_workers_change_nothing_and_may_change_on_resume(dataset):
    """Begun without workers, continued with two within an epoch: the same batches."""
    alone = training_batches(dataset, batch_size=3, seed=1, **CROPS)
    take(alone, 4)
    helped = training_batches(dataset, batch_size=3, seed=1, start=4, workers=2, **CROPS)
    try:
        assert_same(take(helped, 5), take(alone, 5))
    finally:
        helped.close()


def test_speaker_labels_reach_nothing(dataset, tmp_path):
    """The same recordings with scrambled labels yield the same batches, bit for bit."""
    recordings = dataset.parent
    prepare(
        recordings,
        tmp_path / "set",
        workers=1,
        speakers={name: f"speaker {name[0]}" for name in Utterances(dataset).names},
    )
    assert Utterances(tmp_path / "set").speakers != Utterances(dataset).speakers
    assert_same(
        take(training_batches(tmp_path / "set", batch_size=4, seed=0, **CROPS), 5),
        take(training_batches(dataset, batch_size=4, seed=0, **CROPS), 5),
    )


def test_training_does_not_read_the_manifest(dataset):
    utterances = Utterances(dataset)
    utterances.path = dataset / "elsewhere"  # where a manifest would be looked for
    next(training_batches(utterances, batch_size=4, seed=0, **CROPS))
    with pytest.raises(FileNotFoundError):
        _ = utterances.speakers


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """36 utterances of 0.5 s in 12 shards; all samples of utterance i are 100·i."""
    folder, written = tmp_path_factory.mktemp("sharded"), []
    for shard in range(12):
        writer = ShardWriter(folder / f"part {shard}")
        for number in range(3 * shard, 3 * shard + 3):
            writer.write(f"{number}", "", np.full(8000, 100 * number, np.int16))
        written.append(writer.close())
    write_metadata(folder, written, {"fingerprint": "sharded"})
    return folder


def damage(shard, fault):
    """Removes a shard, cuts it in the middle, or changes a byte within its second record."""
    content = shard.read_bytes()
    if fault == "gone":
        shard.unlink()
    elif fault == "cut":
        os.truncate(shard, len(content) // 2)
    else:
        number = 3 * int(shard.name.split("-")[2]) + 1
        place = content.index(np.full(1000, 100 * number, np.int16).tobytes()) + 100
        with shard.open("r+b") as file:  # in place: a reader must never find the file cut short
            file.seek(place)
            file.write(bytes([content[place] ^ 0xFF]))


@pytest.mark.parametrize(
    "fault, workers, message",
    [
        ("gone", 0, "is gone: restore it"),
        ("cut", 0, r"record \d cannot be read \(.+\): restore the file"),
        ("changed", 0, r"record 1 cannot be read \(.*hash mismatch"),
        ("gone", 2, "is gone: restore it"),
        ("changed", 2, r"record 1 cannot be read \(.*hash mismatch"),
    ],
)
def test_a_fault_while_training_is_named_and_a_restart_resumes(sharded, tmp_path, fault, workers, message):
    """Every shard is damaged after the first batch, when some are not open yet, in worker processes, too. The batch
    that failed fails again until the files are back; then that very batch is returned, by this iterator and in another
    run."""
    copy = shutil.copytree(sharded, tmp_path / "copy")
    options = {"batch_size": 2, "seed": 0, **CROPS}
    whole = take(training_batches(sharded, **options), 40)
    batches = training_batches(copy, workers=workers, prefetch=1, **options)
    try:
        taken = [next(batches)]
        for shard in copy.glob("*.array_record-*"):
            damage(shard, fault)
        with pytest.raises(OSError, match=rf"speech-train\.array_record-000\d\d-of-00012.*{message}"):
            while True:
                taken.append(next(batches))
        assert_same(taken, whole[: len(taken)])
        if not workers:
            with pytest.raises(OSError, match=message):
                next(batches)
        for shard in sharded.glob("*.array_record-*"):
            shutil.copy(shard, copy)
        if not workers:
            assert_same(take(batches, 5), whole[len(taken) :][:5])
        restarted = training_batches(copy, start=len(taken), **options)
        assert_same(take(restarted, 20), whole[len(taken) :][:20])
    finally:
        batches.close()


def test_a_damaged_dataset_is_named_when_it_is_opened_or_read_whole(sharded, tmp_path):
    copy = shutil.copytree(sharded, tmp_path / "copy")
    shard = sorted(copy.glob("*.array_record-*"))[4]
    damage(shard, "changed")
    utterances = Utterances(copy)
    assert [utterances[number][0] for number in (12, 14)] == [1200, 1400]
    with pytest.raises(OSError, match=f"{shard.name}: record 1 cannot be read"):
        utterances[13]
    damage(shard, "gone")
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is gone"):
        Utterances(copy)


TRAINS = """
import hashlib, json, sys
from multiprocessing import active_children

from memo_jax.data.batches import training_batches

if __name__ == "__main__":
    batches = training_batches(sys.argv[1], start=int(sys.argv[3]), workers=2, prefetch=1, **json.loads(sys.argv[2]))
    for batch in batches:
        digest = hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
        print(json.dumps([digest, [worker.pid for worker in active_children()]]), flush=True)
""".replace("import hashlib", "from multiprocessing import active_children\nimport hashlib")


def test_killed_in_the_middle_of_an_epoch_it_resumes_exactly_and_leaves_no_worker(dataset, tmp_path):
    """A process with two workers is killed after 4 of 5 steps of an epoch; another with two workers takes the rest."""
    options = {"batch_size": 2, "seed": 0, **CROPS}
    expected = [
        hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
        for batch in take(training_batches(dataset, **options), 9)
    ]
    (tmp_path / "trains.py").write_text(TRAINS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    seen, workers = [], set()
    for steps in (4, 5):
        command = [sys.executable, str(tmp_path / "trains.py"), str(dataset), json.dumps(options), str(len(seen))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            for _ in range(steps):
                digest, pids = json.loads(process.stdout.readline())
                seen.append(digest)
            workers |= set(pids)
            process.kill()
    assert seen == expected
    assert len(workers) == 4
    deadline = time.monotonic() + 30
    while (alive := [pid for pid in workers if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive


def test_a_worker_that_is_killed_is_an_error(dataset):
    batches = training_batches(dataset, batch_size=2, seed=0, workers=2, prefetch=1, **CROPS)
    try:
        next(batches)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(OSError, match="a worker process that reads it ended.*try fewer workers"):
            take(batches, 20)
    finally:
        batches.close()


def test_steps_per_epoch():
    assert [steps_per_epoch(10, size) for size in (1, 3, 10)] == [10, 3, 1]
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"batch_size is {size}; expected 1 to 10"):
            steps_per_epoch(10, size)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 11}, "batch_size is 11"),
        ({"batch_size": 5, "process_count": 2}, "not a multiple"),
        ({"process_index": 1}, "process_index is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"global_seconds": 0}, "global_seconds"),
        ({"global_seconds": float("inf")}, "global_seconds is inf; expected .* at most 3600"),
        ({"local_seconds": float("nan")}, "local_seconds"),
        ({"global_crops": 0}, "global_crops is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"start": -1}, "start -1"),
    ],
)
def test_numbers_out_of_range_are_named(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        training_batches(dataset, **{"batch_size": 4, "seed": 0} | options)
