"""Recordings → one TFDS dataset of array_record shards, written without TensorFlow, by many processes, resumably."""

import collections
import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from memo_jax.audio import SAMPLE_RATE, AudioError, check_speech, speech_of
from memo_jax.audio.speech import check_installed
from memo_jax.data.archives import LARGEST_MEMBER, TarStream
from memo_jax.data.plan import planned, reasons
from memo_jax.data.recordings import VOXCELEB_SPEAKER, Kind, find_recordings, input_kind, read_recording
from memo_jax.data.records import LEFT_OUT, MANIFEST, MANIFEST_COLUMNS, SEGMENT_SAMPLES, ShardWriter, write_metadata
from memo_jax.data.tfds_audio import TfdsInput
from memo_jax.data.unfinished import Unfinished, explained_write_errors, finish_part, is_dataset, is_empty_folder
from memo_jax.data.worker_pool import results
from memo_jax.locks import exclusive
from memo_jax.log import Progress, plural, say
from memo_jax.version import __version__

# A batch reads from every shard and a reader holds its file open, so their number must stay well under the usual limit
# of 1,024 open files; small datasets get several shards too, so that workers have something to share.
RECORDINGS_PER_SHARD, MOST_PARTS, BYTES_PER_SHARD = 64, 256, 2 << 30
BYTES_PER_SPOOL = LARGEST_MEMBER  # of a compressed tar that are copied beside the output at a time, for each worker


def prepare(
    inputs: str | os.PathLike | TfdsInput | Sequence[str | os.PathLike | TfdsInput],
    output: str | os.PathLike,
    *,
    min_seconds: float = 0.5,
    channel: str | int = "mean",
    vad: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    run_commands: bool = False,
    speakers: dict[str, str] | None = None,
) -> dict:
    """Turns recordings into a dataset that `batches.Utterances` reads.

    Every file of the inputs is either in the dataset or in its report of what was left out. Names, speakers and order
    are those of `recordings.find_recordings`, whatever the number of workers. The output appears whole or not at all,
    and replaces nothing but, with `overwrite`, a dataset. At most one process at a time prepares an output. What a run
    did before it ended, for whatever reason, is kept beside the output; the same call resumes from there, with the list
    of recordings that the first run found, and writes the same bytes that it would have written.

    Writes, beside the TFDS files: manifest.tsv (name, speaker, seconds, checksum of the samples, source), left_out.tsv
    (source, reason) and checksums.txt (of all files but the shards, as sha256sum writes and checks them).

    Args:
      inputs: folders, nested as speaker/…/utterance, or flat (then the speaker is ""); zip and tar archives; Kaldi
        folders; wespeaker's shards or a list of them; datasets of TFDS.
      output: folder to create.
      min_seconds: shorter recordings are left out.
      channel: of recordings with several: "mean", or the number of one, from 1. One named in the fifth field of a Kaldi
        folder's segments takes precedence.
      vad: keep only the parts that are speech (`audio.speech`), joined; a recording without speech is left out.
        `min_seconds` applies to what is left. Needs the extra `vad`.
      workers: processes; all processors if None. 1 works in this process.
      overwrite: whether an earlier dataset at `output`, or the unfinished one of another call, is replaced.
      run_commands: whether commands in a Kaldi folder's wav.scp are run.
      speakers: name → speaker, in place of those found.

    Returns:
      the report: {"output", "utterances", "speakers", "seconds", "shards", "left_out": [(source, reason), …],
      "fingerprint"}; see `preparation_text`.

    Raises:
      ValueError: no recordings, none usable, two would have the same name, an input is damaged, has changed or is
        missing, or output and inputs overlap.
      FileExistsError: `output` exists (without `overwrite`), or is not a dataset (with it), or was left unfinished by
        another call.
      LockedError: another process is preparing this output. OSError: it cannot be written: read-only, disk full.
    """
    inputs = [inputs] if isinstance(inputs, (str, os.PathLike, TfdsInput)) else list(inputs)
    inputs = [given if isinstance(given, TfdsInput) else os.fspath(given) for given in inputs]
    output, target = Path(output), Path(os.path.realpath(output))
    if vad:
        check_installed()
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; expected 1 or more")
    command = {
        "inputs": [given.text if isinstance(given, TfdsInput) else os.path.abspath(given) for given in inputs],
        "working_folder": os.getcwd() if any(map(_may_be_relative, inputs)) else None,
        "min_seconds": min_seconds,
        "channel": channel,
        "vad": vad,
        "run_commands": run_commands,
        "speakers": _speakers_digest(speakers),
        "version": __version__,
        "segment_samples": SEGMENT_SAMPLES,
        "recordings_per_shard": RECORDINGS_PER_SHARD,
        "bytes_per_shard": BYTES_PER_SHARD,
    }
    find = functools.partial(_find, exclude=output, run_commands=run_commands, speakers=speakers)
    with exclusive(target) as lock:
        unfinished = Unfinished(target)
        if report := unfinished.finished(command):
            say(f"{output} was already finished when the previous run was killed")
            unfinished.discard()
            return report | {"output": str(output), "left_out": [tuple(item) for item in report["left_out"]]}
        _check_output(inputs, output, overwrite)
        try:
            recordings, left_out = planned(unfinished, command, inputs, find, overwrite, output)
            parts = _parts(recordings)
            with explained_write_errors(unfinished, output):
                options = {"min_seconds": min_seconds, "channel": channel, "vad": vad}
                _write_parts(unfinished, parts, inputs, options, workers or os.cpu_count())
                report = _finish(unfinished, len(parts), left_out)
                if report["utterances"]:
                    lock.check()
                    unfinished.publish(command, report, overwrite)
                unfinished.discard()
        except KeyboardInterrupt:
            if unfinished.has_parts():
                say(f"{output} is unfinished: the same command continues from there")
            raise
        finally:
            with contextlib.suppress(OSError):  # on a failing disk, what was raised before is what to report
                if not unfinished.has_parts():
                    unfinished.discard()
    if not report["utterances"]:
        raise ValueError(f"no usable recording in {', '.join(map(str, inputs))}{reasons(report['left_out'])}")
    return report | {"output": str(output)}


