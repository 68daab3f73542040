"""Recordings → one TFDS dataset of array_record shards, written without TensorFlow, by many processes, resumably."""

import collections
import contextlib
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

from memo_jax import __version__
from memo_jax.audio import SAMPLE_RATE, AudioError, check_speech
from memo_jax.data.archives import TarStream
from memo_jax.data.plan import planned, reasons, say
from memo_jax.data.recordings import find_recordings, input_kind, is_streamed, read_recording
from memo_jax.data.records import SEGMENT_SAMPLES, ShardWriter, write_metadata
from memo_jax.data.tfds_audio import is_tfds_input
from memo_jax.data.unfinished import Unfinished, explained_write_errors, finish_part
from memo_jax.data.worker_pool import results
from memo_jax.log import Progress

MANIFEST, LEFT_OUT = "manifest.tsv", "left_out.tsv"
MANIFEST_COLUMNS = ("name", "speaker", "seconds", "checksum", "source")
# A batch reads from every shard and a reader holds its file open, so their number must stay well under the usual limit
# of 1,024 open files; small datasets get several shards too, so that workers have something to share.
RECORDINGS_PER_SHARD, MOST_PARTS, BYTES_PER_SHARD = 64, 256, 2 << 30


def prepare(
    inputs,
    output,
    *,
    min_seconds: float = 0.5,
    max_seconds: float = 4 * 3600,
    workers: int | None = None,
    overwrite: bool = False,
    run_commands: bool = False,
    speakers: dict[str, str] | None = None,
) -> dict:
    """Turns recordings into a dataset that `data.open_utterances` reads.

    Every file of the inputs is either in the dataset or in its report of what was left out. Names, speakers and order
    are those of `recordings.find_recordings`, whatever the number of workers. The output appears whole or not at all.
    What a run did before it was ended, by whatever, is kept beside the output; the same call goes on from there, with
    the list of recordings that the first run found, and ends with the bytes that it would have written.

    Writes, beside the TFDS files: manifest.tsv (name, speaker, seconds, checksum of the samples, source) and
    left_out.tsv (source, reason).

    Args:
      inputs: folders, nested as speaker/…/utterance, or flat (then the speaker is ""); zip and tar archives; Kaldi
        folders; wespeaker's shards or a list of them; datasets of TFDS (`tfds_audio.tfds_input`).
      output: folder to create.
      min_seconds: shorter recordings are left out.
      max_seconds: longer recordings are left out.
      workers: processes; all processors when None. 1 works in this process.
      overwrite: whether an earlier dataset at `output`, or the unfinished one of another call, is replaced.
      run_commands: whether commands in a Kaldi folder's wav.scp are run.
      speakers: name → speaker, in place of those found.

    Returns:
      the report: {"output", "utterances", "speakers", "seconds", "shards", "left_out": [(source, reason), …],
      "fingerprint"}; see `summary`.

    Raises:
      ValueError: no recordings, none usable, two would have the same name, an input is damaged, changed or gone, or
        output and inputs overlap.
      FileExistsError: `output` exists (without `overwrite`), or is no dataset (with it), or is unfinished, of another
        call.
      OSError: the output cannot be written: read-only, disk full.
    """
    inputs = [os.fspath(path) for path in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
    output, target = Path(output), Path(os.path.abspath(output))
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; expected 1 or more")
    _check_output(inputs, output, overwrite)
    command = {
        "inputs": [path if is_tfds_input(path) else os.path.abspath(path) for path in inputs],
        "min_seconds": min_seconds,
        "max_seconds": max_seconds,
        "run_commands": run_commands,
        "speakers": _digest(speakers),
        "version": __version__,
        "segment_samples": SEGMENT_SAMPLES,
        "recordings_per_shard": RECORDINGS_PER_SHARD,
        "bytes_per_shard": BYTES_PER_SHARD,
    }
    unfinished = Unfinished(target)
    find = functools.partial(_find, exclude=output, run_commands=run_commands, speakers=speakers)
    try:
        recordings, left_out = planned(unfinished, command, inputs, find, overwrite, output)
        with explained_write_errors(unfinished, output):
            _write_parts(unfinished, _parts(recordings), inputs, min_seconds, max_seconds, workers or os.cpu_count())
            report = _finish(unfinished, len(_parts(recordings)), left_out)
            if report["utterances"]:
                _replace_folder(unfinished.dataset, target)
            unfinished.discard()
    except KeyboardInterrupt:
        if unfinished.has_parts():
            say(f"{output} is unfinished: the same command goes on from there")
        raise
    finally:
        unfinished.release()
    if not report["utterances"]:
        raise ValueError(f"no usable recording in {', '.join(inputs)}{reasons(report['left_out'])}")
    return report | {"output": str(output)}


def summary(report: dict) -> str:
    """What `prepare` did, for people: counts, hours, and why files were left out."""
    speakers = f", {report['speakers']:,} speakers" if report["speakers"] else ""
    lines = [
        f"{report['output']}: {report['utterances']:,} utterances{speakers}, "
        f"{report['seconds'] / 3600:.2f} hours, {report['shards']} shards"
    ]
    if report["left_out"]:
        lines.append(
            f"left out {len(report['left_out']):,} files{reasons(report['left_out'])}; "
            f"all in {os.path.join(report['output'], LEFT_OUT)}"
        )
    return "\n".join(lines)


def fingerprint_of(rows) -> str:
    """Digest of the names and audio of the rows of a manifest, in their order; speakers are no part of it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, _, seconds, checksum, *_ in rows:
        digest.update(json.dumps([name, seconds, checksum]).encode())
    return digest.hexdigest()


def checksum_of(samples) -> str:
    """Digest of an utterance's samples, as it stands in a manifest."""
    return hashlib.blake2b(samples, digest_size=8).hexdigest()


def _find(inputs, exclude, run_commands, speakers):
    for path in inputs:
        say(f"looking for recordings in {path} ({input_kind(path)})")
    recordings, left_out = find_recordings(inputs, exclude, run_commands)
    if speakers is not None:
        recordings = [item._replace(speaker=speakers.get(item.name, "")) for item in recordings]
    return recordings, left_out


def _parts(recordings):
    """The recordings in slices, each of which becomes one shard (or more where they are long)."""
    size = max(RECORDINGS_PER_SHARD, -(-len(recordings) // MOST_PARTS))
    return [recordings[start : start + size] for start in range(0, len(recordings), size)]


def _write_parts(unfinished, parts, inputs, min_seconds, max_seconds, workers):
    """Writes the parts that are not done yet, with a progress bar over recordings."""
    write = functools.partial(
        _write_part,
        folder=unfinished.folder,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
        inputs=[path for path in inputs if os.path.exists(path)],
    )
    done = unfinished.parts_done(len(parts))
    recordings_done = sum(len(part) for part, is_done in zip(parts, done) if is_done)
    if recordings_done:
        say(f"going on where an earlier run ended: {recordings_done:,} of {sum(map(len, parts)):,} recordings are done")
    todo = [number for number, is_done in enumerate(done) if not is_done]
    with (
        Progress(sum(map(len, parts)), "prepare", "recording", initial=recordings_done) as shown,
        contextlib.closing(_spooled(todo, parts, unfinished.folder)) as tasks,
    ):
        _exhaust(results(write, tasks, max(1, min(workers, len(todo))), shown))


def _spooled(numbers, parts, folder):
    """Yields (part's number, its recordings, spool) for each part.

    The recordings of a compressed tar are copied, part by part, to a file from which workers read them; `spool` is its
    path and the offset of each recording, or None.
    """
    with contextlib.ExitStack() as streams:
        stream = None
        for number in numbers:
            spool = None
            if any(map(is_streamed, parts[number])):
                spool = (os.path.join(folder, f"spool-{number:05d}"), [])
                with open(spool[0], "wb") as file:
                    for item in parts[number]:
                        spool[1].append(file.tell())
                        if is_streamed(item):
                            if stream is None or stream.path != item.root:
                                stream = streams.enter_context(contextlib.closing(TarStream(item.root)))
                            stream.copy(item.extent.number, file)
            yield number, parts[number], spool


def _write_part(number, recordings, spool, *, count, folder, inputs, min_seconds, max_seconds):
    """Decodes the recordings of a part into one shard, or more when they are long, and declares it complete."""
    rows, left_out, shards, shard = [], [], [], None
    try:
        for index, item in enumerate(recordings):
            try:
                samples = read_recording(item, max_seconds=max_seconds, spool=spool and (spool[0], spool[1][index]))
                check_speech(item.source, samples, min_seconds)
            except AudioError as error:
                _check_inputs([*inputs, item.root] if item.extent else inputs)
                left_out.append((item.source, error.reason))
            else:
                if shard is None or shard.bytes + samples.nbytes > BYTES_PER_SHARD:
                    if shard is not None:
                        shards.append(shard.close())
                    shard = ShardWriter(folder / "dataset" / f"part-{number:05d}-{len(shards):05d}")
                shard.write(item.name, item.speaker, samples)
                rows.append(
                    (item.name, item.speaker, f"{len(samples) / SAMPLE_RATE:.7f}", checksum_of(samples), item.source)
                )
            count()
        if shard is not None:
            shards.append(shard.close())
        shards = [shard | {"path": os.path.basename(shard["path"])} for shard in shards]
        finish_part(folder, number, {"rows": rows, "left_out": left_out, "shards": shards})
    except BaseException:
        for path in (folder / "dataset").glob(f"part-{number:05d}-*"):  # makes room on a full disk
            path.unlink()
        raise
    finally:
        if spool:
            os.unlink(spool[0])


def _check_inputs(inputs):
    """One file that cannot be read is left out; a disk that went away is another matter."""
    for path in inputs:
        if not os.path.exists(path):
            raise ValueError(f"{path} is gone: bring it back and give the same command again")


def _finish(unfinished, parts, left_out):
    """Writes manifest, list of what was left out and metadata beside the finished shards; returns the report."""
    report = {"utterances": 0, "speakers": 0, "seconds": 0.0, "shards": 0}
    speakers, shards, left_out = set(), [], list(left_out)

    def rows():  # part by part, since a million rows would fill the memory
        for number in range(parts):
            part = unfinished.part(number)
            shards.extend(shard | {"path": str(unfinished.dataset / shard["path"])} for shard in part["shards"])
            left_out.extend(map(tuple, part["left_out"]))
            for row in part["rows"]:
                report["utterances"] += 1
                report["seconds"] += float(row[2])
                speakers.add(row[1])
                yield row

    report["fingerprint"] = fingerprint_of(_written(unfinished.dataset / MANIFEST, MANIFEST_COLUMNS, rows()))
    report |= {"speakers": len(speakers - {""}), "shards": len(shards), "left_out": sorted(left_out)}
    _exhaust(_written(unfinished.dataset / LEFT_OUT, ("source", "reason"), report["left_out"]))
    if shards:
        keys = ("fingerprint", "utterances", "seconds")
        write_metadata(unfinished.dataset, shards, {key: report[key] for key in keys})
    return report


def _written(path, header, rows):
    """Yields the rows while it writes them as tab-separated text, a row a line; tabs and breaks are written as \\t, …"""
    escapes = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write("\t".join(header) + "\n")
        for row in rows:
            file.write("\t".join(field.translate(escapes) for field in row) + "\n")
            yield row


def _check_output(inputs, output, overwrite):
    """Refuses an output that would destroy something that is no earlier dataset."""
    real = os.path.realpath(output)
    for path in inputs:
        if os.path.commonpath([real, os.path.realpath(path)]) == real:
            raise ValueError(f"the output {output} is or holds the input {path}: choose another output")
    if not os.path.lexists(output) or (output.is_dir() and not os.listdir(output)):
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists already: choose another output, or replace it with --overwrite")
    if not (output / "dataset_info.json").is_file():
        raise FileExistsError(f"{output} exists and is not a dataset, so it is not overwritten: choose another output")


def _replace_folder(finished, target):
    """Puts the finished folder in its place; an earlier dataset goes only once the new one is there."""
    old = target.parent / f".{target.name}.old"
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(finished, target)
    shutil.rmtree(old, ignore_errors=True)


def _exhaust(iterator):
    collections.deque(iterator, maxlen=0)


def _digest(speakers):
    return speakers and hashlib.blake2b(json.dumps(sorted(speakers.items())).encode(), digest_size=8).hexdigest()
