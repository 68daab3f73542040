r"""Packs speech small enough to travel with the repository: what experiments/accelerator.py takes as --data.

    python experiments/accelerator_data.py DATA --train DATASET --test DATASET --trials FILE
        [--noise DIR] [--music DIR] [--rirs DIR] [--megabytes 60] [--seed 0]

DATA, a new folder, gets `train` and `test`, each with some utterances of the given dataset (by `memo-jax prepare`),
`trials.txt`, with all trials among those of `test`, and the folders `noise`, `music` and `rirs` of what is given: at
most `--megabytes` (10⁶ bytes) in all. Noise, music and rooms get a twentieth each, the test a quarter, and training
what is left. An hour of speech is 115 MB. What is taken is drawn at random, by the seed.
"""

import argparse
import itertools
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from memo_jax import config as configs
from memo_jax.audio import SAMPLE_RATE
from memo_jax.data.banks import MEGABYTE, load_banks
from memo_jax.data.batches import Utterances
from memo_jax.data.prepare import fingerprint_of
from memo_jax.data.records import MANIFEST, MANIFEST_COLUMNS, ShardWriter, read_manifest, write_metadata
from memo_jax.data.trial_lists import write_trials
from memo_jax.log import plural
from memo_jax.scoring.trials import read_trials, recording_rows

TRAINING_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "study_full.py"
BANKS = ("noise", "music", "rirs")
BANK_SHARE, TEST_SHARE = 0.05, 0.25
# Beside its samples an utterance has names and checksums, in its record and in the manifest, and a dataset its metadata
# and a shard that is padded to a multiple of 64 kB.
UTTERANCE_BYTES, DATASET_BYTES = 1_000, 80_000


def pack(output: Path, train: Path, test: Path, trials: Path, banks: dict[str, Path], megabytes: float, seed: int):
    """Writes the package whole or not at all; returns how many of each it has.

    Raises:
      FileExistsError: there is something at `output`. FileNotFoundError: an input is missing.
      ValueError: an input is damaged, the trials are not of the test's recordings, or there is no room for one
        utterance to train on, for a trial of each kind, or for one row of a bank.
    """
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists already: choose another folder, or remove it")
    rng, limit = np.random.default_rng(seed), megabytes * MEGABYTE
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as folder:
        made = Path(folder) / "data"
        made.mkdir()
        share = BANK_SHARE * megabytes
        counts = {kind: write_bank(made / kind, source, share, seed) for kind, source in banks.items()}
        counts |= write_test(made, Utterances(test), trials, TEST_SHARE * limit, rng)
        counts["train"] = write_train(made / "train", Utterances(train), limit - size_of(made), rng)
        if size_of(made) > limit:
            raise ValueError(f"the package has {size_of(made) / MEGABYTE:.1f} MB: give --megabytes a smaller number")
        made.rename(output)
    return counts


def write_bank(folder: Path, source: Path, megabytes: float, seed: int) -> int:
    """Writes rows of a bank as recordings, as long and as many as training would take; returns their number."""
    settings = configs.load_config(TRAINING_CONFIG).augment
    lengths = {"seconds": settings.bank_seconds, "rir_seconds": settings.rir_seconds}
    (rows,) = load_banks(**{folder.name: source}, **lengths, max_megabytes=megabytes, seed=seed).values()
    folder.mkdir()
    for number, row in enumerate(rows):
        subtype = "PCM_16" if row.dtype == np.int16 else "FLOAT"
        soundfile.write(folder / f"{number:05d}.wav", row, SAMPLE_RATE, subtype=subtype)
    return len(rows)


