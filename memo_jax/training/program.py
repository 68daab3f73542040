"""The compiled program of a run: jits and lowers the train step, and places its state on the devices."""

import concurrent.futures
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from memo_jax import interrupts
from memo_jax.config import ConfigDict
from memo_jax.features import MEL_BINS
from memo_jax.models import Variables
from memo_jax.training import optim
from memo_jax.training.front_end import clean_features
from memo_jax.training.recipe import batch_crops, build_front_end, reads_labels
from memo_jax.training.state import TrainState, initial_state
from memo_jax.training.step import Metrics, Recipe, train_step
from memo_jax.xla import sharding
from memo_jax.xla.compiler import compiler_options, run_once_options


def jitted_step(config: ConfigDict, recipe: Recipe, mesh: Mesh, state: TrainState) -> jax.stages.Wrapped:
    """Returns the jitted train step (state, batch, banks, key) → (state, metrics); it donates the state.

    Args:
      config: of the run; its augmentation settings become the front end.
      recipe: of the same config.
      mesh: the devices; batches are split over them, banks and key are replicated.
      state: concrete or abstract; only its shardings are read.
    """
    whole, split = sharding.replicated(mesh), sharding.shard_batch(mesh)
    state = jax.tree.map(lambda x: x.sharding, state)
    clean = functools.partial(clean_features, front_end=config.features.front_end)
    step = functools.partial(
        sharding.on_mesh(mesh, train_step), recipe=recipe, front_end=build_front_end(config), clean=clean
    )
    return jax.jit(
        step,
        in_shardings=(state, split, whole, whole),
        out_shardings=(state, whole),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def lowered_step(
    config: ConfigDict, recipe: Recipe, mesh: Mesh, banks: Mapping[str, Any], partnered: bool = False
) -> jax.stages.Lowered:
    """Returns the train step, traced and lowered for a mesh of devices that need not be present.

    Only the shapes, dtypes and shardings of `banks` are read. With `partnered`, teachers see crops of a partner.
    """
    split, whole = sharding.shard_batch(mesh), sharding.replicated(mesh)
    batch = {
        kind: jax.ShapeDtypeStruct((config.data.batch_size, *shape), np.int16, sharding=split)
        for kind, shape in batch_crops(config, partnered).items()
    }
    if reads_labels(config):
        batch["label"] = jax.ShapeDtypeStruct((config.data.batch_size,), np.int32, sharding=split)
    if recipe.supervision.gated_utterances:
        batch["index"] = jax.ShapeDtypeStruct((config.data.batch_size,), np.int32, sharding=split)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    state = abstract_state(config, recipe, mesh)
    return jitted_step(config, recipe, mesh, state).lower(state, batch, banks, key)


class StepCompiledInBackground:
    """The compiled train step; it compiles in a thread while the caller prepares other things.

    The first call waits for the compiler and raises its error, if it failed. Use it as a context manager.
    """

    def __init__(self, *arguments: Any):
        """Takes the arguments of `lowered_step`."""
        self._compiler, self._step = concurrent.futures.ThreadPoolExecutor(1, "compiler"), None
        # Traced here and not in the thread: two threads that trace take turns.
        self._compiled = self._compiler.submit(lowered_step(*arguments).compile)

    @property
    def is_new(self) -> bool:
        """Whether it has not been called yet."""
        return self._step is None

    def __call__(
        self, state: TrainState, batch: Mapping[str, jax.Array], banks: Mapping[str, Any], key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """Takes a step."""
        if self._step is None:
            self._step = self._compiled.result()
            jax.clear_caches()  # drops everything the process has traced: 70 MB at the authors' sizes
            interrupts.check()
        return self._step(state, batch, banks, key)

    def __enter__(self) -> "StepCompiledInBackground":
        return self

    def __exit__(self, *exception) -> None:
        self._compiler.shutdown(wait=False)  # an error of the caller is reported at once


def augmentation_key(config: ConfigDict, mesh: Mesh) -> jax.Array:
    """Returns the key of a run's augmentation, replicated over the mesh."""
    return jax.random.wrap_key_data(sharding.replicate(mesh, jax.random.key_data(jax.random.key(config.seed + 1))))


def state_maker(recipe: Recipe) -> Callable[[jax.Array], TrainState]:
    """Returns the function key → state before the first step."""
    return functools.partial(
        initial_state,
        branches=recipe.branches,
        mels=MEL_BINS,
        optimizer=recipe.optimizer,
        rule=recipe.gate_rule,
        gated_utterances=recipe.supervision.gated_utterances,
        partners=recipe.partners,
    )


def abstract_state(config: ConfigDict, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of the state on a mesh of devices that need not be present.

    Above `split_above_megabytes`, prototypes (a step uses those of one head at a time) and optimiser states (used once
    a step) are split over the devices. Everything else is replicated.
    """
    large = config.split_above_megabytes * 1e6 or float("inf")

    def placed(path, x):
        splits = (path[0].name == "opt_state" or optim.is_prototypes(path)) and x.size * x.dtype.itemsize >= large
        held = sharding.shard_longest_axis(mesh, x.shape) if splits else sharding.replicated(mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=held)

    shapes = jax.eval_shape(state_maker(recipe), jax.random.key(config.seed))
    return jax.tree_util.tree_map_with_path(placed, shapes)


def create_state(
    config: ConfigDict, recipe: Recipe, mesh: Mesh, start: Mapping[str, Variables] | None = None
) -> TrainState:
    """Returns the state before the first step, on the mesh's devices.

    It depends on the config and its seed alone, except that students and teachers have the parts in `start`: {branch:
    {"params": {part: parameters}, "batch_stats": {part: statistics}}}.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, recipe, mesh))
    options = run_once_options(mesh.devices.flat[0].platform)
    make = jax.jit(state_maker(recipe), out_shardings=shardings, compiler_options=options)
    state = make(jax.random.key(config.seed))
    return with_parts(state, start) if start else state


def with_parts(state: TrainState, start: Mapping[str, Variables]) -> TrainState:
    """Returns the state with these parts, as in `create_state`, in students and teachers that have such parts."""

    def replaced(branch, kind, tree):
        given = {part: leaves for part, leaves in start[branch][kind].items() if part in tree}
        return tree | {
            part: jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), leaves, tree[part])
            for part, leaves in given.items()
        }

    roles = {
        role: variables
        | {branch: {kind: replaced(branch, kind, tree) for kind, tree in variables[branch].items()} for branch in start}
        for role, variables in (("student", state.student), ("teacher", state.teacher))
    }
    return state.replace(**roles)