def preparation_text(report: dict) -> str:
    """Returns the report of `prepare` as human-readable text: counts, hours, and why files were left out."""
    counts = [plural(report["utterances"], "utterance")]
    if report["speakers"]:
        counts.append(plural(report["speakers"], "speaker"))
    counts += [f"{report['seconds'] / 3600:.2f} hours", plural(report["shards"], "shard")]
    lines = [f"{report['output']}: {', '.join(counts)}"]
    if report["left_out"]:
        lines.append(
            f"left out {plural(len(report['left_out']), 'file')}{reasons(report['left_out'])}; "
            f"all in {os.path.join(report['output'], LEFT_OUT)}"
        )
    return "\n".join(lines)


def fingerprint_of(rows: Iterable[Sequence[str]]) -> str:
    """Returns a digest of the names and audio of a manifest's rows, in their order; speakers are not part of it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, _, seconds, checksum, *_ in rows:
        digest.update(json.dumps([name, seconds, checksum]).encode())
    return digest.hexdigest()


def _may_be_relative(given) -> bool:
    """Whether recordings of an input may be named relative to the current folder."""
    if isinstance(given, TfdsInput):
        return False
    return not os.path.isabs(given) or given.endswith(".list") or os.path.exists(os.path.join(given, "wav.scp"))


def _find(inputs, exclude, run_commands, speakers):
    for path in inputs:
        say(f"looking for recordings in {path} ({input_kind(path)})")
    recordings, left_out = find_recordings(inputs, exclude, run_commands)
    if speakers is not None:
        recordings = [item._replace(speaker=speakers.get(item.name, "")) for item in recordings]
    elif shared := _shared_speakers(recordings, inputs):
        say(
            f"{plural(len(shared), 'speaker')} ({', '.join(shared[:3])}{', …' * (len(shared) > 3)}) in more than one "
            "input: treated as the same speakers; if they are different people, rename their folders"
        )
    return recordings, left_out


def _shared_speakers(recordings, inputs):
    """Speakers whom more than one folder or archive has, unless all recordings are VoxCeleb's, id00012/video/00001."""
    roots, others = collections.defaultdict(set), set()
    for item in recordings:
        if item.root in inputs and item.speaker:
            roots[item.speaker].add(item.root)
            if not (VOXCELEB_SPEAKER.fullmatch(item.speaker) and item.name.count("/") == 2):
                others.add(item.speaker)
    return sorted(speaker for speaker in others if len(roots[speaker]) > 1)