def write_test(folder: Path, utterances: Utterances, path: Path, budget: float, rng) -> dict[str, int]:
    """Writes folder/test and folder/trials.txt; returns how many recordings and trials these have.

    Trials are taken in random order, one of each kind in turn, with their recordings, as long as there is room. Those
    of other trials among the same recordings cost nothing.
    """
    trials = read_trials(path)
    trials.require_both_kinds()
    rows = recording_rows(trials, utterances.names)
    sizes, room, chosen = stored_bytes(utterances)[rows], budget - DATASET_BYTES, set()
    kinds = (rng.permutation(np.flatnonzero(trials.target == kind)) for kind in (True, False))
    for trial in filter(lambda number: number is not None, itertools.chain(*itertools.zip_longest(*kinds))):
        new = set(trials.pairs[trial].tolist()) - chosen
        room -= sum(sizes[recording] for recording in new)
        if room < 0:
            break
        chosen |= new
    kept = np.flatnonzero(np.isin(trials.pairs, list(chosen)).all(axis=1))
    if not 0 < trials.target[kept].sum() < len(kept):
        raise ValueError(f"there is no room for a trial of each kind of {path}: give --megabytes a larger number")
    write_dataset(folder / "test", utterances, rows[sorted(chosen)])
    write_trials(folder / "trials.txt", [(trials.target[i], trials.enrol[i], trials.test[i]) for i in kept])
    return {"test": len(chosen), "trials": len(kept)}


def write_train(folder: Path, utterances: Utterances, budget: float, rng) -> int:
    """Writes as many utterances as there is room for; returns their number."""
    order = rng.permutation(len(utterances))
    fits = np.cumsum(stored_bytes(utterances)[order]) <= budget - DATASET_BYTES
    if not fits.any():
        raise ValueError(f"there is no room for an utterance of {utterances.path}: give --megabytes a larger number")
    write_dataset(folder, utterances, np.sort(order[fits]))
    return int(fits.sum())


def write_dataset(folder: Path, utterances: Utterances, rows: np.ndarray) -> None:
    """Writes some utterances of a dataset as a dataset of their own, in their order."""
    folder.mkdir()
    manifest = read_manifest(utterances.path)
    lines = [[manifest[column][row] for column in MANIFEST_COLUMNS] for row in rows]
    writer = ShardWriter(folder / "shard")
    for row, (name, speaker, *_) in zip(rows, lines, strict=True):
        writer.write(name, speaker, utterances[row])
    text = "".join("\t".join(line) + "\n" for line in [MANIFEST_COLUMNS, *lines])
    (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
    seconds = float(utterances.seconds[rows].sum())
    metadata = {"fingerprint": fingerprint_of(lines), "utterances": len(rows), "seconds": seconds}
    write_metadata(folder, [writer.close()], metadata)


def stored_bytes(utterances: Utterances) -> np.ndarray:
    """How many bytes each utterance takes in a dataset, at most: int64 [len(utterances)]."""
    return 2 * utterances.lengths + UTTERANCE_BYTES


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="DATA", help="folder to make")
    parser.add_argument("--train", type=Path, required=True, metavar="DATASET", help="to train on")
    parser.add_argument("--test", type=Path, required=True, metavar="DATASET", help="with the recordings of the trials")
    parser.add_argument("--trials", type=Path, required=True, metavar="FILE", help="trial list, with labels")
    for kind in BANKS:
        parser.add_argument(f"--{kind}", type=Path, metavar="DIR", help=f"folder for augment.{kind}")
    parser.add_argument("--megabytes", type=float, default=60.0, help="of all of it, at most (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = build_parser().parse_args(arguments)
    banks = {kind: folder for kind in BANKS if (folder := getattr(options, kind))}
    inputs = options.train, options.test, options.trials, banks
    try:
        counts = pack(options.output, *inputs, options.megabytes, options.seed)
    except (OSError, ValueError) as error:
        print(f"accelerator_data.py: error: {error}", file=sys.stderr)
        return 2
    nouns = {"train": "utterance", "test": "recording", "trials": "trial"}
    said = [f"{kind}: {plural(count, nouns.get(kind, 'row'))}" for kind, count in counts.items()]
    print(f"{options.output}: {size_of(options.output) / MEGABYTE:.1f} MB; {', '.join(said)}")
    if counts["train"] < (batch := configs.load_config(TRAINING_CONFIG).data.batch_size):
        fitting = counts["train"] // 8 * 8 or counts["train"]  # that up to eight devices can share
        print(f"fewer than a batch of {batch}: give accelerator.py --config.data.batch_size={fitting}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
