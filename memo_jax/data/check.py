"""Reads a dataset again, all of it: counts, lengths and checksums are those that it was prepared with, or what is not."""

import contextlib
import itertools
import os
from pathlib import Path

import numpy as np

from memo_jax.audio import SAMPLE_RATE
from memo_jax.data.prepare import MANIFEST, MANIFEST_COLUMNS, checksum_of, fingerprint_of
from memo_jax.data.records import INDEX, INFO, ShardReader, shard_files
from memo_jax.data.worker_pool import results
from memo_jax.log import Progress


def check(dataset, *, workers: int | None = None) -> dict:
    """Verifies that every utterance of a dataset is there as its manifest says.

    Returns:
      {"utterances", "seconds", "shards", "problems": [(file, problem), …]}, a sound dataset having no problems.

    Raises:
      FileNotFoundError: no dataset there. ValueError: workers out of range.
    """
    folder = Path(dataset)
    if not (folder / INFO).is_file():
        raise FileNotFoundError(f"{folder} is not a dataset ({INFO} is missing)")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; expected 1 or more")
    report = {"utterances": 0, "seconds": 0.0, "shards": 0, "problems": []}
    try:
        shards, metadata = shard_files(folder)
        size, fingerprint = metadata["segment_samples"], metadata["fingerprint"]
    except (ValueError, KeyError) as error:
        report["problems"].append((INFO, f"not readable, or of another version: {error}"))
        return report
    report |= {"utterances": metadata["utterances"], "seconds": metadata["seconds"], "shards": len(shards)}
    first_records = list(itertools.accumulate((records for _, records in shards), initial=0))
    problems, index = report["problems"], _index(folder, size, first_records[-1])
    if index is None:
        problems.append((INDEX, "missing or damaged"))
    found_fingerprint, problem = _read_manifest(folder, metadata["utterances"])
    if problem:
        problems.append((MANIFEST, problem))
    with Progress(first_records[-1], "check", "record") as shown, contextlib.ExitStack() as files:
        rows = None if problems else _manifest_rows(files.enter_context(_opened(folder)))
        tasks = _tasks(shards, first_records, index, rows, size)
        for found in results(_shard_problems, tasks, min(workers or os.cpu_count(), len(shards)), shown):
            problems += found
    if not problems and found_fingerprint != fingerprint:
        problems.append(
            (INFO, f"fingerprint {fingerprint}, but that of the manifest and the records is {found_fingerprint}")
        )
    report["problems"] = sorted(problems)
    return report


def check_summary(dataset, report: dict, most: int = 20) -> str:
    """What `check` found, for people."""
    problems = [f"  {file}: {problem}" for file, problem in report["problems"][:most]]
    if len(report["problems"]) > most:
        problems.append(f"  … and {len(report['problems']) - most:,} more")
    line = "{:,} utterances, {:.2f} hours, {:,} shards".format(
        report["utterances"], report["seconds"] / 3600, report["shards"]
    )
    if not problems:
        return f"{dataset}: {line}, all as prepared"
    count = "1 problem" if len(problems) == 1 else f"{len(report['problems']):,} problems"
    return "\n".join(
        [
            f"{dataset} is damaged: {count} in {line}",
            *problems,
            "restore these files from a copy, or prepare the dataset again",
        ]
    )


def _index(folder, size, records):
    """The index when it accounts for all records, else None."""
    try:
        index = np.load(folder / INDEX)
        counts = -(-index[:, 1] // size)
        sound = (counts > 0).all() and (np.cumsum(counts) - counts == index[:, 0]).all() and counts.sum() == records
        return index if sound else None
    except (OSError, ValueError, IndexError, EOFError):
        return None


def _opened(folder):
    return open(folder / MANIFEST, encoding="utf-8", newline="\n")


def _manifest_rows(file):
    """The rows of an open manifest; ValueError for a line that is none."""
    for number, line in enumerate(file):
        row = tuple(line.rstrip("\n").split("\t"))
        if len(row) != len(MANIFEST_COLUMNS) or (number == 0 and row != MANIFEST_COLUMNS):
            raise ValueError(f"line {number + 1} is not as prepare wrote it: {line[:80]!r}")
        if number:
            yield row


def _read_manifest(folder, utterances):
    """(fingerprint, problem) of the manifest as a whole: what single rows say is compared with the records later."""
    count = 0

    def counted(rows):
        nonlocal count
        for count, row in enumerate(rows, 1):
            yield row

    try:
        with _opened(folder) as file:
            fingerprint = fingerprint_of(counted(_manifest_rows(file)))
    except (OSError, ValueError) as error:
        return None, str(error)
    return fingerprint, "" if count == utterances else f"{count:,} utterances, the dataset has {utterances:,}"


def _tasks(shards, first_records, index, rows, size):
    """Yields, for each shard: path, records, its part of the index, its rows (None where these are not to be had), size."""
    for number, (path, records) in enumerate(shards):
        begin, end = first_records[number : number + 2]
        part = own_rows = None
        if index is not None:
            part = index[slice(*np.searchsorted(index[:, 0], (begin, end)))] - (begin, 0)
            own_rows = rows and list(itertools.islice(rows, len(part)))
        yield path, records, part, own_rows, size


def _shard_problems(path, records, index, rows, size, count):
    """[(file, problem)] of a shard."""
    file = os.path.basename(path)
    try:
        reader = ShardReader(path)
    except OSError as error:
        return [(file, str(error))]
    if len(reader) != records:
        return [(file, f"{len(reader):,} records, expected {records:,}")]
    problems = []
    utterances = (
        [(number, 1) for number in range(records)]
        if index is None
        else [(first, -(-samples // size)) for first, samples in index.tolist()]
    )
    for position, (first, count_of) in enumerate(utterances):
        parts = []
        for number in range(first, first + count_of):
            count()
            try:
                parts.append(reader[number])
            except ValueError as error:
                problems.append((file, f"record {number} cannot be read ({error})"))
        if rows and len(parts) == count_of:
            problems += [
                (file, f"utterance {rows[position][0]}: {problem}")
                for problem in _utterance_problems(parts, rows[position], size)
            ]
    return problems


def _utterance_problems(parts, row, size):
    """What of an utterance's records (name, speaker, start, samples) is not as its row of the manifest says."""
    name, speaker, seconds, checksum, _ = row
    samples = np.concatenate([part[3] for part in parts])
    if {part[:2] for part in parts} != {(name, speaker)}:
        yield f"the record's name and speaker are {' '.join(map(repr, parts[0][:2]))}, the manifest's {name!r} {speaker!r}"
    if [part[2] for part in parts] != list(range(0, len(samples), size)):
        yield "its segments are not in order"
    if f"{len(samples) / SAMPLE_RATE:.7f}" != seconds:
        yield f"{len(samples) / SAMPLE_RATE:.7f} s, the manifest says {seconds}"
    if checksum_of(samples) != checksum:
        yield f"checksum {checksum_of(samples)}, the manifest says {checksum}"
