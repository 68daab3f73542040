"""Applies a function of batches to recordings of any length: buckets of similar length, padding, windows."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from memo_jax.audio import SAMPLE_RATE
from memo_jax.log import progress

SHORTEST_BUCKET = SAMPLE_RATE  # samples
BUCKET_STEP = 160  # samples; lengths of buckets are multiples of it, the hop of the front ends
COARSE_GROWTH = 2**0.5  # from bucket to bucket: a few recordings need only a few compiled shapes
FINE_GROWTH = 2**0.125  # for lengths that have filled FINE_FROM batches: about a twentieth of the frames is padding
FINE_FROM = 12  # batches, after which less padding saves more time than compiling another program costs
CPU_BATCH_SECONDS = 16.0  # of padded speech in a batch: more would not fit a CPU's caches
BATCH_SECONDS = 64.0  # on other devices: keeps them busy and fits their memory
LONGEST_SECONDS = 120.0  # longest window: a network's memory grows with the length

WaveFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]  # int16 waves [N, L], lengths [N] → rows [N, D]


def bucket_length(samples: int, growth: float = FINE_GROWTH) -> int:
    """Returns the padded length, in samples, of an utterance; from bucket to bucket the length grows by `growth`."""
    length = SHORTEST_BUCKET
    while length < samples:
        length = -(-int(length * growth) // BUCKET_STEP) * BUCKET_STEP
    return length


def windows(wave: np.ndarray) -> list[np.ndarray]:
    """Splits a recording into the fewest equal windows of at most LONGEST_SECONDS, usually a single window."""
    count = -(-len(wave) // round(LONGEST_SECONDS * SAMPLE_RATE))
    return np.array_split(wave, max(count, 1))


def apply_to_recordings(
    function: WaveFunction,
    waves: Sequence[np.ndarray],
    rows: Iterable[int] | None = None,
    label: str = "embedding",
    quiet: bool = False,
) -> np.ndarray:
    """Applies a function to whole recordings; returns its rows, float32 [N, D], in the order of the recordings.

    Args:
      function: of int16 waves [N, L], padded with zeros, and their lengths [N].
      waves: int16 arrays [L] of at least one sample; each is read once, and few are in memory at a time.
      rows: indices of the recordings to use; all by default.
      label: text of the progress bar.
      quiet: show no progress.
    """
    rows = list(range(len(waves)) if rows is None else rows)
    stream = apply_to_stream(function, ((position, waves[row]) for position, row in enumerate(rows)))
    found = dict(progress(stream, len(rows), label, "recording", active=not quiet))
    return np.stack([found[position] for position in range(len(rows))])


def apply_to_stream(
    function: WaveFunction, waves: Iterable[tuple[int, np.ndarray]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (key, row float32 [D]) for every (key, int16 wave [L]), in any order.

    Recordings wait in buckets of similar length until a batch is full, so memory is bounded however many there are.
    Frequent lengths get finer buckets; what is left at the end shares a few batches. A recording longer than
    LONGEST_SECONDS yields the mean of its windows' rows.
    """
    if hasattr(function, "stream"):  # `runtime.OnnxFunction` takes recordings one by one
        yield from function.stream(waves)
        return
    import jax  # imported late: networks run by onnxruntime need no JAX

    seconds = CPU_BATCH_SECONDS if jax.default_backend() == "cpu" else BATCH_SECONDS
    waiting: dict[int, list[tuple[int, np.ndarray]]] = {}
    unfinished: dict[int, list[np.ndarray]] = {}
    parts: dict[int, int] = {}
    compiled: set[int] = set()  # lengths that had a full batch
    seen: collections.Counter[int] = collections.Counter()  # windows by the length of their fine bucket

    def full(length):
        return max(1, round(seconds * SAMPLE_RATE / length))

    def run(length, batch, size):
        padded, true = np.zeros((size, length), np.int16), np.ones(size, np.int32)  # unused rows count as one sample
        for i, (_, wave) in enumerate(batch):
            padded[i, : len(wave)], true[i] = wave, len(wave)
        result = np.asarray(function(padded, true), np.float32)
        for (key, _), row in zip(batch, result):
            done = unfinished.setdefault(key, [])
            done.append(row)
            if len(done) == parts[key]:
                yield key, np.mean(unfinished.pop(key), axis=0) if parts.pop(key) > 1 else row

    for key, wave in waves:
        cut = windows(wave)
        parts[key] = len(cut)
        for window in cut:
            length = bucket_length(len(window))
            seen[length] += 1
            if seen[length] <= FINE_FROM * full(length):
                length = bucket_length(len(window), COARSE_GROWTH)
            waiting.setdefault(length, []).append((key, window))
            if len(waiting[length]) == full(length):
                compiled.add(length)
                yield from run(length, waiting.pop(length), full(length))
    left: dict[int, list[tuple[int, np.ndarray]]] = {}
    for key, window in itertools.chain.from_iterable(waiting.values()):
        known = (length for length in compiled if length >= len(window))
        left.setdefault(min([bucket_length(len(window), COARSE_GROWTH), *known]), []).append((key, window))
    lengths = sorted(left)
    for length, longer in itertools.zip_longest(lengths, lengths[1:]):
        batches = [left[length][i : i + full(length)] for i in range(0, len(left[length]), full(length))]
        # The last batch joins those of the next longer length if there is room: one shape fewer to compile.
        if longer and longer <= 2 * length and len(batches[-1]) + len(left[longer]) <= full(longer):
            left[longer].extend(batches.pop())
        size = full(length)
        if batches and length not in compiled:
            size = min(size, 1 << (len(batches[0]) - 1).bit_length())
        for batch in batches:
            yield from run(length, batch, size)
