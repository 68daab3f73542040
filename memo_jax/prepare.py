"""Folders of recordings → one TFDS dataset of array_record shards, written without TensorFlow."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from memo_jax.audio import AUDIO_EXTENSIONS, SAMPLE_RATE, AudioError, check_speech, read_audio
from memo_jax.recordings import find_recordings

DATASET_NAME, SPLIT = "speech", "train"
MANIFEST, LEFT_OUT = "manifest.tsv", "left_out.tsv"
MANIFEST_COLUMNS = ("name", "speaker", "seconds", "checksum", "source")
# A batch reads from every shard and a reader holds its file open, so their number must stay well under the usual limit
# of 1,024 open files; small datasets get several shards too, so that workers have something to share.
RECORDINGS_PER_SHARD, MOST_TASKS, BYTES_PER_SHARD = 64, 256, 2 << 30
# Uncompressed: PCM shrinks by a fifth only, and reads at a quarter of the speed.
SHARD_OPTIONS = "group_size:1,uncompressed"


def prepare(inputs, output, *, min_seconds: float = 0.5, max_seconds: float = 4 * 3600, workers: int | None = None,
            overwrite: bool = False, speakers: dict[str, str] | None = None) -> dict:
    """Turns folders of recordings into a dataset that `data.open_utterances` reads.

    Every file below the inputs is either in the dataset or in its report of what was left out. An utterance's name is
    its path relative to its input, with "/". Records are in the order of the names, whatever the number of workers and
    whatever the speakers. The output appears whole or not at all.

    Writes, beside the TFDS files: manifest.tsv (name, speaker, seconds, checksum of the samples, source file) and
    left_out.tsv (source file, reason).

    Args:
      inputs: folders, nested as speaker/…/utterance, or flat (then the speaker is "").
      output: folder to create.
      min_seconds: shorter recordings are left out.
      max_seconds: longer recordings are left out.
      workers: processes; all processors when None. 1 works in this process.
      overwrite: whether an earlier dataset at `output` is replaced.
      speakers: name → speaker, in place of the folders' names.

    Returns:
      the report: {"output", "utterances", "speakers", "seconds", "shards", "left_out": [(file, reason), …],
      "fingerprint"}; see `summary`.

    Raises:
      ValueError: no recordings, none usable, two inputs hold the same name, or output and inputs overlap.
      FileExistsError: `output` exists (without `overwrite`), or is no dataset (with it).
      OSError: the output cannot be written: read-only, disk full.
    """
    inputs, output = [Path(path) for path in ([inputs] if isinstance(inputs, (str, Path)) else inputs)], Path(output)
    target = Path(os.path.abspath(output))
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; expected 1 or more")
    _check_output(inputs, output, overwrite)
    recordings, left_out = find_recordings(inputs, exclude=output)
    if speakers is not None:
        recordings = [dataclasses.replace(item, speaker=speakers.get(item.name, "")) for item in recordings]
    if not recordings:
        raise ValueError(f"no recordings in {_listed(inputs)}{_reasons(left_out)}; "
                         f"looked for {' '.join(sorted(AUDIO_EXTENSIONS))}")
    partial = _make_partial_folder(target)
    try:
        with _explained_write_errors(output):
            report = _write_dataset(recordings, left_out, partial, min_seconds, max_seconds, workers or os.cpu_count())
            if not report["utterances"]:
                raise ValueError(f"no usable recording in {_listed(inputs)}{_reasons(report['left_out'])}")
            _replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report | {"output": str(output)}


def summary(report: dict) -> str:
    """What `prepare` did, for people: counts, hours, and why files were left out."""
    speakers = f", {report['speakers']:,} speakers" if report["speakers"] else ""
    lines = [f"{report['output']}: {report['utterances']:,} utterances{speakers}, "
             f"{report['seconds'] / 3600:.2f} hours, {report['shards']} shards"]
    if report["left_out"]:
        lines.append(f"left out {len(report['left_out']):,} files{_reasons(report['left_out'])}; "
                     f"all in {os.path.join(report['output'], LEFT_OUT)}")
    return "\n".join(lines)


def _write_dataset(recordings, left_out, folder, min_seconds, max_seconds, workers):
    """Writes shards, manifest and metadata into `folder`; returns the report."""
    per_task = max(RECORDINGS_PER_SHARD, -(-len(recordings) // MOST_TASKS))
    tasks = [(index, recordings[start:start + per_task])
             for index, start in enumerate(range(0, len(recordings), per_task))]
    write = functools.partial(_write_shards, folder=str(folder), min_seconds=min_seconds, max_seconds=max_seconds)
    results = list(_run(write, tasks, workers, len(recordings)))
    rows = [row for result in results for row in result["rows"]]
    left_out = sorted(left_out + [item for result in results for item in result["left_out"]])
    shards = [shard for result in results for shard in result["shards"]]
    report = {"utterances": len(rows), "speakers": len({row[1] for row in rows} - {""}),
              "seconds": sum(float(row[2]) for row in rows), "shards": len(shards), "left_out": left_out,
              "fingerprint": _fingerprint(rows)}
    _write_table(folder / LEFT_OUT, ("file", "reason"), left_out)
    if rows:
        _write_table(folder / MANIFEST, MANIFEST_COLUMNS, rows)
        _write_metadata(folder, shards, report)
    return report


def _run(write, tasks, workers, total):
    """Results of `write` for each task, in order, with a progress bar over recordings."""
    from memo_jax.log import progress

    finished = []

    def recordings_done():
        with contextlib.ExitStack() as stack:
            for task, result in zip(tasks, _results(write, tasks, min(workers, len(tasks)), stack)):
                finished.append(result)
                yield from task[1]

    for _ in progress(recordings_done(), total=total, label="prepare", unit="recording"):
        pass
    return finished


def _results(write, tasks, workers, stack):
    if workers == 1:
        yield from map(write, tasks)
        return
    # spawn: a fork of a process with threads (JAX, soundfile) may deadlock
    pool = stack.enter_context(ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")))
    stack.callback(pool.shutdown, cancel_futures=True)
    try:
        yield from pool.map(write, tasks)
    except BrokenProcessPool:
        raise OSError("a worker process was killed, perhaps for want of memory: try fewer workers") from None


def _write_shards(task, *, folder, min_seconds, max_seconds):
    """Decodes the recordings of a task into one shard, or more when they are long."""
    index, recordings = task
    serialize = _serializer()
    rows, left_out, shards, shard = [], [], [], None
    for item in recordings:
        try:
            samples = read_audio(item.path, max_seconds=max_seconds)
            check_speech(item.path, samples, min_seconds)
        except AudioError as error:
            left_out.append((item.path, error.reason))
            continue
        if shard is None or shard.bytes + samples.nbytes > BYTES_PER_SHARD:
            if shard is not None:
                shards.append(shard.close())
            shard = _Shard(os.path.join(folder, f"task-{index:05d}-{len(shards):05d}"))
        record = serialize({"name": item.name, "speaker": item.speaker, "samples": samples})
        shard.write(record, samples.nbytes)  # the size of a shard must not depend on the speaker's name
        checksum = hashlib.blake2b(samples, digest_size=8).hexdigest()
        rows.append((item.name, item.speaker, f"{len(samples) / SAMPLE_RATE:.7f}", checksum, item.path))
    if shard is not None:
        shards.append(shard.close())
    return {"rows": rows, "left_out": left_out, "shards": shards}


class _Shard:
    """An array_record file being written."""

    def __init__(self, path):
        from array_record.python.array_record_module import ArrayRecordWriter
        self.path, self.records, self.bytes = path, 0, 0
        self._writer = ArrayRecordWriter(path, SHARD_OPTIONS)

    def write(self, record, size):
        with _runtime_errors_as_oserrors():
            self._writer.write(record)
        self.records, self.bytes = self.records + 1, self.bytes + size

    def close(self):
        with _runtime_errors_as_oserrors():
            self._writer.close()
        if not os.path.exists(self.path):  # the writer does not tell when it could not create its file
            raise OSError(f"{self.path} could not be created")
        return {"path": self.path, "records": self.records, "bytes": self.bytes}


@functools.cache
def _features():
    import numpy as np
    import tensorflow_datasets as tfds
    return tfds.features.FeaturesDict({
        "name": tfds.features.Text(),
        "speaker": tfds.features.Text(),
        # encoding="bytes": one bytes value in place of a list of integers, nine times faster to read
        "samples": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
    })


def _serializer():
    """The function example → bytes of a record."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer
    serializer = ExampleSerializer(_features().get_serialized_info())

    def serialize(example):
        # deterministic: the fields of a protobuf map come in an order that differs between processes otherwise
        return serializer.get_tf_example(_features().encode_example(example)).SerializeToString(deterministic=True)

    return serialize


