"""What a record should hold: PCM or FLAC, compressed or not, how many records per group, how long a segment.

    python experiments/benchmarks/records.py [--data RECORDINGS] [--json]

Size per hour decides what a disk must hold, speed per core what a training run can read. Times are CPU time of this
process, from files that the operating system has in memory; each is the best of three rounds.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import soundfile  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from memo_jax.audio import SAMPLE_RATE, is_audio_name, read_audio  # noqa: E402
from memo_jax.data.batches import steps_per_epoch, training_batches  # noqa: E402
from memo_jax.data.records import READER_OPTIONS, checksum_of, samples_of, serialized  # noqa: E402
from memo_jax.files import as_json
from synthetic import cuts, utterance_lengths, write_dataset  # noqa: E402

ROUNDS = 3
SEGMENT_SECONDS = (2, 4, 8, 12, 16, 24, 36000)
# contents of a record, options of array_record
FORMATS = (
    ("PCM", "group_size:1,uncompressed"),
    ("PCM", "group_size:4,uncompressed"),
    ("PCM", "group_size:16,uncompressed"),
    ("PCM", "group_size:1,snappy"),
    ("PCM", "group_size:1,zstd:1"),
    ("PCM", "group_size:1,zstd:3"),
    ("PCM", "group_size:1,zstd:9"),
    ("PCM", "group_size:1,brotli:3"),
    ("FLAC", "group_size:1,uncompressed"),
)


def encoded(content: str, samples: np.ndarray) -> bytes:
    """The record of an utterance."""
    if content == "PCM":
        return serialized(checksum_of(samples), "id00012/21Uxsk56VDQ/00001.wav", "id00012", 0, samples)
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def decoded(content: str, record: bytes) -> np.ndarray:
    """The utterance of a record."""
    return samples_of(record) if content == "PCM" else soundfile.read(io.BytesIO(record), dtype="int16")[0]


def measure_format(content: str, options: str, utterances: list, folder: Path) -> dict:
    """Bytes an hour of a format, and whole utterances read and written per CPU-second, in random order."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    path = str(folder / "shard")
    began = time.process_time()
    writer = ArrayRecordWriter(path, options)
    for samples in utterances:
        writer.write(encoded(content, samples))
    writer.close()
    writing = time.process_time() - began
    reader = ArrayRecordReader(path, READER_OPTIONS)
    order, times = np.random.default_rng(0).permutation(len(utterances)).tolist(), []
    for _ in range(ROUNDS):
        began = time.process_time()
        for number in order:
            samples = decoded(content, reader.read([number])[0])
        times.append(time.process_time() - began)
    np.testing.assert_array_equal(samples, utterances[order[-1]])
    hours = sum(map(len, utterances)) / SAMPLE_RATE / 3600
    size = os.path.getsize(path)
    os.unlink(path)
    return {
        "content": content,
        "options": options,
        "megabytes_per_hour": size / hours / 1e6,
        "reads_per_second_per_core": len(utterances) / min(times),
        "writes_per_second_per_core": len(utterances) / writing,
    }


def measure_segments(seconds: float, utterances: list, folder: Path) -> dict:
    """Utterances (2 × 4 s + 4 × 2 s crops) per CPU-second that `training_batches` takes from segments of a length."""
    write_dataset(folder, utterances, len(utterances), segment_samples=round(seconds * SAMPLE_RATE))
    size, times = min(32, len(utterances)), []
    with contextlib.closing(training_batches(folder, batch_size=size, seed=0)) as batches:
        steps = steps_per_epoch(len(utterances), size)
        for _ in range(ROUNDS):
            began = time.process_time()
            for _ in range(steps):
                next(batches)
            times.append(time.process_time() - began)
    return {"segment_seconds": seconds, "utterances_per_second_per_core": steps * size / min(times)}


def read_recordings(folder: Path, count: int) -> list:
    """At most `count` recordings of a folder, int16 [L]."""
    paths = sorted(path for path in folder.rglob("*") if is_audio_name(path.name))
    return [read_audio(path) for path in paths[:count]]


def table(results: dict) -> str:
    """The results as a table."""
    lines = [
        f"{results['hours']:.2f} hours of {results['sound']}, {results['utterances']} utterances",
        "",
        "| record | options | MB an hour | read a second a core | written a second a core |",
        "|---|---|---|---|---|",
    ]
    for row in results["formats"]:
        lines.append(
            f"| {row['content']} | {row['options'].replace(',', ', ')} | {row['megabytes_per_hour']:.1f} "
            f"| {row['reads_per_second_per_core']:,.0f} | {row['writes_per_second_per_core']:,.0f} |"
        )
    for title, rows in results["segments"].items():
        lines += ["", f"| segment, s | {title}: utterances a second a core |", "|---|---|"]
        for row in rows:
            name = f"{row['segment_seconds']:g}" if row["segment_seconds"] < 36000 else "whole"
            lines.append(f"| {name} | {row['utterances_per_second_per_core']:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, metavar="RECORDINGS", help="folder of speech (default: speech-like sound)")
    parser.add_argument("--utterances", type=int, default=400, help="how many (default: %(default)s)")
    parser.add_argument("--long-seconds", type=float, default=600, help="length of long recordings")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    if options.data:
        utterances = read_recordings(options.data, options.utterances)
        if not utterances:
            sys.exit(f"{options.data}: no recordings there")
    else:
        utterances = list(cuts(rng, utterance_lengths(rng, options.utterances, 8.0)))
    longs = list(cuts(rng, [round(options.long_seconds * SAMPLE_RATE)] * max(options.utterances // 40, 2)))
    results = {
        "sound": str(options.data) if options.data else "speech-like sound",
        "utterances": len(utterances),
        "hours": sum(map(len, utterances)) / SAMPLE_RATE / 3600,
    }
    with tempfile.TemporaryDirectory(prefix="memo-jax-benchmark-") as folder:
        folder = Path(folder)
        results["formats"] = [measure_format(*format, utterances, folder) for format in FORMATS]
        results["segments"] = {
            title: [
                measure_segments(seconds, sounds, folder / f"{len(sounds[0])}-{seconds:g}")
                for seconds in SEGMENT_SECONDS
            ]
            for title, sounds in (("these", utterances), (f"recordings of {options.long_seconds:g} s", longs))
        }
    print(as_json(results) if options.json else table(results))


if __name__ == "__main__":
    main()
