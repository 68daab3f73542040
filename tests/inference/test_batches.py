"""Recordings of any length in batches: order, padding, windows, and what is read and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memo_jax import features
from memo_jax.audio import SAMPLE_RATE as RATE
from memo_jax.inference import batches
from memo_jax.inference.batches import COARSE_GROWTH, apply_to_recordings, apply_to_stream, bucket_length
from memo_jax.inference.network import embedding_function, statistics_of_waves
from memo_jax.models import build_backbone


class Counted(list):
    """Recordings that count how often each was read."""

    def __init__(self, waves):
        super().__init__(waves)
        self.reads = [0] * len(waves)

    def __getitem__(self, index):
        self.reads[index] += 1
        return super().__getitem__(index)


def waves_of(seconds, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(-9000, 9000, int(RATE * s)).astype(np.int16) for s in seconds]


def sums(waves, lengths):
    """Row: sum of the samples, length; thus an error of order, padding or length shows."""
    return np.stack([np.sum(waves, axis=1, dtype=np.float64), lengths], axis=1)


SECONDS = [0.5, 3.1, 1.0, 9.3, 0.01, 1.001, 30.0, 2.9, 1.0] + [0.7] * 80


def test_rows_come_in_the_order_of_the_recordings_whatever_their_batches():
    waves = waves_of(SECONDS)
    wanted = [[wave.sum(dtype=np.int64), len(wave)] for wave in waves]
    np.testing.assert_array_equal(apply_to_recordings(sums, waves, quiet=True), wanted)
    rows = [6, 0, 3, 3, 88]
    np.testing.assert_array_equal(apply_to_recordings(sums, waves, rows, quiet=True), [wanted[row] for row in rows])


def test_each_recording_is_read_once_and_others_not_at_all():
    waves = Counted(waves_of(SECONDS))
    got = apply_to_recordings(sums, waves, np.array([1, 4, 6]), quiet=True)
    np.testing.assert_array_equal(got[:, 1], [len(list.__getitem__(waves, row)) for row in (1, 4, 6)])
    assert [waves.reads[row] for row in (1, 4, 6)] == [1, 1, 1] and sum(waves.reads) == 3


def test_a_stream_is_read_as_it_is_needed_and_ends_with_every_key_once():
    """A batch is processed as soon as it is full, so that a stream of any length fits into memory."""
    read = []

    def stream():
        for key in range(200):
            read.append(key)
            yield key, np.ones(RATE, np.int16)

    rows = apply_to_stream(sums, stream())
    assert next(rows)[0] == 0 and len(read) == batches.CPU_BATCH_SECONDS
    assert sorted(key for key, _ in rows) == list(range(1, 200))


def test_a_long_recording_gives_the_mean_of_windows_of_equal_length():
    longest = round(batches.LONGEST_SECONDS * RATE)
    short, exact, long = (np.arange(n) % 7 for n in (RATE, longest, 2 * longest + 30))
    got = apply_to_recordings(sums, [wave.astype(np.int16) for wave in (short, exact, long)], quiet=True)
    np.testing.assert_array_equal(got[1], [exact.sum(), longest])
    np.testing.assert_allclose(got[2], [long.sum() / 3, (2 * longest + 30) / 3], rtol=1e-6)


def test_a_few_recordings_are_not_filled_up_to_a_full_batch():
    shapes = []

    def recorded(waves, lengths):
        shapes.append(waves.shape)
        return lengths[:, None]

    apply_to_recordings(recorded, waves_of([1.0] * 3 + [7.0]), quiet=True)
    assert shapes == [(4, RATE), (1, bucket_length(7 * RATE, COARSE_GROWTH))]


def test_a_few_recordings_of_similar_length_make_one_batch():
    """Typically both recordings of a comparison, so that one program is compiled or loaded for them."""
    shapes = []

    def recorded(waves, lengths):
        shapes.append(waves.shape)
        return sums(waves, lengths)

    waves = waves_of([5.0, 1.5, 3.0, 2.9])
    np.testing.assert_array_equal(apply_to_recordings(recorded, waves, quiet=True)[:, 1], [len(w) for w in waves])
    assert shapes == [(1, bucket_length(int(1.5 * RATE), COARSE_GROWTH)), (3, bucket_length(5 * RATE, COARSE_GROWTH))]


def test_batches_are_few_in_shape_bounded_in_size_and_hold_little_padding():
    """Hundreds of lengths yield some tens of shapes, and no batch holds much more padded speech than it should."""
    shapes = []

    def recorded(waves, lengths):
        shapes.append(waves.shape)
        assert (lengths >= 1).all() and (lengths <= waves.shape[1]).all()
        return lengths[:, None]

    waves = [np.ones(n, np.int16) for n in np.random.default_rng(0).integers(RATE, 20 * RATE, 3000)]
    apply_to_recordings(recorded, waves[:60], quiet=True)
    assert len(set(shapes)) <= 10, "few recordings are not worth many programs"
    shapes.clear()
    apply_to_recordings(recorded, waves, quiet=True)
    assert len(set(shapes)) <= 36 + 10
    assert max(rows * length for rows, length in shapes) <= 1.5 * batches.CPU_BATCH_SECONDS * RATE
    assert sum(rows * length for rows, length in shapes) <= 1.08 * sum(map(len, waves))


def test_a_bucket_holds_its_recording_with_little_room_to_spare():
    """Not shorter than the recording, a whole number of hops, above one second at most about 1.1 times as long."""
    for samples in [1, RATE - 1, RATE, RATE + 1, *np.random.default_rng(0).integers(1, 10**7, 500)]:
        length = bucket_length(int(samples))
        assert samples <= length and length % features.HOP == 0
        assert length == RATE or length <= 1.1 * samples + 2 * features.HOP
        assert bucket_length(length) == length


@pytest.fixture(scope="module")
def network():
    """An untrained ResNet of two channels, and its variables."""
    backbone = build_backbone("resnet", embedding_dim=8, base_channels=2, blocks=(1, 1, 1, 1))
    initial = jax.jit(functools.partial(backbone.init, train=True))
    return backbone, initial(jax.random.key(0), jnp.zeros((2, 32, 80)))


def test_a_recording_has_one_embedding_alone_or_padded_in_company(network):
    """Within 1e-5 of the norm. Alone is without any padding: the bucket is exactly its length."""
    function = embedding_function(*network)
    waves = waves_of([1.0, 0.62, 0.3])
    together = apply_to_recordings(function, waves, quiet=True)
    for wave, embedding in zip(waves, together):
        alone = np.asarray(function(wave[None], np.array([len(wave)], np.int32)))[0]
        assert np.abs(alone - embedding).max() <= 1e-5 * np.linalg.norm(alone)
    assert np.linalg.norm(together[0] - together[1]) > 1e-3 * np.linalg.norm(together[0])


def test_a_second_evaluation_compiles_nothing(network):
    """New weights of the same network, as every evaluation of a training run brings."""
    compiled = []
    backbone, variables = network
    waves = waves_of([1.0, 0.8])
    apply_to_recordings(embedding_function(backbone, variables), waves, quiet=True)
    variables = jax.tree.map(lambda leaf: 1.01 * leaf, variables)
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    try:
        again = backbone.clone()
        apply_to_recordings(embedding_function(again, variables), waves, quiet=True)
        assert not compiled
        jax.jit(lambda x: x * 3 + len(compiled))(jnp.ones(7))
        assert compiled, "the listener hears of compilations"
    finally:
        jax.monitoring.clear_event_listeners()


def test_log_mel_statistics_are_those_of_the_recording_without_its_padding():
    """Mean and deviation over its own frames, computed here in float64 from the definition of the log-mel."""
    waves = waves_of([1.0, 0.5])
    got = apply_to_recordings(statistics_of_waves, waves, quiet=True)
    for wave, row in zip(waves, got):
        power = np.asarray(features.mel_power(jnp.asarray(wave[None], jnp.float32) / 32768))[0]
        log_mel = np.log(power.astype(np.float64) + 1e-6)
        np.testing.assert_allclose(row, np.concatenate([log_mel.mean(axis=0), log_mel.std(axis=0)]), atol=2e-3)
