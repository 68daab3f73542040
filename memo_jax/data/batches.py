"""A dataset written by `prepare` → utterances by number, and endless, shuffled batches of random crops.

Batch number s is a function of the dataset, the seed and s alone: the step of a run is its position in the data.
"""

import functools
import multiprocessing
import operator
import os
import sys
import threading
from pathlib import Path

import grain
import numpy as np

from memo_jax.audio import SAMPLE_RATE
from memo_jax.data.records import MANIFEST, Shards, read_manifest
from memo_jax.scoring.trials import read_table

MAX_CROP_SECONDS = 3600.0


class Utterances:
    """The utterances of a dataset by `memo-jax prepare`: `len(utterances)`, `utterances[i]` → int16 [L] at 16 kHz.

    Opening reads only a small index; names and speakers are read from the manifest on first use. Copies for other
    processes (pickle) open their own files.

    Raises:
      FileNotFoundError: `path` holds no dataset, or one of its files is missing.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self._shards = Path(path), Shards(path)
        self.fingerprint: str = self._shards.metadata["fingerprint"]

    def __len__(self) -> int:
        return len(self._shards.index)

    def __getitem__(self, index: int) -> np.ndarray:
        """Samples of an utterance, int16 [L]; raises OSError naming the file when its record is damaged or missing."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"utterance {index} of {len(self)} in {self.path}")
        samples, size = int(self.lengths[index]), self._shards.segment_samples
        return np.concatenate(self._shards.segments(index, range(-(-samples // size))))

    def fill(self, index: int, crops: list[np.ndarray], starts: list[float]) -> None:
        """Fills each crop, int16 [L], with a part of an utterance, reading only the segments that the crops touch.

        A crop begins at the fraction `start` in [0, 1) of the positions at which it fits. An utterance shorter than the
        crop is repeated, beginning at the fraction `start` of its samples. Raises OSError like `utterances[index]`.
        """
        samples, size = int(self.lengths[index]), self._shards.segment_samples
        places, needed = [], set()
        for crop, start in zip(crops, starts, strict=True):
            places.append(int(start * max(samples - len(crop) + 1, 1)))
            end = min(places[-1] + len(crop), samples)
            needed.update(range(places[-1] // size, -(-end // size)))
        needed = sorted(needed)
        segments = dict(zip(needed, self._shards.segments(index, needed)))
        for crop, start, place in zip(crops, starts, places):
            if len(crop) <= samples:
                _copy(segments, size, place, crop)
            else:
                whole = np.concatenate(list(segments.values()))
                crop[:] = np.resize(np.roll(whole, -int(start * samples)), len(crop))

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __getstate__(self):  # grain sends this to its workers, which need no names
        return {name: value for name, value in vars(self).items() if name != "_manifest"}

    @property
    def names(self) -> list[str]:
        """Name of each utterance: its path relative to the prepared folder."""
        return self._manifest["name"]

    @property
    def speakers(self) -> list[str]:
        """Speaker of each utterance, "" where unknown; read for evaluation, and by configs that train with labels."""
        return self._manifest["speaker"]

    @property
    def lengths(self) -> np.ndarray:
        """Length of each utterance in samples, int64 [len(self)]."""
        return self._shards.index[:, 1]

    @property
    def seconds(self) -> np.ndarray:
        """Length of each utterance in seconds, float64 [len(self)]."""
        return self.lengths / SAMPLE_RATE

    @functools.cached_property
    def _manifest(self):
        columns = read_manifest(self.path)
        if len(columns["name"]) != len(self):
            count = len(columns["name"])
            raise ValueError(
                f"{self.path / MANIFEST} has {count} utterances, the dataset {len(self)}: prepare it again"
            )
        return columns


def speaker_numbers(utterances: Utterances) -> np.ndarray:
    """Returns the number of each utterance's speaker in the order of their names, int32 [len(utterances)].

    Raises:
      ValueError: a speaker is not known, or all utterances come from one speaker.
    """
    names, numbers = np.unique(utterances.speakers, return_inverse=True)
    unknown = sum(not speaker for speaker in utterances.speakers)
    if unknown:
        raise ValueError(
            f"{utterances.path}: {unknown} of {len(utterances)} utterances have no speaker, which training with labels "
            "needs: prepare recordings in one folder per speaker, or with a utt2spk"
        )
    if len(names) < 2:
        raise ValueError(f"{utterances.path}: all utterances come from one speaker: there is nothing to tell apart")
    return numbers.astype(np.int32)


def table_numbers(utterances: Utterances, path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """Returns the number of each utterance's label in a table, and how many names of the table have no utterance.

    Args:
      utterances: of a dataset.
      path: table of lines `name label`, as `memo-jax cluster` writes it; see `read_table`.

    Returns:
      int32 [len(utterances)], labels numbered in the order of their texts, −1 for an utterance that the table lacks.

    Raises:
      ValueError: the table is malformed, has no label for any utterance, or the same label for all.
      OSError: it cannot be read.
    """
    table = read_table(path, "name", "label")
    names = utterances.names
    kinds = {label: number for number, label in enumerate(sorted({table[name] for name in names if name in table}))}
    if not kinds:
        raise ValueError(
            f"{path} has a label for none of the {len(names)} utterances of {utterances.path}, such as {names[0]!r}"
        )
    if len(kinds) < 2:
        raise ValueError(f"{path}: all utterances have the same label: there is nothing to tell apart")
    numbers = np.array([kinds[table[name]] if name in table else -1 for name in names], np.int32)
    return numbers, len(table) - int((numbers >= 0).sum())


def steps_per_epoch(utterances: int, batch_size: int) -> int:
    """Returns the number of full batches in an epoch; what is left over, different utterances each time, is dropped.

    Raises:
      ValueError: a batch larger than the dataset, or not positive.
    """
    if not 1 <= batch_size <= utterances:
        raise ValueError(f"batch_size is {batch_size}; expected 1 to {utterances}, the number of utterances")
    return utterances // batch_size


def training_batches(
    utterances: Utterances | str | os.PathLike,
    *,
    batch_size: int,
    global_crops: int = 2,
    global_seconds: float = 4.0,
    local_crops: int = 4,
    local_seconds: float = 2.0,
    teacher_crops: int = 0,
    partners: np.ndarray | None = None,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    labels: np.ndarray | None = None,
    numbered: bool = False,
) -> "TrainingBatches":
    """Returns endless batches of random crops; an epoch takes every utterance at most once (the remainder is dropped).

    Batch number s is a function of the dataset, the seed and s alone. A run therefore resumes exactly at any step, with
    any number of workers; and P processes, each taking its rows, together see exactly the batch that a single process
    sees. No labels are read except those given.

    A crop starts anywhere in its utterance with equal probability; an utterance shorter than the crop is repeated.

    Args:
      utterances: `Utterances`, or the path of a dataset.
      batch_size: B, over all processes.
      global_crops: number of the long crops of an utterance; 0 for none.
      global_seconds: length of each, at most MAX_CROP_SECONDS.
      local_crops: number of the short crops; 0 for none, unless there are no long ones.
      local_seconds: length of each, likewise.
      teacher_crops: number of further long crops, for teachers only. The other crops do not depend on it.
      partners: int32 [len(utterances)], the utterance that the crops for teachers are cut from; by default the same.
      seed: 0 ≤ seed < 2³².
      start: number of the first batch, that is, how many have been taken before.
      process_index: of P; this process takes rows process_index·B/P … (process_index+1)·B/P − 1.
      process_count: P, which divides B.
      workers: processes that read ahead; with 0 a thread of this process does.
      prefetch: batches read ahead (by each worker).
      labels: of all utterances, int32 [len(utterances)], for training with labels.
      numbered: return the numbers of the utterances, too.

    Returns:
      an iterator of {"global": int16 [B/P, global_crops, L], "local": int16 [B/P, local_crops, l], "teacher": int16
      [B/P, teacher_crops, L], "label": int32 [B/P], "index": int32 [B/P]}. A kind of which there are no crops is
      missing, and so is "label" without labels, and "index" unless numbered.

    Raises:
      ValueError: a number out of its range; the message says which.
      OSError: (while iterating) a damaged or missing shard, named.
    """
    if not isinstance(utterances, Utterances):
        utterances = Utterances(utterances)
    counts = {"global": global_crops, "local": local_crops, "teacher": teacher_crops}
    if min(counts.values()) < 0 or not global_crops + local_crops or not global_crops + teacher_crops:
        raise ValueError(
            f"global_crops is {global_crops}, local_crops {local_crops} and teacher_crops {teacher_crops}; expected "
            "≥ 0, with crops for students and long ones for teachers"
        )
    long = _crop_samples("global_seconds", global_seconds)
    short = _crop_samples("local_seconds", local_seconds) if local_crops else 0
    lengths = {"global": long, "local": short, "teacher": long}
    crops = {kind: (count, lengths[kind]) for kind, count in counts.items() if count}
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; expected 0 to 2**32 - 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}; expected 0 to {process_count - 1} (process_count - 1)")
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not a multiple of the {process_count} processes")
    if workers < 0 or prefetch < 1 or start < 0:
        raise ValueError(f"workers is {workers}, prefetch {prefetch} and start {start}; expected ≥ 0, ≥ 1 and ≥ 0")
    rows = batch_size // process_count
    part = slice(process_index * rows, (process_index + 1) * rows)
    batches = _Batches(utterances, crops, batch_size, part, seed, labels, numbered, partners)
    return TrainingBatches(batches, start, workers, prefetch)


def _crop_samples(name, seconds):
    if not 1 / SAMPLE_RATE <= seconds <= MAX_CROP_SECONDS:
        raise ValueError(f"{name} is {seconds}; expected a positive number of seconds, at most {MAX_CROP_SECONDS:g}")
    return round(seconds * SAMPLE_RATE)


class _Batches:
    """The endless sequence of batches: `batches[step]`, a pure function."""

    def __init__(self, utterances, crops, batch_size, rows, seed, labels=None, numbered=False, partners=None):
        self.utterances, self.crops, self.batch_size, self.rows, self.seed = utterances, crops, batch_size, rows, seed
        self.labels, self.numbered, self.partners = labels, numbered, partners
        self.steps = steps_per_epoch(len(utterances), batch_size)

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, step):
        epoch, position = divmod(int(step), self.steps)
        indices = _order(self.seed, epoch, len(self.utterances))[position * self.batch_size :][self.rows]
        batch = {name: np.empty((len(indices), *shape), np.int16) for name, shape in self.crops.items()}
        students = [crops for kind, crops in batch.items() if kind != "teacher"]
        self._fill(students, indices, [1, self.seed, int(step)])
        if "teacher" in batch:
            sources = indices if self.partners is None else self.partners[indices]
            self._fill([batch["teacher"]], sources, [2, self.seed, int(step)])
        if self.labels is not None:
            batch["label"] = self.labels[indices]
        if self.numbered:
            batch["index"] = indices
        return batch

    def _fill(self, kinds, indices, seed):
        """Fills crops of each kind, int16 [rows, V, L], from the utterances of the rows."""
        # Drawn for all rows, then cut to those of this process: a row is the same whichever process reads it.
        draws = sum(crops.shape[1] for crops in kinds)
        starts = np.random.default_rng(seed).random((self.batch_size, draws))[self.rows]
        for row, (index, fractions) in enumerate(zip(indices.tolist(), starts.tolist())):
            self.utterances.fill(index, [crop for crops in kinds for crop in crops[row]], fractions)


@functools.lru_cache(maxsize=2)  # reading ahead may already be in the next epoch
def _order(seed, epoch, count):
    """The order of the utterances in an epoch: a permutation of range(count)."""
    order = np.arange(count, dtype=np.int32)
    np.random.default_rng([0, seed, epoch]).shuffle(order)
    return order


def _copy(segments, size, place, crop):
    """Copies samples from number `place` on, out of segments of `size` samples, into `crop` [L]."""
    filled = 0
    while filled < len(crop):
        number, offset = divmod(place + filled, size)
        part = segments[number][offset : offset + len(crop) - filled]
        crop[filled : filled + len(part)] = part
        filled += len(part)


def reference_batches(
    utterances: Utterances,
    *,
    rows: int,
    seconds: float,
    seed: int,
    draw: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> "TrainingBatches":
    """Returns batches of one random crop of every utterance, in their order; the last utterance repeats endlessly.

    The crop of an utterance is a function of the seed and the draw alone.

    Args:
      utterances: the dataset.
      rows: of a batch, over all processes; a multiple of their number.
      seconds: length of each crop, at most MAX_CROP_SECONDS.
      seed: 0 ≤ seed < 2³².
      draw: number of this pass over the dataset, from 0.
      process_index: as `training_batches` takes it.
      process_count: likewise.
      workers: likewise.

    Returns:
      an iterator of {"crops": int16 [rows / process_count, L]}.

    Raises:
      ValueError: a length out of its range.
      OSError: (while iterating) a damaged or missing shard, named.
    """
    length = _crop_samples("reference_seconds", seconds)
    starts = np.random.default_rng([3, seed, draw]).random(len(utterances))
    each = rows // process_count
    part = slice(process_index * each, (process_index + 1) * each)
    return TrainingBatches(_References(utterances, length, rows, part, starts), 0, workers, prefetch=2)


class _References:
    """The sequence of batches of `reference_batches`."""

    def __init__(self, utterances, length, batch_size, rows, starts):
        self.utterances, self.length, self.batch_size, self.rows = utterances, length, batch_size, rows
        self.starts = starts

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, number):
        indices = np.arange(number * self.batch_size, (number + 1) * self.batch_size)[self.rows]
        indices = np.minimum(indices, len(self.utterances) - 1)
        crops = np.empty((len(indices), self.length), np.int16)
        for crop, index in zip(crops, indices.tolist()):
            self.utterances.fill(index, [crop], [self.starts[index]])
        return {"crops": crops}


class TrainingBatches:
    """Iterator over numbered batches that reads ahead; made by `training_batches` and `reference_batches`."""

    def __init__(self, batches: "_Batches | _References", start: int, workers: int, prefetch: int):
        self._batches, self._workers, self._prefetch = batches, workers, prefetch
        self._step, self._reader = start, None

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._reader is None:
            self._reader = iter(self._read_ahead())
        try:
            batch = next(self._reader)
        except Exception as error:  # the reader would continue after the batch it could not read; we retry that one
            self.close()
            if isinstance(error, RuntimeError) and self._workers:  # as grain reports a worker that ended by itself
                raise OSError(
                    f"{self._batches.utterances.path}: a worker process that reads it ended, perhaps because "
                    f"memory ran out: try fewer workers ({error})"
                ) from error
            raise
        self._step += 1
        return batch

    def close(self) -> None:
        """Stops threads and workers."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _read_ahead(self):
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._prefetch)
        dataset = grain.MapDataset.source(self._batches)[self._step :].to_iter_dataset(options)
        if self._workers:
            _mark_flags_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.multiprocessing.MultiprocessingOptions(
                    num_workers=self._workers, per_worker_buffer_size=self._prefetch
                ),
                _end_with_parent,
            )
        return dataset


def _end_with_parent(worker, workers):
    """Runs in each worker: ends it when the process that it reads for has ended, perhaps killed."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _mark_flags_as_parsed():
    """Grain's workers read absl flags, which are never parsed outside an absl program."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
