"""Memory and time that `memo-jax prepare` needs to find the recordings of a corpus laid out as VoxCeleb2.

    python experiments/benchmarks/listing.py [--recordings 1092009] [--json]

Makes that many empty files in a folder, and as many members of a zip, a tar and a compressed tar, in a temporary
folder; lists each in a process of its own; then writes the plan that a resumed run reads, and reads it. Nothing is
decoded.
"""

import argparse
import io
import json
import os
import random
import string
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

KINDS = {"folder": "corpus", "zip": "corpus.zip", "tar": "corpus.tar", "tar.gz": "corpus.tar.gz"}
MEASURED = '''
import json, sys, time
from pathlib import Path
from memo_jax.data.recordings import find_recordings
from memo_jax.data.unfinished import Unfinished

def megabytes():
    """The most that this program had; ru_maxrss would count the process that it was started from."""
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

before, start = megabytes(), time.perf_counter()
recordings, left_out = find_recordings([sys.argv[1]])
listed, peak = time.perf_counter() - start, megabytes() - before
unfinished = Unfinished(Path(sys.argv[1] + ".dataset"))
unfinished.begin({"run_commands": False}, recordings, left_out)
count, start = len(recordings), time.perf_counter()
del recordings
assert len(unfinished.plan()[1]) == count
print(json.dumps({"recordings": count, "list_seconds": listed, "list_megabytes": peak,
                  "read_plan_seconds": time.perf_counter() - start}))
unfinished.discard()
'''


def names(count: int):
    """Yields names as in VoxCeleb2: about 180 utterances of a speaker, 8 of a video."""
    rng, characters = random.Random(0), string.ascii_letters + string.digits + "-_"
    for number in range(count):
        if number % 8 == 0:
            video = "".join(rng.choices(characters, k=11))
        yield f"id{number // 184:05d}/{video}/{number % 8:05d}.m4a"


def write_corpus(folder: Path, count: int) -> None:
    """Writes the corpus in all forms below `folder`."""
    for name in names(count):
        path = os.path.join(folder, KINDS["folder"], name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT))
    with zipfile.ZipFile(folder / KINDS["zip"], "w") as archive:
        for name in names(count):
            archive.writestr(name, b"x")
    for kind, mode in (("tar", "w"), ("tar.gz", "w:gz")):
        with tarfile.open(folder / KINDS[kind], mode) as archive:
            for name in names(count):
                info = tarfile.TarInfo(name)
                info.size = 1
                archive.addfile(info, io.BytesIO(b"x"))
                archive.members.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recordings", type=int, default=1_092_009)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_corpus(Path(folder), options.recordings)
        print(f"made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for kind in options.kinds:
            done = subprocess.run(
                [sys.executable, "-c", MEASURED, os.path.join(folder, KINDS[kind])],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            results[kind] = json.loads(done.stdout)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for kind, row in results.items():
        print(
            "{:7} {recordings:,} recordings: {list_seconds:.1f} s, {list_megabytes:.0f} MB; plan read in "
            "{read_plan_seconds:.1f} s".format(kind, **row)
        )


if __name__ == "__main__":
    main()
