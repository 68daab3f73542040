"""Augmentation on the device: noise, music and speech at a signal-to-noise ratio, and reverberation, crop by crop.

Every draw for crop i comes from `fold_in(key, i)`: neither the size of the batch nor the number of devices changes it.
Banks of recordings are ordinary arguments: replicate them on every device and shard the waves by row. Then only babble
moves crops between devices.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from memo_jax.xla.sharding import each_device_its_rows

CATEGORIES = ("noise", "music", "speech")
SNR_DB = {"noise": (0.0, 15.0), "music": (5.0, 15.0), "speech": (13.0, 20.0)}
BABBLE_VOICES = 3

_SILENCE = 1e-12  # energy of a crop; a single int16 sample of 1 has 9e-10


def augment(
    key: jax.Array,
    waves: jax.Array,
    banks: Mapping[str, jax.Array],
    *,
    clean: float = 1 / 6,
    both: float = 1 / 3,
    reverb_share: float = 0.25,
    snr_db: Mapping[str, tuple[float, float]] = SNR_DB,
    babble_from_batch: bool = True,
    views: int = 1,
) -> jax.Array:
    """Returns the crops, each at random left clean, given one kind (reverberation or an added recording), or both.

    A share `clean` stays clean; with `clean=1`, whatever `both` is, the waves come back unchanged. If only one kind is
    available, all other crops get it; if none is, the waves come back unchanged. The category of an added
    recording is uniform over those available. In a crop with both kinds the recording is added to the reverberated
    speech, as a microphone in the room picks it up, and the SNR refers to the dry crop.

    Args:
      key: a jax.random key.
      waves: float [N, L] in [-1, 1].
      banks: any of "noise", "music", "speech" → int16 (or float in [-1, 1]) [recordings, S], and "rir" →
        float [responses, R]. A recording longer than a crop is cut at a random place, a shorter one is repeated.
      clean: share of crops left clean.
      both: share of crops given both kinds; the rest gets one kind.
      reverb_share: share of reverberation among the crops given one kind.
      snr_db: {category: (lowest, highest)}, the range of the uniform signal-to-noise ratio in dB.
      babble_from_batch: without a "speech" bank, add the crops of three other utterances of this batch instead. Only
        these crops then depend on their neighbours. It needs at least two utterances in the batch.
      views: crops of each utterance, in neighbouring rows: row i belongs to utterance i // views. Babble for an
        utterance never contains its own crops.

    Returns:
      float32 [N, L], not clipped.

    Raises:
      ValueError: shares outside [0, 1], a missing or reversed SNR range, or a bank with an unknown name, a wrong dtype
        or a wrong shape.
    """
    if waves.ndim != 2 or not jnp.issubdtype(waves.dtype, jnp.floating):
        raise ValueError(f"waves must be float [N, L] in [-1, 1], got {waves.dtype}{list(waves.shape)}")
    utterances = waves.shape[0] // views
    if utterances * views != waves.shape[0]:
        raise ValueError(f"a batch of {waves.shape[0]} crops cannot hold {views} views of every utterance")
    banks = {name: jnp.asarray(bank) for name, bank in banks.items()}
    babble = babble_from_batch and "speech" not in banks and utterances > 1
    categories = [name for name in CATEGORIES if name in banks or (name == "speech" and babble)]
    if clean == 1:
        both = 0.0
    _check(banks, categories, clean, both, reverb_share, snr_db)

    waves = waves.astype(jnp.float32)
    if clean == 1 or not (categories or "rir" in banks):
        return waves
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(waves.shape[0]))
    kind_keys, category_keys, source_keys, snr_keys, rir_keys = jax.vmap(jax.random.split, (0, None), 1)(keys, 5)

    reverberated, noisy = draw_kinds(
        kind_keys, clean, both, reverb_share, can_reverberate="rir" in banks, can_add=bool(categories)
    )
    out = waves
    if "rir" in banks:
        rows = jax.vmap(lambda k: jax.random.randint(k, (), 0, banks["rir"].shape[0]))(rir_keys)
        out = jnp.where(reverberated[:, None], reverberate(waves, banks["rir"][rows]), out)
    if categories:
        category = jax.vmap(lambda k: jax.random.randint(k, (), 0, len(categories)))(category_keys)
        low, high = jnp.array([snr_db[name] for name in categories], jnp.float32)[category].T
        snr = low + (high - low) * jax.vmap(jax.random.uniform)(snr_keys)
        added = jnp.zeros_like(waves)
        for number, name in enumerate(categories):
            if name in banks:
                source = draw_recordings(source_keys, banks[name], waves.shape[1])
            else:
                source = mix_babble(source_keys, waves, views)
            added = jnp.where((category == number)[:, None], source, added)
        out = jnp.where(noisy[:, None], add_at_snr(out, added, snr), out)
    return out


def draw_kinds(
    keys: jax.Array,
    clean: float,
    both: float,
    reverb_share: float,
    *,
    can_reverberate: bool = True,
    can_add: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Returns which crops are reverberated and which get an added recording, two bool [N].

    Args:
      keys: jax.random keys [N], one of each crop.
      clean: share of crops left clean.
      both: share of crops given both kinds; the rest gets one kind.
      reverb_share: share of reverberation among the crops given one kind.
      can_reverberate: whether there are room responses. Without them, all crops that are not clean get a recording.
      can_add: whether there is something to add. If not, all crops that are not clean are reverberated.
    """
    u, v = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(keys).T
    changed, with_both = u >= clean, u >= 1 - both
    if not (can_reverberate and can_add):
        return changed & can_reverberate, changed & can_add
    reverb_alone = v < reverb_share
    return changed & (with_both | reverb_alone), changed & (with_both | ~reverb_alone)


