"""Inputs of the benchmarks: datasets of speech-like sound, and batches and banks of noise.

Datasets are made in seconds, and are as long and about as compressible as speech. Batches and banks are noise: the time
of a step does not depend on their content.
"""

import numpy as np

from memo_jax.audio import SAMPLE_RATE
from memo_jax.data.records import SEGMENT_SAMPLES, ShardWriter, write_metadata
from memo_jax.log import progress
from memo_jax.training.recipe import batch_crops

SHORTEST_SECONDS = 4.0  # of VoxCeleb's utterances
SECONDS_OF_BANKS = 6.0


def speech_like(rng, seconds: float) -> np.ndarray:
    """int16 [L]: harmonics of a wandering pitch and noise, in syllables and pauses."""
    count = round(seconds * SAMPLE_RATE)
    time = np.arange(count) / SAMPLE_RATE
    slow = np.linspace(0, count - 1, max(int(seconds * 4), 2))  # four values a second: syllables
    pitch = np.interp(np.arange(count), slow, rng.uniform(90, 220) * (1 + 0.1 * rng.normal(size=len(slow))))
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    loudness = np.interp(np.arange(count), slow, rng.uniform(0, 1, len(slow)) ** 3)
    voice = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 16))
    noise = rng.normal(size=count) * (0.3 + 0.3 * np.sin(2 * np.pi * 3 * time))
    return (3000 * loudness * (voice + noise) + 8 * rng.normal(size=count)).astype(np.int16)


def utterance_lengths(rng, count: int, mean_seconds: float) -> np.ndarray:
    """Samples of utterances like VoxCeleb's: at least 4 s (or the half of a mean below 8 s), the rest exponential."""
    shortest = min(SHORTEST_SECONDS, mean_seconds / 2)
    seconds = shortest + rng.exponential(mean_seconds - shortest, count)
    return np.rint(seconds * SAMPLE_RATE).astype(np.int64)


def cuts(rng, lengths):
    """Yields int16 [L] for each length: parts of a few longer sounds, so that a million takes no time."""
    sounds = [speech_like(rng, 20 + max(lengths) / SAMPLE_RATE) for _ in range(4)]
    for length in lengths:
        sound = sounds[rng.integers(len(sounds))]
        start = rng.integers(len(sound) - length + 1)
        yield sound[start : start + length]


def write_dataset(folder, utterances, count: int, *, shards: int = 8, segment_samples: int = SEGMENT_SAMPLES) -> None:
    """Writes `count` arrays int16 [L] from an iterable as a dataset that `data.Utterances` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    written, writer, per_shard = [], None, -(-count // shards)
    for number, samples in enumerate(progress(utterances, total=count, label="write", unit="utterance")):
        if number % per_shard == 0:
            if writer is not None:
                written.append(writer.close())
            writer = ShardWriter(folder / f"shard-{number}", segment_samples)
        writer.write(f"id{number // 200:05d}/{number % 200 // 10:011d}/{number % 10:05d}.wav", "", samples)
    written.append(writer.close())
    write_metadata(folder, written, {"fingerprint": f"synthetic {count}", "utterances": count})


def example_batch(config, seed=0):
    """Returns int16 crops of noise of the config's numbers and lengths; with positives, those of partners, too."""
    rng = np.random.default_rng(seed)
    return {
        kind: rng.integers(-3000, 3000, (config.data.batch_size, *shape), dtype=np.int16)
        for kind, shape in batch_crops(config, config.positives.clusters > 0).items()
    }


def example_banks(seed=0):
    """Returns banks of noise, music and rooms as small as fit a benchmark."""
    rng = np.random.default_rng(seed)
    noises = {
        kind: rng.integers(-3000, 3000, (32, round(SECONDS_OF_BANKS * SAMPLE_RATE)), dtype=np.int16)
        for kind in ("noise", "music")
    }
    decay = np.exp(-np.arange(8000) / 800)
    return noises | {"rir": (rng.normal(size=(32, 8000)) * decay).astype(np.float32)}
