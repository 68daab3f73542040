"""Steps that are traced without being computed, whatever their size."""

import functools

import jax

from memo_jax.data.batches import SAMPLE_RATE
from memo_jax.training.front_end import clean_features
from memo_jax.training.program import state_maker
from memo_jax.training.recipe import batch_crops, build_front_end, build_recipe
from memo_jax.training.state import TrainState
from memo_jax.training.step import train_step

front_ends = {}  # by their settings, so that each is traced once for each size of a batch


def jitted_front_end(config):
    """The config's front end, as a jitted function."""
    front_end = build_front_end(config)
    return front_ends.setdefault(repr(front_end.keywords), jax.jit(front_end))


def traced_step(config) -> tuple[TrainState, dict]:
    """The abstract state after a step of a config, augmentation banks and front end included, and its metrics.

    Asserts that its arrays have the same shapes as those of the state before.
    """
    recipe = build_recipe(config, 1000, utterances=1000 * config.data.batch_size)
    state = jax.eval_shape(state_maker(recipe), jax.random.key(0))
    batch = {
        kind: jax.ShapeDtypeStruct((config.data.batch_size, *shape), "int16")
        for kind, shape in batch_crops(config).items()
    }
    if config.supervised.weight or config.loss.contrastive_mask_same_speaker:
        batch["label"] = batch["index"] = jax.ShapeDtypeStruct((config.data.batch_size,), "int32")
    bank = jax.ShapeDtypeStruct((3, round(config.augment.bank_seconds * SAMPLE_RATE)), "int16")
    responses = jax.ShapeDtypeStruct((2, round(config.augment.rir_seconds * SAMPLE_RATE)), "float32")
    banks = {"noise": bank, "music": bank, "speech": bank, "rir": responses}
    clean = functools.partial(clean_features, front_end=config.features.front_end)
    step = functools.partial(train_step, recipe=recipe, front_end=jitted_front_end(config), clean=clean)
    after, metrics = jax.eval_shape(step, state, batch, banks, jax.eval_shape(lambda: jax.random.key(0)))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after)):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    return after, metrics
