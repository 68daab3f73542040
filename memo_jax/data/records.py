"""How utterances lie in a dataset: records of array_record shards, an index beside them, and the metadata of TFDS.

A record is a tf.train.Example of {"name", "speaker", "start", "samples"}: a segment of an utterance, whose first sample
is sample number `start` of the utterance. Segments are of equal length but for an utterance's last one; an utterance is
consecutive records of one shard. So a crop costs the segments that it touches, however long the recording is. The index
says, for each utterance, which record is its first and how many samples it has.
"""

import bisect
import functools
import itertools
import os
from pathlib import Path

import numpy as np

from memo_jax.audio import SAMPLE_RATE
from memo_jax.files import check_local

DATASET_NAME, SPLIT = "speech", "train"
INDEX, INFO = "index.npy", "dataset_info.json"
# Most utterances of VoxCeleb are one record then: a record costs as much as six seconds of sound. And crops of
# recordings of 10 minutes are read ten times faster than from whole ones (experiments/benchmarks/records.py).
SEGMENT_SAMPLES = 12 * SAMPLE_RATE
# Groups are read whole, so one record each. PCM, uncompressed: zstd saves a fifth of the disk and reads at a fifth of
# the speed; FLAC saves half, at a twentieth (the same benchmark).
SHARD_OPTIONS = "group_size:1,uncompressed"
# No reading ahead and no threads of its own: what is read is spread over the whole file.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class ShardWriter:
    """An array_record file being written; `bytes` of samples so far. Raises OSError when the disk does not take it."""

    def __init__(self, path: str | os.PathLike, segment_samples: int = SEGMENT_SAMPLES):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path, self.bytes, self._lengths = os.fspath(path), 0, []
        self._segment_samples = segment_samples
        self._writer = ArrayRecordWriter(self.path, SHARD_OPTIONS)

    def write(self, name: str, speaker: str, samples: np.ndarray) -> None:
        """Adds an utterance: int16 [L], L ≥ 1, at 16 kHz."""
        for start in range(0, len(samples), self._segment_samples):
            record = serialized(name, speaker, start, samples[start : start + self._segment_samples])
            try:
                self._writer.write(record)
            except RuntimeError as error:
                raise _write_error(error) from None
        self._lengths.append(len(samples))
        self.bytes += samples.nbytes  # the size of a shard must not depend on the speaker's name

    def close(self) -> dict:
        """Finishes the file; returns {"path", "segment_samples", "lengths": samples of each utterance}, for JSON."""
        try:
            self._writer.close()
        except RuntimeError as error:
            raise _write_error(error) from None
        if not os.path.exists(self.path):  # the writer does not tell when it could not create its file
            raise OSError(f"{self.path} could not be created")
        return {"path": self.path, "segment_samples": self._segment_samples, "lengths": self._lengths}


