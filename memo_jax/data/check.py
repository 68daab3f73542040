"""Reads all of a dataset again: files, counts, lengths and checksums must be those that it was prepared with."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from memo_jax.audio import SAMPLE_RATE
from memo_jax.data.prepare import fingerprint_of
from memo_jax.data.records import (
    CHECKSUMS,
    INDEX,
    INFO,
    MANIFEST,
    MANIFEST_COLUMNS,
    METADATA,
    ShardReader,
    changed_files,
    checksum_of,
    index_accounts_for,
    parsed_index,
    shard_files,
)
from memo_jax.data.worker_pool import results
from memo_jax.files import one_line
from memo_jax.log import Progress, plural

SHOWN_PROBLEMS = 20  # of a report, at most


def check(dataset: str | os.PathLike, *, workers: int | None = None) -> dict:
    """Verifies that every file and utterance of a dataset is there as `prepare` wrote it.

    Returns:
      {"utterances", "seconds", "shards", "problems": [(file, problem), …]}; a sound dataset has no problems.

    Raises:
      FileNotFoundError: no dataset there. ValueError: workers out of range.
    """
    folder = Path(dataset)
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; expected 1 or more")
    report = {"utterances": 0, "seconds": 0.0, "shards": 0, "problems": []}
    problems = report["problems"]
    if not any((folder / name).is_file() for name in (INFO, CHECKSUMS)):
        raise FileNotFoundError(f"{folder} is not a dataset ({INFO} is missing)")
    try:
        changed = changed_files(folder)
    except (OSError, ValueError) as error:
        problems.append((CHECKSUMS, one_line(error)))
        return report
    problems += [(name, _of_changed(folder / name)) for name in changed]
    if set(changed) & set(METADATA):  # nothing says what the shards should hold
        return report
    shards, metadata = shard_files(folder)
    size, fingerprint = metadata["segment_samples"], metadata["fingerprint"]
    report |= {"utterances": metadata["utterances"], "seconds": metadata["seconds"], "shards": len(shards)}
    first_records = list(itertools.accumulate((records for _, records in shards), initial=0))
    index = None if INDEX in changed else parsed_index((folder / INDEX).read_bytes())
    if INDEX not in changed and (index is None or not index_accounts_for(index, size, first_records[-1])):
        problems.append((INDEX, "does not account for the records"))
        index = None
    found_fingerprint, problem = _check_manifest(folder, metadata["utterances"])
    if problem:
        problems[:] = [item for item in problems if item[0] != MANIFEST] + [(MANIFEST, problem)]
    with Progress(first_records[-1], "check", "record") as shown, contextlib.ExitStack() as files:
        rows = None
        if index is not None and not problem:
            rows = _manifest_rows(files.enter_context(_open_manifest(folder)))
        tasks = _tasks(shards, first_records, index, rows, size)
        for found in results(_shard_problems, tasks, max(1, min(workers or os.cpu_count(), len(shards))), shown):
            problems += found
    if not problems and found_fingerprint != fingerprint:
        problems.append(
            (INFO, f"fingerprint {fingerprint}, but that of the manifest and the records is {found_fingerprint}")
        )
    problems.sort()
    return report


def check_text(dataset: str | os.PathLike, report: dict) -> str:
    """Returns the report of `check` as human-readable text."""
    problems = [f"  {file}: {problem}" for file, problem in report["problems"][:SHOWN_PROBLEMS]]
    if len(report["problems"]) > SHOWN_PROBLEMS:
        problems.append(f"  … and {len(report['problems']) - SHOWN_PROBLEMS:,} more")
    line = (
        f"{plural(report['utterances'], 'utterance')}, {report['seconds'] / 3600:.2f} hours, "
        f"{plural(report['shards'], 'shard')}"
    )
    if not problems:
        return f"{dataset}: {line}, all as prepared"
    return "\n".join(
        [
            f"{dataset} is damaged: {plural(len(report['problems']), 'problem')} in {line}",
            *problems,
            "restore these files from a copy, or prepare the dataset again",
        ]
    )


def _of_changed(path):
    return "damaged or changed" if path.is_file() else "missing"


def _open_manifest(folder):
    return open(folder / MANIFEST, encoding="utf-8", newline="\n")


def _manifest_rows(file) -> Iterator[tuple[str, ...]]:
    """Yields the rows of an open manifest; ValueError for a line that is not one."""
    for number, line in enumerate(file):
        row = tuple(line.rstrip("\n").split("\t"))
        if len(row) != len(MANIFEST_COLUMNS) or (number == 0 and row != MANIFEST_COLUMNS):
            raise ValueError(f"line {number + 1} is not as prepare wrote it: {line[:80]!r}")
        if number:
            yield row


def _check_manifest(folder, utterances):
    """(fingerprint, problem) of the manifest as a whole: its single rows are compared with the records later."""
    numbers = itertools.count()
    try:
        with _open_manifest(folder) as file:
            fingerprint = fingerprint_of(row for row, _ in zip(_manifest_rows(file), numbers))
    except (OSError, ValueError) as error:
        return None, one_line(error)
    count = next(numbers)  # as many as there were rows
    return fingerprint, "" if count == utterances else f"{count:,} utterances, the dataset has {utterances:,}"


def _tasks(shards, first_records, index, rows, size):
    """Yields, for each shard: path, records, its part of the index, its rows of the manifest (or None), size."""
    for number, (path, records) in enumerate(shards):
        begin, end = first_records[number : number + 2]
        part = own_rows = None
        if index is not None:
            part = index[slice(*np.searchsorted(index[:, 0], (begin, end)))] - (begin, 0, 0)
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
        else [(first, -(-samples // size)) for first, samples, _ in index.tolist()]
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
                for problem in _utterance_problems(parts, rows[position], index[position, 1], size)
            ]
    return problems


def _utterance_problems(parts, row, length, size):
    """Yields what in an utterance's records (name, speaker, start, samples) differs from its row of the manifest."""
    name, speaker, seconds, checksum, _ = row
    samples = np.concatenate([part[3] for part in parts])
    if {part[:2] for part in parts} != {(name, speaker)}:
        found = " ".join(map(repr, parts[0][:2]))
        yield f"the record's name and speaker are {found}, the manifest's {name!r} {speaker!r}"
    if [part[2] for part in parts] != list(range(0, len(samples), size)):
        yield "its segments are not in order"
    if len(samples) != length:
        yield f"{len(samples):,} samples, {INDEX} says {length:,}"
    if f"{len(samples) / SAMPLE_RATE:.7f}" != seconds:
        yield f"{len(samples) / SAMPLE_RATE:.7f} s, the manifest says {seconds}"
    if checksum_of(samples) != checksum:
        yield f"checksum {checksum_of(samples)}, the manifest says {checksum}"