def add_at_snr(waves: jax.Array, noise: jax.Array, snr_db: jax.Array) -> jax.Array:
    """Returns waves [..., L] plus noise [..., L], scaled to 10 log10(wave's / noise's energy) = snr_db [...].

    Energies are sums over the whole crop. Where either is silent, the wave comes back unchanged.
    """
    signal, interference = _energy(waves), _energy(noise)
    audible = (signal > _SILENCE) & (interference > _SILENCE)
    gain = jnp.sqrt(signal / jnp.where(audible, interference, 1.0) * 10 ** (-snr_db[..., None] / 10))
    return waves + jnp.where(audible, gain, 0.0) * noise


def reverberate(waves: jax.Array, responses: jax.Array) -> jax.Array:
    """Returns waves [N, L], each convolved with its room impulse response [N, R], cut to L samples, energy kept.

    The delay of the direct sound stays. Where no reverberated sound falls within the L samples (a silent crop or
    response, a delay beyond the end), the wave comes back unchanged.
    """
    responses = responses[:, : waves.shape[1]].astype(jnp.float32)
    wet = _convolve(waves.astype(jnp.float32), responses)
    dry_energy, wet_energy = _energy(waves), _energy(wet)
    # Otherwise the rounding errors of the transform would be amplified to the energy of the input.
    audible = wet_energy > 1e-8 * dry_energy * _energy(responses)
    return jnp.where(audible, wet * jnp.sqrt(dry_energy / jnp.where(audible, wet_energy, 1.0)), waves)