def _parts(recordings):
    """The recordings in slices, each of which becomes one shard (or more where they are long)."""
    size = max(RECORDINGS_PER_SHARD, -(-len(recordings) // MOST_PARTS))
    parts, spooled = [[]], 0
    for item in recordings:
        streamed = item.extent.size if item.kind is Kind.STREAMED else 0
        if len(parts[-1]) == size or parts[-1] and spooled + streamed > BYTES_PER_SPOOL:
            parts.append([])
            spooled = 0
        parts[-1].append(item)
        spooled += streamed
    return parts


def _write_parts(unfinished, parts, inputs, options, workers):
    """Writes the parts that are not done yet, with a progress bar over recordings."""
    write = functools.partial(
        _write_part,
        folder=unfinished.folder,
        **options,
        inputs=[given for given in inputs if not isinstance(given, TfdsInput) and os.path.exists(given)],
    )
    done = unfinished.parts_done(len(parts))
    recordings_done = sum(len(part) for part, is_done in zip(parts, done) if is_done)
    if recordings_done:
        count = plural(sum(map(len, parts)), "recording")
        say(f"continuing an earlier run: {recordings_done:,} of {count} are done")
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
            if any(item.kind is Kind.STREAMED for item in parts[number]):
                spool = (os.path.join(folder, f"spool-{number:05d}"), [])
                with open(spool[0], "wb") as file:
                    for item in parts[number]:
                        spool[1].append(file.tell())
                        if item.kind is Kind.STREAMED:
                            if stream is None or stream.path != item.root:
                                if stream is not None:
                                    stream.close()  # a list may name thousands
                                stream = streams.enter_context(contextlib.closing(TarStream(item.root)))
                            stream.copy(item.extent, file)
            yield number, parts[number], spool


def _write_part(number, recordings, spool, *, count, folder, inputs, min_seconds, channel, vad):
    """Decodes the recordings of a part into one shard, or more when they are long, and declares it complete."""
    rows, left_out, shards, shard = [], [], [], None
    try:
        for index, item in enumerate(recordings):
            try:
                samples = read_recording(item, channel=channel, spool=spool and (spool[0], spool[1][index]))
                samples = speech_of(samples, item.source) if vad else samples
                check_speech(item.source, samples, min_seconds)
            except AudioError as error:
                _check_inputs([*inputs, item.archive] if item.archive else inputs)
                left_out.append((item.source, error.reason))
            else:
                if shard is None or shard.bytes + samples.nbytes > BYTES_PER_SHARD:
                    if shard is not None:
                        shards.append(shard.close())
                    shard = ShardWriter(folder / "dataset" / f"part-{number:05d}-{len(shards):05d}")
                checksum = shard.write(item.name, item.speaker, samples)
                rows.append((item.name, item.speaker, f"{len(samples) / SAMPLE_RATE:.7f}", checksum, item.source))
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
    """A single file that cannot be read is left out; a disk that is no longer there is another matter."""
    for path in inputs:
        if not os.path.exists(path):
            raise ValueError(f"{path} is no longer there: make it available and repeat the command")


def _finish(unfinished, parts, left_out):
    """Writes manifest, list of what was left out and metadata beside the finished shards and returns the report."""
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
    """Yields the rows while it writes them, tab-separated, with tabs and line breaks in them escaped."""
    escapes = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write("\t".join(header) + "\n")
        for row in rows:
            file.write("\t".join(field.translate(escapes) for field in row) + "\n")
            yield row


def _check_output(inputs, output, overwrite):
    """Refuses an output that would destroy something that is not an earlier dataset."""
    real = os.path.realpath(output)
    for path in inputs:
        if not isinstance(path, TfdsInput) and os.path.commonpath([real, os.path.realpath(path)]) == real:
            raise ValueError(f"the output {output} is or contains the input {path}: choose another output")
    if not os.path.lexists(output) or is_empty_folder(output):
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists already: choose another output, or replace it with --overwrite")
    if not is_dataset(output):
        raise FileExistsError(f"{output} exists and is not a dataset, so it is not overwritten: choose another output")


def _exhaust(iterator):
    collections.deque(iterator, maxlen=0)


def _speakers_digest(speakers):
    return speakers and hashlib.blake2b(json.dumps(sorted(speakers.items())).encode(), digest_size=8).hexdigest()