def _fingerprint(rows):
    """Digest of names and audio in order; speakers are no part of it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, _, seconds, checksum, _ in rows:
        digest.update(json.dumps([name, seconds, checksum]).encode())
    return digest.hexdigest()


def _write_metadata(folder, shards, report):
    """Names the shards and writes the TFDS metadata, so that `tfds.builder_from_directory` opens the dataset."""
    import tensorflow_datasets as tfds
    for index, shard in enumerate(shards):
        os.rename(shard["path"], folder / f"{DATASET_NAME}-{SPLIT}.array_record-{index:05d}-of-{len(shards):05d}")
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=DATASET_NAME, split=SPLIT,
                                             filetype_suffix="array_record")
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=[shard["records"] for shard in shards],
                                num_bytes=sum(shard["bytes"] for shard in shards), filename_template=template)
    keys = ("fingerprint", "utterances", "seconds")
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=_features(), split_infos=[split], filename_template=template, check_data=False,
        description="16 kHz mono speech, one utterance a record; made by memo-jax prepare.",
        metadata=tfds.core.MetadataDict({key: report[key] for key in keys} | {"sample_rate": SAMPLE_RATE}))


def _write_table(path, header, rows):
    """Tab-separated text, one row a line; breaks inside a field (odd file names) are written as \\t, \\n, \\r."""
    escapes = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})
    lines = ("\t".join(field.translate(escapes) for field in row) + "\n" for row in (header, *rows))
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(lines)


def _check_output(inputs, output, overwrite):
    """Refuses an output that would destroy something that is no earlier dataset."""
    real = os.path.realpath(output)
    for folder in inputs:
        if os.path.commonpath([real, os.path.realpath(folder)]) == real:
            raise ValueError(f"the output {output} is or holds the input {folder}: choose another output")
    if not os.path.lexists(output) or (output.is_dir() and not os.listdir(output)):
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists already: choose another output, or replace it with --overwrite")
    if not (output / "dataset_info.json").is_file():
        raise FileExistsError(f"{output} exists and is not a dataset, so it is not overwritten: choose another output")


@contextlib.contextmanager
def _runtime_errors_as_oserrors():
    try:
        yield
    except RuntimeError as error:  # array_record: "write() failed: No space left on device; writing PATH; …"
        raise OSError(str(error).split(";")[0].replace("write() failed: ", "")) from None


@contextlib.contextmanager
def _explained_write_errors(output):
    """Turns any error of the disk into one that names the output; recordings that cannot be read do not come here."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror or error}; nothing was left there") from error


def _make_partial_folder(output):
    """Creates the folder beside `output` in which the dataset is written, in place of what a killed run left there."""
    partial = output.parent / f".{output.name}.partial"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise type(error)(f"cannot write to the folder {output.parent}: {error.strerror}") from None
    return partial


def _replace_folder(partial, output):
    """Puts the finished folder in its place; an earlier dataset goes only once the new one is there."""
    old = output.parent / f".{output.name}.old"
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(output, old)
    os.rename(partial, output)
    shutil.rmtree(old, ignore_errors=True)


def _listed(inputs):
    return ", ".join(str(folder) for folder in inputs)


def _reasons(left_out, most=5):
    """" (3 × empty file; 1 × silence)": how often each kind of reason occurs, or "" when nothing was left out."""
    counts = collections.Counter(reason.split(":")[0] for _, reason in left_out)
    shown = [f"{count} × {reason}" for reason, count in counts.most_common(most)]
    return f" ({'; '.join(shown + ['…'] * (len(counts) > most))})" if shown else ""
