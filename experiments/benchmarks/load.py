"""Utterances per second and core that reach training: ours, beside a PyTorch DataLoader of the usual kind.

    python experiments/benchmarks/load.py [--data DATASET] [--json]

Ours reads array_record shards and yields batches of int16 crops; augmentation and log-mel are left to the device.
Theirs does on the host what the authors of MeMo do: reads wav files with scipy, cuts crops, adds noise at a
signal-to-noise ratio, convolves with room impulse responses, and takes the log-mel in PyTorch. A third line is theirs
without augmentation and log-mel: the same work as ours.

An utterance yields 2 crops of 4 s and 4 of 2 s. Every library has one thread. Rates are per CPU-second of all processes
of a loader, so that other work on the machine changes them little; wall time is beside them. Each loader is compared at
the number of workers that suits it best. Files are in the operating system's cache: a disk must deliver about 32 kB for
each second of an utterance. Needs torch (`pip install 'memo-jax[torch]'`), except with --ours-only.
"""

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402

from memo_jax.files import as_json

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

RATE = 16000
CROPS = {"global": (2, 4 * RATE), "local": (4, 2 * RATE)}
NOISE_SHARE, BOTH_SHARE, CLEAN_SHARE = 3 / 8, 1 / 3, 1 / 6  # the rest is reverberation alone
SNR_DB = (0, 15)


class WavUtterances:
    """What the authors' data set does with an utterance: `dataset[i]` → {"global": [2, …], "local": [4, …]}.

    With `features`: augmented log-mel, float32 [crops, 80, frames]. Without: int16 crops, nothing more.
    """

    def __init__(self, folder: Path, features: bool):
        self.speech, self.noises, self.rooms = (
            sorted(map(str, (folder / name).iterdir())) for name in ("speech", "noise", "rooms")
        )
        self.features = features

    def __len__(self):
        return len(self.speech)

    def __getitem__(self, index):
        from scipy.io import wavfile

        samples, rng = wavfile.read(self.speech[index])[1], np.random.default_rng()
        crops = {
            name: np.stack([crop_of(samples, size, rng) for _ in range(count)]) for name, (count, size) in CROPS.items()
        }
        if not self.features:
            return crops
        return {
            name: np.stack([log_mel(self.augmented(crop.astype(np.float32) / 32768, rng)) for crop in several])
            for name, several in crops.items()
        }

    def augmented(self, wave, rng):
        """The crop, float32 [L], with noise, a room, both or neither."""
        from scipy import signal
        from scipy.io import wavfile

        draw = rng.random()
        if draw < CLEAN_SHARE:
            return wave
        if draw >= CLEAN_SHARE + NOISE_SHARE:
            room = wavfile.read(self.rooms[rng.integers(len(self.rooms))])[1].astype(np.float32)
            wave = signal.fftconvolve(wave, room / np.sqrt((room**2).sum()))[: len(wave)].astype(np.float32)
        if draw < CLEAN_SHARE + NOISE_SHARE + BOTH_SHARE:
            noise = wavfile.read(self.noises[rng.integers(len(self.noises))])[1]
            noise = crop_of(noise, len(wave), rng).astype(np.float32)
            gain = np.sqrt((wave**2).mean() / (noise**2).mean() / 10 ** (rng.uniform(*SNR_DB) / 10))
            wave = wave + gain * noise
        return wave


def crop_of(samples, size: int, rng):
    """A random part, [size], of samples that are repeated when they are too few."""
    samples = np.resize(samples, max(size, len(samples)))
    start = rng.integers(len(samples) - size + 1)
    return samples[start : start + size]


def log_mel(wave) -> np.ndarray:
    """float32 [80, frames]: log of the power in 80 mel bands, windows of 25 ms every 10 ms, normalised over time."""
    import torch

    window, filters = mel_constants()
    spectrum = torch.stft(torch.from_numpy(wave), 512, 160, 400, window, return_complex=True)
    bands = torch.log(filters @ spectrum.abs().square() + 1e-6)
    deviation, mean = torch.std_mean(bands, dim=1, correction=0, keepdim=True)
    return ((bands - mean) / (deviation + 1e-5)).numpy()


_constants = []


def mel_constants():
    """(window [400], filters [80, 257]), made once in each process."""
    if not _constants:
        import torch

        torch.set_num_threads(1)
        edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82) / 2595) - 1)
        rising = (np.linspace(0, 8000, 257) - edges[:-1, None]) / np.diff(edges)[:, None]
        filters = np.clip(np.minimum(rising[:-1], 1 - rising[1:]), 0, None)
        _constants.extend((torch.hann_window(400), torch.from_numpy(filters.astype(np.float32))))
    return _constants


