"""The files of a dataset: records in array_record shards, an index beside them, the metadata of TFDS, and checksums.

A record is a tf.train.Example of {"checksum", "name", "samples", "speaker", "start"}: a segment of an utterance, whose
first sample is sample number `start` of the utterance. Segments have the same length, except for an utterance's last;
an utterance is consecutive records of one shard. A crop therefore costs only the segments that it touches, however long
the recording is. The index says, for each utterance, which record is its first, how many samples it has and their
checksum.

Damage is detected wherever it is. Every file but the shards is compared with its line in checksums.txt before it is
parsed; array_record verifies the bytes of each record; and each record says which utterance it belongs to (by the
checksum of all its samples) and which part of it this is, which must be what the index says: a shard of another dataset
is noticed when the first record is read.
"""

import bisect
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memo_jax.audio import SAMPLE_RATE
from memo_jax.files import check_local

DATASET_NAME, SPLIT = "speech", "train"
INDEX, INFO, CHECKSUMS = "index.npy", "dataset_info.json", "checksums.txt"
METADATA = (INFO, "features.json", "metadata.json")  # what TFDS reads
MANIFEST, LEFT_OUT = "manifest.tsv", "left_out.tsv"
MANIFEST_COLUMNS = ("name", "speaker", "seconds", "checksum", "source")
RESTORE = "restore the file, or prepare the dataset again"
# Most utterances of VoxCeleb are one record then: opening a record costs as much as reading six seconds of audio. And
# crops of recordings of 10 minutes are read ten times faster than from whole ones (experiments/benchmarks/records.py).
SEGMENT_SAMPLES = 12 * SAMPLE_RATE
# Groups are read whole, so one record each. PCM, uncompressed: zstd saves a fifth of the disk and reads at a fifth of
# the speed; FLAC saves half, at a twentieth (the same benchmark).
SHARD_OPTIONS = "group_size:1,uncompressed"
# No reading ahead and no threads of its own: what is read is scattered over the entire file.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
MOST_READERS = 512  # open shards: processes may usually open 1,024 files


class ShardWriter:
    """An array_record file that is being written, with `bytes` of samples so far.

    Args:
      path: of the file, which is created or replaced.
      segment_samples: samples in a segment, the longest that becomes one record.
    """

    def __init__(self, path: str | os.PathLike, segment_samples: int = SEGMENT_SAMPLES):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path, self.bytes, self._lengths, self._checksums = os.fspath(path), 0, [], []
        self._segment_samples = segment_samples
        self._writer = ArrayRecordWriter(self.path, SHARD_OPTIONS)

    def write(self, name: str, speaker: str, samples: np.ndarray) -> str:
        """Adds an utterance, int16 [L], L ≥ 1, at 16 kHz, and returns the checksum of its samples.

        Raises:
          OSError: it cannot be written.
        """
        checksum = checksum_of(samples)
        for start in range(0, len(samples), self._segment_samples):
            record = serialized(checksum, name, speaker, start, samples[start : start + self._segment_samples])
            try:
                self._writer.write(record)
            except RuntimeError as error:
                raise _write_error(error) from None
        self._lengths.append(len(samples))
        self._checksums.append(checksum)
        self.bytes += samples.nbytes  # the size of a shard must not depend on the speaker's name
        return checksum

    def close(self) -> dict:
        """Finishes the file; returns {"path", "segment_samples", "lengths": […], "checksums": […]}, for JSON.

        Raises:
          OSError: the file could not be created or written.
        """
        try:
            self._writer.close()
        except RuntimeError as error:
            raise _write_error(error) from None
        if not os.path.exists(self.path):  # the writer does not report that it could not create its file
            raise OSError(f"{self.path} could not be created")
        return {
            "path": self.path,
            "segment_samples": self._segment_samples,
            "lengths": self._lengths,
            "checksums": self._checksums,
        }


