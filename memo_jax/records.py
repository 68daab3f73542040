"""How utterances lie in a dataset: records of array_record shards, an index beside them, and the metadata of TFDS.

A record is a tf.train.Example of {"name", "speaker", "start", "samples"}: a segment of an utterance, whose first sample
is sample number `start` of the utterance. Segments are of equal length but for an utterance's last one; an utterance is
consecutive records of one shard. So a crop costs the segments that it touches, however long the recording is. The index
says, for each utterance, which record is its first and how many samples it has.
"""

import functools
import os
from pathlib import Path

import numpy as np

from memo_jax.audio import SAMPLE_RATE

DATASET_NAME, SPLIT = "speech", "train"
INDEX, INFO = "index.npy", "dataset_info.json"
SEGMENT_SAMPLES = 4 * SAMPLE_RATE
# Uncompressed: PCM shrinks by a fifth only, and reads at a quarter of the speed.
SHARD_OPTIONS = "group_size:1,uncompressed"
# No reading ahead and no threads of its own: what is read is spread over the whole file.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class ShardWriter:
    """An array_record file being written; `bytes` of samples so far. Raises OSError when the disk does not take it."""

    def __init__(self, path: str | os.PathLike):
        from array_record.python.array_record_module import ArrayRecordWriter
        self.path, self.bytes, self._lengths, self._records = os.fspath(path), 0, [], 0
        self._writer = ArrayRecordWriter(self.path, SHARD_OPTIONS)

    def write(self, name: str, speaker: str, samples: np.ndarray) -> None:
        """Adds an utterance: int16 [L], L ≥ 1, at 16 kHz."""
        for start in range(0, len(samples), SEGMENT_SAMPLES):
            record = serialized(name, speaker, start, samples[start:start + SEGMENT_SAMPLES])
            try:
                self._writer.write(record)
            except RuntimeError as error:
                raise _write_error(error) from None
            self._records += 1
        self._lengths.append(len(samples))
        self.bytes += samples.nbytes  # the size of a shard must not depend on the speaker's name

    def close(self) -> dict:
        """Finishes the file; returns {"path", "records", "bytes", "lengths": samples of each utterance} for JSON."""
        try:
            self._writer.close()
        except RuntimeError as error:
            raise _write_error(error) from None
        if not os.path.exists(self.path):  # the writer does not tell when it could not create its file
            raise OSError(f"{self.path} could not be created")
        return {"path": self.path, "records": self._records, "bytes": self.bytes, "lengths": self._lengths}


def write_metadata(folder: str | os.PathLike, shards: list[dict], metadata: dict) -> None:
    """Makes a dataset of finished shards in `folder`: names them in order, writes the index and the files of TFDS.

    Args:
      folder: holds the shards.
      shards: what `ShardWriter.close` returned, in the order that the dataset shall have.
      metadata: JSON, with "fingerprint".
    """
    import tensorflow_datasets as tfds
    folder = Path(folder)
    for number, shard in enumerate(shards):
        os.rename(shard["path"], folder / f"{DATASET_NAME}-{SPLIT}.array_record-{number:05d}-of-{len(shards):05d}")
    np.save(folder / INDEX, _index([length for shard in shards for length in shard["lengths"]]))
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=DATASET_NAME, split=SPLIT,
                                             filetype_suffix="array_record")
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=[shard["records"] for shard in shards],
                                num_bytes=sum(shard["bytes"] for shard in shards), filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=_features(), split_infos=[split], filename_template=template, check_data=False,
        description="16 kHz mono speech in segments; an utterance is consecutive records. Made by memo-jax prepare.",
        metadata=tfds.core.MetadataDict(metadata | {"sample_rate": SAMPLE_RATE, "segment_samples": SEGMENT_SAMPLES}))


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
                    (_, *values), = _fields(record, *parts[2])
                    (_, begin, end), = _fields(record, *values)
                    return np.frombuffer(record, "<i2", (end - begin) // 2, begin)
    except (IndexError, KeyError):
        raise ValueError("it is no tf.train.Example") from None
    raise ValueError("it has no samples")


class Shards:
    """The records of a dataset, by number over all shards. Copies for other processes open their own files.

    Attributes: `index`, int64 [utterances, 2], first record and samples; `segment_samples`; `metadata`.

    Raises:
      FileNotFoundError: `folder` holds no dataset, or one of its files is gone.
      ValueError: the dataset is of an earlier version.
    """

    def __init__(self, folder: str | os.PathLike):
        import tensorflow_datasets as tfds
        self.folder = Path(folder)
        if not (self.folder / INFO).is_file():
            raise FileNotFoundError(f"{self.folder} is not a dataset ({INFO} is missing): make one with "
                                    "memo-jax prepare")
        info = tfds.builder_from_directory(self.folder).info
        self.metadata = dict(info.metadata or {})
        if "segment_samples" not in self.metadata:
            raise ValueError(f"{self.folder} was not made by this version of memo-jax prepare: prepare it again")
        self.segment_samples = self.metadata["segment_samples"]
        shards = info.splits[SPLIT].file_instructions
        self._files = [os.fspath(shard.filename) for shard in shards]
        for file in (*self._files, self.folder / INDEX):
            _check_there(file)
        self._first = np.cumsum([0] + [shard.take for shard in shards])
        self.index = np.load(self.folder / INDEX)
        self._readers = {}

    def read(self, records: list[int]) -> list[np.ndarray]:
        """The samples of records of one shard, int16 [L] each, read-only.

        Raises OSError naming file and record when one is damaged or gone."""
        shard = int(np.searchsorted(self._first, records[0], side="right")) - 1
        positions = [int(record - self._first[shard]) for record in records]
        try:
            return [samples_of(record) for record in self._reader(shard).read(positions)]
        except Exception as error:  # array_record raises RuntimeError, ValueError, IndexError, …
            raise self._unreadable(shard, positions, error) from error

    def __getstate__(self):
        return vars(self) | {"_readers": {}}

    def _reader(self, shard):
        if shard not in self._readers:
            from array_record.python.array_record_module import ArrayRecordReader
            _check_there(self._files[shard])
            self._readers[shard] = ArrayRecordReader(self._files[shard], READER_OPTIONS)
        return self._readers[shard]

    def _unreadable(self, shard, positions, error):
        _check_there(self._files[shard])
        return OSError(f"{self._files[shard]}: record {positions[0]} cannot be read "
                       f"({str(error).split(';')[0]}): restore the file, or prepare the dataset again")


def _index(lengths):
    """int64 [utterances, 2]: first record and samples."""
    lengths = np.array(lengths, np.int64)
    records = -(-lengths // SEGMENT_SAMPLES)
    return np.stack([np.cumsum(records) - records, lengths], axis=1)


@functools.cache
def _features():
    import tensorflow_datasets as tfds
    return tfds.features.FeaturesDict({
        "name": tfds.features.Text(),
        "speaker": tfds.features.Text(),
        "start": tfds.features.Scalar(np.int64),
        # encoding="bytes": one bytes value in place of a list of integers, nine times faster to read
        "samples": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
    })


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
    return OSError(str(error).split(";")[0].replace("write() failed: ", ""))


def _check_there(file):
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file} is gone: restore it, or prepare the dataset again")
