"""Recordings of any length to embeddings, in batches of similar length."""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memo_jax import features
from memo_jax.log import progress
from memo_jax.models import Branch

SHORTEST_BUCKET = features.SAMPLE_RATE  # samples
BUCKET_GROWTH = 2**0.5  # few shapes to compile, and less than a sixth of the frames are padding on average
BATCH_SECONDS = 64.0  # of padded speech in a batch: enough to fill the cores, little enough for any machine

WaveFunction = Callable[[jax.Array, jax.Array], jax.Array]  # int16 waves [N, L], lengths [N] → rows [N, D]


def bucket_length(samples: int) -> int:
    """Returns the padded length, in samples, of an utterance of that length."""
    length = SHORTEST_BUCKET
    while length < samples:
        length = -(-int(length * BUCKET_GROWTH) // features.HOP) * features.HOP
    return length


def log_mel_of_waves(waves: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mel power [N, T, F] of int16 waves [N, L] and the frames [N] that are theirs."""
    return features.mel_power(waves.astype(jnp.float32) / 32768, lengths), features.frame_count(lengths)


def embedding_function(branch: Branch, variables) -> WaveFunction:
    """Returns the compiled function from waves to the branch's embeddings in evaluation mode."""
    return functools.partial(_embed, branch, variables)


# Of the module, so that each evaluation of a training run finds what the first one compiled.
@functools.partial(jax.jit, static_argnums=0)
def _embed(branch: Branch, variables, waves: jax.Array, lengths: jax.Array) -> jax.Array:
    mel, frames = log_mel_of_waves(waves, lengths)
    return branch.apply(variables, features.normalized_log_mel(mel, frames), frames, method="embed")


@jax.jit
def log_mel_statistics(waves: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns mean and deviation over time of the log-mel frames, [N, 2F]: the channel baseline."""
    mel, frames = log_mel_of_waves(waves, lengths)
    return features.log_mel_statistics(mel, frames)


def apply_to_recordings(
    function: WaveFunction, waves: Sequence[np.ndarray], rows: Iterable[int] | None = None, label: str = "embedding",
    quiet: bool = False,
) -> np.ndarray:
    """Returns what `function` gives for full recordings, [N, D] float32 in their order.

    Args:
      function: of int16 waves [N, L], padded with zeros, and their lengths [N].
      waves: int16 arrays [L], at least one sample each; only lengths (from `waves.lengths` where there is such an
        array) and one batch are in memory at a time.
      rows: which of them; all by default.
      quiet: show no progress.
    """
    rows = list(range(len(waves)) if rows is None else rows)
    lengths = waves.lengths[rows] if hasattr(waves, "lengths") else np.array([len(waves[row]) for row in rows])
    buckets: dict[int, list[int]] = {}
    for position, samples in enumerate(lengths):
        buckets.setdefault(bucket_length(int(samples)), []).append(position)
    batches = []
    for length, positions in sorted(buckets.items()):
        size = max(1, round(BATCH_SECONDS * features.SAMPLE_RATE / length))
        batches += [(length, size, positions[i : i + size]) for i in range(0, len(positions), size)]

    out = None
    for length, size, positions in progress(batches, label=label, unit="batch", active=not quiet):
        # A batch that is not full is filled with one-sample recordings, so that each length compiles once.
        padded, true = np.zeros((size, length), np.int16), np.ones(size, np.int32)
        for i, position in enumerate(positions):
            wave = waves[rows[position]]
            padded[i, : len(wave)], true[i] = wave, len(wave)
        result = np.asarray(function(padded, true), np.float32)[: len(positions)]
        if out is None:
            out = np.empty((len(rows), result.shape[1]), np.float32)
        out[positions] = result
    return out