def write_metadata(folder: str | os.PathLike, shards: list[dict], metadata: dict) -> None:
    """Makes a dataset of finished shards: names them in order, and writes the index, the files of TFDS and checksums.

    Args:
      folder: holds the shards and all other files of the dataset.
      shards: what `ShardWriter.close` returned, in the order that the dataset should have.
      metadata: JSON, with "fingerprint".
    """
    import tensorflow_datasets as tfds

    folder = Path(folder)
    (size,) = {shard["segment_samples"] for shard in shards}
    records = [[-(-length // size) for length in shard["lengths"]] for shard in shards]
    lengths = [length for shard in shards for length in shard["lengths"]]
    for number, shard in enumerate(shards):
        os.rename(shard["path"], folder / f"{DATASET_NAME}-{SPLIT}.array_record-{number:05d}-of-{len(shards):05d}")
    first = itertools.accumulate((count for counts in records for count in counts), initial=0)
    checksums = [_as_integer(checksum) for shard in shards for checksum in shard["checksums"]]
    np.save(folder / INDEX, np.array(list(zip(first, lengths, checksums)), np.int64))
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
    _write_checksums(folder)


def checksum_of(samples: np.ndarray) -> str:
    """Returns the digest of an utterance's samples as it stands in a manifest: 16 hexadecimal digits."""
    return hashlib.blake2b(samples, digest_size=8).hexdigest()


def serialized(checksum: str, name: str, speaker: str, start: int, samples: np.ndarray) -> bytes:
    """Returns the record of a segment; `checksum` is that of the whole utterance."""
    example = {"checksum": checksum, "name": name, "speaker": speaker, "start": start, "samples": samples}
    # deterministic: otherwise, the fields of a protobuf map come in an order that differs between processes
    return _serializer().get_tf_example(_features().encode_example(example)).SerializeToString(deterministic=True)


def samples_of(record: bytes) -> np.ndarray:
    """Returns the samples in a record, int16 [L], read-only and without a copy; ValueError if it is not a record."""
    begin, end = _values(record, (b"samples",))[b"samples"]
    return np.frombuffer(record, "<i2", (end - begin) // 2, begin)


def segment_of(record: bytes) -> tuple[str, int, np.ndarray]:
    """Returns the checksum (of the utterance), start and samples in a record; ValueError if it is not a record."""
    places = _values(record, (b"checksum", b"samples", b"start"))
    start = 0
    for byte in reversed(record[slice(*places[b"start"])]):  # a varint
        start = start << 7 | byte & 127
    begin, end = places[b"samples"]
    samples = np.frombuffer(record, "<i2", (end - begin) // 2, begin)
    return record[slice(*places[b"checksum"])].decode(errors="replace"), start, samples


def _values(record, names):
    """Where in a record the values of these features begin and end.

    The wire format of tf.train.Example is parsed by hand: a protobuf parser copies all bytes, and takes longer than
    reading them.
    """
    found = {}
    try:
        for _, *features in _fields(record, 0, len(record)):
            for _, *entry in _fields(record, *features):
                parts = {number: place for number, *place in _fields(record, *entry)}
                name = record[slice(*parts[1])]
                if name in names:
                    ((_, *values),) = _fields(record, *parts[2])
                    ((_, *found[name]),) = _fields(record, *values)
                    if len(found) == len(names):
                        return found
    except (IndexError, KeyError):
        raise ValueError("it is not a tf.train.Example") from None
    raise ValueError("it has no samples" if record else "the file ends before it")


def read_small_file(folder: str | os.PathLike, name: str) -> bytes:
    """Returns the content of a file of a dataset that is not a shard, once it is known to be what `prepare` wrote.

    Raises:
      FileNotFoundError: `folder` holds no dataset, or the file is missing.
      ValueError: the dataset has another version, or the file has changed.
    """
    expected = _checksums(folder).get(name)
    path = os.path.join(folder, name)
    _check_there(path)
    with open(path, "rb") as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != expected:
        raise ValueError(f"{path} is damaged or was changed: {RESTORE}")
    return content


def read_manifest(folder: str | os.PathLike) -> dict[str, list[str]]:
    """Returns the columns of a dataset's manifest, by name; raises like `read_small_file`."""
    header, *rows = (line.split("\t") for line in read_small_file(folder, MANIFEST).decode().split("\n")[:-1])
    return dict(zip(header, map(list, zip(*rows))))


def changed_files(folder: str | os.PathLike) -> list[str]:
    """Returns the names of the files of a dataset, shards apart, that are missing or not as `prepare` wrote them.

    Raises:
      FileNotFoundError, ValueError: their checksums cannot be read.
    """
    changed = []
    for name, expected in _checksums(folder).items():
        try:
            with open(os.path.join(folder, name), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            found = None
        if found != expected:
            changed.append(name)
    return changed


def _write_checksums(folder):
    """Lists the SHA-256 of the files of a dataset, shards apart, as sha256sum writes and checks it."""
    lines = ""
    for name in sorted((INDEX, MANIFEST, LEFT_OUT, *METADATA)):
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                lines += f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n"
    (folder / CHECKSUMS).write_text(lines, encoding="utf-8")


def _checksums(folder):
    """The expected SHA-256 of each file, by name."""
    if not os.path.isfile(os.path.join(folder, INFO)) and not os.path.isfile(os.path.join(folder, CHECKSUMS)):
        raise FileNotFoundError(f"{folder} is not a dataset ({INFO} is missing): make one with memo-jax prepare")
    path = os.path.join(folder, CHECKSUMS)
    if not os.path.isfile(path):
        raise ValueError(
            f"{folder} was not made by this version of memo-jax prepare ({CHECKSUMS} is missing): prepare it again"
        )
    with open(path, encoding="utf-8", errors="replace") as file:
        pairs = [line.rstrip("\n").split("  ", 1) for line in file]
    found = {pair[-1]: pair[0] for pair in pairs}
    if not found.keys() >= {INDEX, *METADATA}:
        raise ValueError(f"{path} is damaged: {RESTORE}")
    return found


class Shards:
    """The records of a dataset, by number over all shards. Copies for other processes open their own files.

    Attributes:
      index: int64 [utterances, 3]: first record, number of samples, and their checksum as an integer.
      segment_samples: samples in a segment.
      metadata: of the dataset: "fingerprint", "utterances", "seconds" and more.

    Raises:
      FileNotFoundError: `folder` holds no dataset, or one of its files is missing.
      ValueError: the dataset has another version, or one of its files is damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        check_local(folder)
        self.folder = Path(folder)
        shards, self.metadata = shard_files(folder)
        self.segment_samples = self.metadata["segment_samples"]
        self._files = [path for path, _ in shards]
        for path in self._files:
            _check_there(path)
        self._first = list(itertools.accumulate((records for _, records in shards), initial=0))
        self.index = self._read_index()
        self._readers = {}

    def segments(self, utterance: int, numbers: Sequence[int]) -> list[np.ndarray]:
        """Returns segments of an utterance, int16 [L] each, read-only, in the order of `numbers`.

        Raises:
          OSError: naming file and record: a record is damaged or missing, or that of another utterance.
        """
        first, samples, checksum = self.index[utterance].tolist()
        shard = bisect.bisect_right(self._first, first) - 1
        first -= self._first[shard]
        try:
            segments = self._read(shard, [first + number for number in numbers])
        except Exception:  # array_record raises RuntimeError, ValueError, IndexError, …
            segments = self._checked(shard, [first + number for number in numbers])
        for number, (found, start, segment) in zip(numbers, segments):
            begin = number * self.segment_samples
            expected = min(self.segment_samples, samples - begin)
            if len(segment) != expected:
                raise self._unreadable(shard, first + number, f"{len(segment)} samples, {expected} expected")
            if start != begin or found != _as_digest(checksum):
                raise self._unreadable(shard, first + number, "it belongs to another utterance or dataset")
        return [segment for _, _, segment in segments]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in ("index", "_readers")}

    def __setstate__(self, state):
        vars(self).update(state, _readers={})
        self.index = self._read_index()

    def _read_index(self):
        index = parsed_index(read_small_file(self.folder, INDEX))
        if index is None or not index_accounts_for(index, self.segment_samples, self._first[-1]):
            raise ValueError(f"{self.folder / INDEX} is damaged: {RESTORE}")
        return index

    def _read(self, shard, positions):
        reader = self._readers.get(shard)
        if reader is None:
            from array_record.python.array_record_module import ArrayRecordReader

            _check_there(self._files[shard])
            while len(self._readers) >= MOST_READERS:
                self._readers.pop(next(iter(self._readers)))  # the one opened first
            reader = self._readers[shard] = ArrayRecordReader(self._files[shard], READER_OPTIONS)
        return [segment_of(record) for record in reader.read(positions)]

    def _checked(self, shard, positions):
        """Reads record by record, to raise the error of the first that cannot be read."""
        segments = []
        for position in positions:
            self._readers.pop(shard, None)  # open the file again: it may have been truncated or replaced
            _check_there(self._files[shard])
            try:
                segments += self._read(shard, [position])
            except Exception as error:
                self._readers.pop(shard, None)
                raise self._unreadable(shard, position, str(error).split(";")[0]) from error
        return segments

    def _unreadable(self, shard, position, reason):
        return OSError(f"{self._files[shard]}: record {position} cannot be read ({reason}): {RESTORE}")


@functools.cache
def _features():
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "checksum": tfds.features.Text(),
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
    """Yields (number, begin, end) of the fields of a protobuf message; those of an Example all state their length."""
    while begin < end:
        tag, size, shift = record[begin], 0, 0
        if tag & 7 != 2:
            raise ValueError("it is not a tf.train.Example")
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


def _as_integer(checksum):
    """The int64 that represents a checksum in the index."""
    return int.from_bytes(bytes.fromhex(checksum), "big", signed=True)


def _as_digest(integer):
    return integer.to_bytes(8, "big", signed=True).hex()


def parsed_index(content: bytes) -> np.ndarray | None:
    """Returns the index, int64 [utterances, 3], of the bytes of its file; None if they are not an index.

    The shape is compared with the number of bytes first: numpy would allocate whatever the header claims.
    """
    file = io.BytesIO(content)
    try:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception:  # it parses Python
        return None
    begin = file.tell()
    if fortran or dtype != np.int64 or len(shape) != 2 or shape[1] != 3 or shape[0] * 24 != len(content) - begin:
        return None
    return np.frombuffer(content, np.int64, offset=begin).reshape(shape)


def index_accounts_for(index: np.ndarray, segment_samples: int, records: int) -> bool:
    """Returns whether an index assigns exactly this many records to utterances, in order."""
    counts = -(-index[:, 1] // segment_samples)
    return bool((counts > 0).all() and (np.cumsum(counts) - counts == index[:, 0]).all() and counts.sum() == records)


def shard_files(folder: str | os.PathLike) -> tuple[list[tuple[str, int]], dict]:
    """Returns (path, number of records) of the shards that a dataset should have, and its metadata.

    Raises:
      FileNotFoundError: `folder` holds no dataset, or a file with them is missing.
      ValueError: the dataset has another version, or a file with them is damaged.
    """
    for name in METADATA:
        read_small_file(folder, name)
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(os.fspath(folder)).info
    shards = [(os.fspath(shard.filename), shard.take) for shard in info.splits[SPLIT].file_instructions]
    return shards, dict(info.metadata)


class ShardReader:
    """The records of a shard by number.

    Raises:
      OSError: there is no such file, or it cannot be read at all.
    """

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
        """Returns (name, speaker, start, samples) of a record; ValueError if it is damaged."""
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            (record,) = self._reader.read([number])
            feature = tf_example_pb2.Example.FromString(record).features.feature
            name, speaker = (feature[key].bytes_list.value[0].decode() for key in ("name", "speaker"))
            return name, speaker, feature["start"].int64_list.value[0], samples_of(record)
        except Exception as error:
            raise ValueError(str(error).split(";")[0]) from error
