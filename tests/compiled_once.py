"""Runs in this process that share a step trace and compile it once, and likewise what makes their first state."""

import contextlib
import json
import types

import jax
import pytest

from memo_jax.config import duration_in_steps
from memo_jax.training import inputs, program
from memo_jax.training import recipe as recipes

# What a step does not depend on. Paths only say where its inputs come from, and the inputs' shapes are part of the key;
# whether there is a path counts.
IGNORED_GROUPS = ("evaluation", "checkpoint", "collapse")
IGNORED_KEYS = {"data": ("train",), "augment": ("noise", "music", "speech", "rirs"), "supervised": ("labels",)}

_kept = {}  # for all files that a worker runs


def _kept_for(key, make):
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]


def _settings(config, epoch_steps) -> str:
    values = config.to_dict()
    for name in (*IGNORED_GROUPS, "init", "log_every_steps", "seed", "total_epochs", "total_steps"):
        del values[name]
    values["total"] = duration_in_steps(config, "total", epoch_steps)
    for group, names in IGNORED_KEYS.items():
        for name in names:
            values[group][name] = bool(values[group][name])
    return json.dumps(values, sort_keys=True, default=str)


@contextlib.contextmanager
def compiled_once():
    """Makes `train` reuse compiled programs while the context lasts.

    Recipes are the same object for configs that differ in nothing a step depends on, and for data with the same numbers
    of steps, speakers and utterances. Steps are kept by recipe, devices and shapes of the banks. JAX itself keeps the
    program that makes a state. A test that replaces backbones or the front end has its own programs.
    """
    build_recipe, lowered_step, state_maker = inputs.build_recipe, program.lowered_step, program.state_maker

    def one_recipe(config, *numbers):
        key = "recipe", _settings(config, numbers[0]), numbers, recipes.build_backbone
        return _kept_for(key, lambda: build_recipe(config, *numbers))

    def is_shared(recipe):
        return any(kept is recipe for kept in _kept.values())

    def one_maker(recipe):
        maker = state_maker(recipe)
        return _kept_for(("maker", id(recipe)), lambda: maker) if is_shared(recipe) else maker

    def one_step(config, recipe, mesh, banks, partnered=False):
        if not is_shared(recipe):
            return lowered_step(config, recipe, mesh, banks, partnered)
        shapes = tuple((name, x.shape, str(x.dtype)) for name, x in sorted(banks.items()))
        crops = tuple(sorted(recipes.batch_crops(config, partnered).items()))
        key = "step", id(recipe), mesh, shapes, crops, program.build_front_end, program.train_step
        compiled = _kept_for(key, lambda: lowered_step(config, recipe, mesh, banks, partnered).compile())
        return types.SimpleNamespace(compile=lambda: compiled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "build_recipe", one_recipe)
        patch.setattr(program, "state_maker", one_maker)
        patch.setattr(program, "lowered_step", one_step)
        patch.setattr(program, "jax", types.SimpleNamespace(**vars(jax) | {"clear_caches": lambda: None}))
        yield