def write_metadata(folder: str | os.PathLike, shards: list[dict], metadata: dict) -> None:
    """Makes a dataset of finished shards in `folder`: names them in order, writes the index and the files of TFDS.

    Args:
      folder: holds the shards.
      shards: what `ShardWriter.close` returned, in the order that the dataset shall have.
      metadata: JSON, with "fingerprint".

    Raises ValueError when the shards have segments of different lengths.
    """
    import tensorflow_datasets as tfds

    folder, sizes = Path(folder), {shard["segment_samples"] for shard in shards}
    if len(sizes) != 1:
        raise ValueError(f"the shards in {folder} have segments of {sorted(sizes)} samples: prepare the dataset anew")
    (size,) = sizes
    records = [[-(-length // size) for length in shard["lengths"]] for shard in shards]
    lengths = [length for shard in shards for length in shard["lengths"]]
    for number, shard in enumerate(shards):
        os.rename(shard["path"], folder / f"{DATASET_NAME}-{SPLIT}.array_record-{number:05d}-of-{len(shards):05d}")
    first = itertools.accumulate((count for counts in records for count in counts), initial=0)
    np.save(folder / INDEX, np.array(list(zip(first, lengths)), np.int64))
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=DATASET_NAME, split=SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[sum(counts) for counts in records],
        num_bytes=2 * sum(lengths),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(),
        split_infos=[split],
        filename_template=template,
        check_data=False,
        description="16 kHz mono speech in segments; an utterance is consecutive records. Made by memo-jax prepare.",
        metadata=tfds.core.MetadataDict(metadata | {"sample_rate": SAMPLE_RATE, "segment_samples": size}),
    )


def serialized(name: str, speaker: str, start: int, samples: np.ndarray) -> bytes:
    """The record of a segment."""
    example = {"name": name, "speaker": speaker, "start": start, "samples": samples}
    # deterministic: the fields of a protobuf map come in an order that differs between processes otherwise
    return _serializer().get_tf_example(_features().encode_example(example)).SerializeToString(deterministic=True)


def samples_of(record: bytes) -> np.ndarray:
    """The samples in a record, int16 [L], read-only and without a copy; ValueError when it is no such record.

    The wire format of tf.train.Example is read by hand: a protobuf parser copies all bytes, and takes longer than
    reading them.
    """
    try:
        for _, *features in _fields(record, 0, len(record)):
            for _, *entry in _fields(record, *features):
                parts = {number: place for number, *place in _fields(record, *entry)}
                if record[slice(*parts[1])] == b"samples":
                    ((_, *values),) = _fields(record, *parts[2])
                    ((_, begin, end),) = _fields(record, *values)
                    return np.frombuffer(record, "<i2", (end - begin) // 2, begin)
    except (IndexError, KeyError):
        raise ValueError("it is no tf.train.Example") from None
    raise ValueError("it has no samples" if record else "the file ends before it")


class Shards:
    """The records of a dataset, by number over all shards. Copies for other processes open their own files.

    Attributes: `index`, int64 [utterances, 2], first record and samples; `segment_samples`; `metadata`.

    Raises:
      FileNotFoundError: `folder` holds no dataset, or one of its files is gone.
      ValueError: the dataset is of an earlier version.
    """

    def __init__(self, folder: str | os.PathLike):
        import tensorflow_datasets as tfds

        check_local(folder)
        self.folder = Path(folder)
        if not (self.folder / INFO).is_file():
            raise FileNotFoundError(
                f"{self.folder} is not a dataset ({INFO} is missing): make one with memo-jax prepare"
            )
        info = tfds.builder_from_directory(self.folder).info
        self.metadata = dict(info.metadata or {})
        if "segment_samples" not in self.metadata:
            raise ValueError(f"{self.folder} was not made by this version of memo-jax prepare: prepare it again")
        self.segment_samples = self.metadata["segment_samples"]
        shards = info.splits[SPLIT].file_instructions
        self._files = [os.fspath(shard.filename) for shard in shards]
        self._index_file = self.folder / INDEX
        for file in (*self._files, self._index_file):
            _check_there(file)
        self._first = list(itertools.accumulate((shard.take for shard in shards), initial=0))
        self.index = np.load(self._index_file)
        self._readers = {}

    def segments(self, utterance: int, numbers) -> list[np.ndarray]:
        """Segments of an utterance, int16 [L] each, read-only, in the order of `numbers`.

        Raises OSError naming file and record when one is damaged or gone.
        """
        first, samples = self.index[utterance].tolist()
        shard = bisect.bisect_right(self._first, first) - 1
        first -= self._first[shard]
        try:
            segments = self._read(shard, [first + number for number in numbers])
        except Exception:  # array_record raises RuntimeError, ValueError, IndexError, …
            segments = self._checked(shard, [first + number for number in numbers])
        for number, segment in zip(numbers, segments):
            expected = min(self.segment_samples, samples - number * self.segment_samples)
            if len(segment) != expected:
                raise self._unreadable(shard, first + number, f"{len(segment)} samples, {expected} expected")
        return segments

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in ("index", "_readers")}

    def __setstate__(self, state):
        vars(self).update(state, index=np.load(state["_index_file"]), _readers={})

    def _read(self, shard, positions):
        reader = self._readers.get(shard)
        if reader is None:
            from array_record.python.array_record_module import ArrayRecordReader

            _check_there(self._files[shard])
            reader = self._readers[shard] = ArrayRecordReader(self._files[shard], READER_OPTIONS)
        return [samples_of(record) for record in reader.read(positions)]

    def _checked(self, shard, positions):
        """Reads record by record, to raise the error of the one that cannot be read."""
        segments = []
        for position in positions:
            self._readers.pop(shard, None)  # open the file again: it may have been cut, or be another one by now
            _check_there(self._files[shard])
            try:
                segments += self._read(shard, [position])
            except Exception as error:
                self._readers.pop(shard, None)
                raise self._unreadable(shard, position, str(error).split(";")[0]) from error
        return segments

    def _unreadable(self, shard, position, reason):
        return OSError(
            f"{self._files[shard]}: record {position} cannot be read ({reason}): restore the file, or "
            "prepare the dataset again"
        )


@functools.cache
def _features():
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "name": tfds.features.Text(),
            "speaker": tfds.features.Text(),
            "start": tfds.features.Scalar(np.int64),
            # encoding="bytes": one bytes value in place of a list of integers, nine times faster to read
            "samples": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
        }
    )


