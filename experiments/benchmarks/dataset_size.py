"""Memory and start-up time of the loader for datasets of 10⁴, 10⁵ and 10⁶ utterances.

    python experiments/benchmarks/dataset_size.py [--json]

The records are small, since only their number matters. A fresh process opens each dataset, takes a first batch, and
then batches until every shard has been open. Memory is what that process holds (resident set), less what it holds
before it opens the dataset.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from memo_jax.data.batches import Utterances, training_batches
from memo_jax.data.records import SEGMENT_SAMPLES, SHARD_OPTIONS, checksum_of, serialized, write_metadata
from memo_jax.files import as_json
from memo_jax.log import progress

SAMPLES = 320  # 20 ms


def write_small_dataset(folder: Path, utterances: int, shards: int) -> None:
    """Writes a dataset of this many equal utterances: the bytes of one record, repeated."""
    from array_record.python.array_record_module import ArrayRecordWriter

    samples = np.arange(SAMPLES, dtype=np.int16)
    checksum = checksum_of(samples)
    record = serialized(checksum, "id00012/21Uxsk56VDQ/00001.wav", "id00012", 0, samples)
    counts = [utterances // shards + (number < utterances % shards) for number in range(shards)]
    written = []
    for number, count in enumerate(progress(counts, label=f"write {utterances:,}", unit="shard")):
        path = str(folder / f"shard-{number}")
        writer = ArrayRecordWriter(path, SHARD_OPTIONS)
        for _ in range(count):
            writer.write(record)
        writer.close()
        lengths = {"segment_samples": SEGMENT_SAMPLES, "lengths": [SAMPLES] * count}
        written.append({"path": path, **lengths, "checksums": [checksum] * count})
    write_metadata(folder, written, {"fingerprint": "small"})


def resident_megabytes() -> float:
    """What this process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_here(folder: Path, shards: int) -> dict:
    """Opens a dataset in this process and takes batches; returns times and memory."""
    import tensorflow_datasets as tfds  # noqa: F401  imported before the clock starts: it costs the same for any dataset
    from array_record.python import array_record_module  # noqa: F401

    options = {"batch_size": 64, "seed": 0, "global_seconds": 0.01, "local_seconds": 0.005}
    before, began = resident_megabytes(), time.perf_counter()
    utterances = Utterances(folder)
    opened = time.perf_counter()
    batches = training_batches(utterances, **options)
    next(batches)
    first_batch = time.perf_counter()
    opened_megabytes = resident_megabytes() - before
    for _ in range(shards // 8):  # 8 draws for each shard: one that stays closed is rare
        next(batches)
    batches.close()
    return {
        "utterances": len(utterances),
        "open_seconds": opened - began,
        "first_batch_seconds": first_batch - opened,
        "first_batch_megabytes": opened_megabytes,
        "all_shards_megabytes": resident_megabytes() - before,
        "index_megabytes": (folder / "index.npy").stat().st_size / 1e6,
    }


def table(rows: list[dict]) -> str:
    """The results as a table."""
    lines = [
        "| utterances | opening, s | first batch, s | memory then, MB | with all shards open, MB | index file, MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['utterances']:,} | {row['open_seconds']:.2f} | {row['first_batch_seconds']:.2f} "
            f"| {row['first_batch_megabytes']:.0f} | {row['all_shards_megabytes']:.0f} "
            f"| {row['index_megabytes']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--utterances", type=int, nargs="+", default=[10**4, 10**5, 10**6], help="sizes")
    parser.add_argument("--shards", type=int, default=256, help="files of each dataset (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure_here(options.measure, options.shards)))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="memo-jax-benchmark-") as folder:
        for count in options.utterances:
            dataset = Path(folder) / str(count)
            dataset.mkdir()
            write_small_dataset(dataset, count, options.shards)
            command = [sys.executable, __file__, "--measure", dataset, "--shards", str(options.shards)]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    print(as_json({"sizes": rows}) if options.json else table(rows))


if __name__ == "__main__":
    main()