def write_wavs(folder: Path, dataset: Path, rng) -> None:
    """Writes a dataset's utterances as wav files, and files of noise (5 to 60 s) and rooms (0.5 s) to augment with."""
    from scipy.io import wavfile

    from memo_jax.data.batches import Utterances
    from memo_jax.log import progress

    for name in ("speech", "noise", "rooms"):
        (folder / name).mkdir(parents=True)
    for number, samples in enumerate(progress(Utterances(dataset), label="write wav", unit="utterance")):
        wavfile.write(folder / "speech" / f"{number:07d}.wav", RATE, samples)
    for number, seconds in enumerate(rng.uniform(5, 60, 20)):
        noise = rng.normal(0, 2000, round(seconds * RATE))
        wavfile.write(folder / "noise" / f"{number}.wav", RATE, noise.astype(np.int16))
        decay = np.exp(-np.arange(RATE // 2) / rng.uniform(800, 3000))
        room = 8000 * decay * rng.normal(size=RATE // 2)
        wavfile.write(folder / "rooms" / f"{number}.wav", RATE, room.astype(np.int16))


def cpu_seconds() -> float:
    """CPU seconds so far of this process and its living workers."""
    total, tick = time.process_time(), os.sysconf("SC_CLK_TCK")
    for process in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def measure(name: str, batches, batch_size: int, seconds: float) -> dict:
    """Takes batches for some seconds, after two for warming up; returns utterances per second."""
    from memo_jax.log import Progress

    for _ in range(2):
        next(batches)
    taken, began, began_cpu = 0, time.perf_counter(), cpu_seconds()
    with Progress(None, name, "utterance") as shown:
        while (wall := time.perf_counter() - began) < seconds or taken < 2:
            next(batches)
            taken += 1
            shown.update(batch_size)
    taken *= batch_size
    return {"per_second_per_core": taken / (cpu_seconds() - began_cpu), "per_second": taken / wall, "utterances": taken}


def measure_ours(dataset: Path, batch_size: int, workers: int, seconds: float) -> dict:
    """Rates of `training_batches`."""
    from memo_jax.data.batches import training_batches

    with contextlib.closing(training_batches(dataset, batch_size=batch_size, seed=0, workers=workers)) as batches:
        return measure(f"ours, {workers} workers", batches, batch_size, seconds)


def measure_theirs(folder: Path, features: bool, batch_size: int, workers: int, seconds: float) -> dict:
    """Rates of a DataLoader over wav files."""
    import torch

    torch.set_num_threads(1)
    dataset = WavUtterances(folder, features)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**9)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=True,
        multiprocessing_context="spawn" if workers else None,
    )
    iterator = iter(loader)
    try:
        return measure(f"theirs{'' if features else ', crops only'}, {workers} workers", iterator, batch_size, seconds)
    finally:
        del iterator  # ends its workers


def table(results: dict) -> str:
    """The results as a table."""
    lines = ["| loader | workers | utterances a second a core | a second of wall time |", "|---|---|---|---|"]
    for row in results["rows"]:
        lines.append(
            f"| {row['loader']} | {row['workers']} | {row['per_second_per_core']:,.0f} | {row['per_second']:,.0f} |"
        )
    if "ratio" in results:
        lines += [
            "",
            f"ours / theirs, per core: {results['ratio']:.0f}; doing the same work: {results['ratio_crops_only']:.1f}",
        ]
    return "\n".join(lines)


def main() -> int:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, metavar="DATASET", help="made by memo-jax prepare (default: made here)")
    parser.add_argument("--utterances", type=int, default=1000, help="of the dataset made here (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="their mean length (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="worker processes (default: %(default)s)")
    parser.add_argument("--measure-seconds", type=float, default=10.0, help="per row (default: %(default)s)")
    parser.add_argument("--ours-only", action="store_true", help="without PyTorch")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if not options.ours_only and importlib.util.find_spec("torch") is None:
        print(
            "load.py compares with PyTorch, which is not installed: pip install 'memo-jax[torch]' (or pip install "
            "torch), or measure ours alone with --ours-only",
            file=sys.stderr,
        )
        return 2
    from synthetic import cuts, utterance_lengths, write_dataset

    rng, size = np.random.default_rng(0), options.batch_size
    with tempfile.TemporaryDirectory(prefix="memo-jax-benchmark-") as folder:
        folder = Path(folder)
        dataset = options.data or folder / "dataset"
        if not options.data:
            lengths = utterance_lengths(rng, options.utterances, options.seconds)
            write_dataset(dataset, cuts(rng, lengths), options.utterances)
        rows = [
            {"loader": "ours", "workers": workers} | measure_ours(dataset, size, workers, options.measure_seconds)
            for workers in sorted({0, options.workers})
        ]
        if not options.ours_only:
            write_wavs(folder / "wav", dataset, rng)
            rows += [
                {"loader": name, "workers": workers}
                | measure_theirs(folder / "wav", features, size, workers, options.measure_seconds)
                for name, features in (("theirs", True), ("theirs, crops only", False))
                for workers in sorted({0, options.workers})
            ]
    rates = {}  # of each loader with the number of workers that suits it best
    for row in rows:
        rates[row["loader"]] = max(rates.get(row["loader"], 0), row["per_second_per_core"])
    results = {"utterances_per_second_per_core": rates["ours"], "batch_size": size, "rows": rows}
    if not options.ours_only:
        results |= {
            "theirs_per_second_per_core": rates["theirs"],
            "ratio": rates["ours"] / rates["theirs"],
            "ratio_crops_only": rates["ours"] / rates["theirs, crops only"],
        }
    print(as_json(results) if options.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