@functools.cache
def _serializer():
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    return ExampleSerializer(_features().get_serialized_info())


def _fields(record, begin, end):
    """Yields (number, begin, end) of the fields of a protobuf message; those of an Example all tell their length."""
    while begin < end:
        tag, size, shift = record[begin], 0, 0
        if tag & 7 != 2:
            raise ValueError("it is no tf.train.Example")
        while True:
            begin += 1
            size |= (record[begin] & 127) << shift
            if record[begin] < 128:
                break
            shift += 7
        begin += 1
        if begin + size > end:
            raise ValueError("it is cut short")
        yield tag >> 3, begin, begin + size
        begin += size


def _write_error(error):
    """The OSError of what array_record says: "write() failed: No space left on device; writing PATH; …"."""
    return OSError(str(error).split(";")[0].rpartition("() failed: ")[2])


def _check_there(file):
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file} is gone: restore it, or prepare the dataset again")


def shard_files(folder: str | os.PathLike) -> tuple[list[tuple[str, int]], dict]:
    """[(path, records)] of the shards that a dataset should have, and its metadata; raises ValueError when unreadable."""
    import tensorflow_datasets as tfds

    try:
        info = tfds.builder_from_directory(os.fspath(folder)).info
        shards = [(os.fspath(shard.filename), shard.take) for shard in info.splits[SPLIT].file_instructions]
        return shards, dict(info.metadata)
    except Exception as error:  # JSON and protobuf errors of many kinds
        raise ValueError(f"{os.path.join(folder, INFO)}: not readable ({error})") from error


class ShardReader:
    """The records of one shard by number; raises OSError when there is no such file or it cannot be read at all."""

    def __init__(self, path: str | os.PathLike):
        from array_record.python.array_record_module import ArrayRecordReader

        _check_there(path)
        try:
            self._reader = ArrayRecordReader(os.fspath(path), READER_OPTIONS)
        except Exception as error:
            raise OSError(f"{path} cannot be read ({str(error).split(';')[0]})") from error

    def __len__(self) -> int:
        return self._reader.num_records()

    def __getitem__(self, number: int) -> tuple[str, str, int, np.ndarray]:
        """(name, speaker, start, samples) of a record; ValueError when it is damaged."""
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            (record,) = self._reader.read([number])
            feature = tf_example_pb2.Example.FromString(record).features.feature
            name, speaker = (feature[key].bytes_list.value[0].decode() for key in ("name", "speaker"))
            return name, speaker, feature["start"].int64_list.value[0], samples_of(record)
        except Exception as error:
            raise ValueError(str(error).split(";")[0]) from error