def draw_recordings(keys: jax.Array, bank: jax.Array, samples: int) -> jax.Array:
    """Returns, for each key [N], a random recording of the bank [n, S] from a random offset, float32 [N, samples]."""
    bank = jnp.asarray(bank)
    rows, length = bank.shape

    def draw(key):
        row_key, place_key = jax.random.split(key)
        row = jax.random.randint(row_key, (), 0, rows)
        if length >= samples:
            place = jax.random.randint(place_key, (), 0, length - samples + 1)
            return jax.lax.dynamic_slice(bank, (row, place), (1, samples))[0]
        place = jax.random.randint(place_key, (), 0, length)
        repeated = jnp.tile(bank[row], -(-samples // length) + 1)
        return jax.lax.dynamic_slice(repeated, (place,), (samples,))

    drawn = jax.vmap(draw)(keys)
    scale = 1 / 32768 if drawn.dtype == jnp.int16 else 1.0
    return drawn.astype(jnp.float32) * scale


def mix_babble(keys: jax.Array, waves: jax.Array, views: int = 1) -> jax.Array:
    """Returns, for each crop [N, L], the sum of crops of three other utterances (fewer in tiny batches), [N, L].

    Row i belongs to utterance i // views; view v is mixed with views v of the others.
    """
    waves = jnp.asarray(waves)
    utterances = waves.shape[0] // views
    voices = min(BABBLE_VOICES, utterances - 1)
    # Each voice is a number of utterances ahead, drawn from one of three disjoint ranges (1 … a, a+1 … b,
    # b+1 … utterances-1): never the utterance itself, and never the same one twice.
    edges = [1 + (utterances - 1) * voice // voices for voice in range(voices + 1)]
    low, high = jnp.array(edges[:-1]), jnp.array(edges[1:])
    steps = jax.vmap(lambda k: jax.random.randint(k, (voices,), low, high))(keys)
    rows = (jnp.arange(waves.shape[0])[:, None] + steps * views) % waves.shape[0]
    return sum(waves[rows[:, voice]] for voice in range(voices))


def _energy(x):
    """Returns the sum of squares over the last axis, which stays as an axis of size one."""
    return jnp.sum(jnp.square(x), axis=-1, keepdims=True)


@each_device_its_rows
def _convolve(waves, responses):
    """Returns the first L samples of the convolutions of waves [N, L] with responses [N, R], row by row, R ≤ L.

    Overlap-add with blocks as long as the response, rounded up to a power of two: the transforms are short, and of a
    size that is fast on both CPU and TPU.
    """
    rows, samples = waves.shape
    taps = responses.shape[1]
    block = 1 << (taps - 1).bit_length()
    blocks = -(-samples // block)
    parts = jnp.pad(waves, ((0, 0), (0, blocks * block - samples))).reshape(rows, blocks, block)
    spectrum = jnp.fft.rfft(parts, 2 * block) * jnp.fft.rfft(responses, 2 * block)[:, None]
    full = jnp.fft.irfft(spectrum, 2 * block)
    carried = jnp.pad(full[:, :-1, block:], ((0, 0), (1, 0), (0, 0)))  # the tail that rings into the next block
    return (full[:, :, :block] + carried).reshape(rows, blocks * block)[:, :samples]


def _check(banks, categories, clean, both, reverb_share, snr_db):
    """Raises ValueError unless the settings of `augment` make sense."""
    shares = {"clean": clean, "both": both, "clean + both": clean + both, "reverb_share": reverb_share}
    for name, share in shares.items():
        if not 0 <= share <= 1 + 1e-6:  # the sum of two shares may round to above one
            raise ValueError(f"{name} = {share} is not a share between 0 and 1")
    for name in categories:
        if name not in snr_db or not snr_db[name][0] <= snr_db[name][1]:
            raise ValueError(f"snr_db needs {name!r}: (lowest, highest) in dB, got {snr_db.get(name)}")
    for name, bank in banks.items():
        if name not in (*CATEGORIES, "rir"):
            raise ValueError(f"unknown bank {name!r}; banks are {', '.join(CATEGORIES)} and rir")
        if bank.ndim != 2 or 0 in bank.shape:
            raise ValueError(f"bank {name!r} must be [recordings, samples] and not empty, got {list(bank.shape)}")
        if not (jnp.issubdtype(bank.dtype, jnp.floating) or (bank.dtype == jnp.int16 and name != "rir")):
            raise ValueError(f"bank {name!r} has type {bank.dtype}; recordings are int16 or float, responses float")
