"""Residual blocks one after another: as they are, as a loop, or made again in the backward pass to save memory."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from memo_jax.compiler import cpu_barrier
from memo_jax.models.layers import CONVOLUTION, STATISTICS

REMATS = {
    "none": None,
    "norms": jax.checkpoint_policies.save_only_these_names(CONVOLUTION, STATISTICS),
    "blocks": jax.checkpoint_policies.nothing_saveable,
}


def run_blocks(
    parent: nn.Module, block, names: Sequence[str], x: jax.Array, lengths: jax.Array | None, train: bool, *,
    scan: bool = False, remat: str = "none",
) -> jax.Array:
    """Runs blocks (x, lengths, train) → x that are alike one after another.

    Args:
      parent: whose submodules by these names they are.
      block: makes one of them, given `name` or `parent`.
      x, lengths, train: what the first one takes.
      scan: in train mode they become a loop, whose body is compiled once for all of them.
      remat: what the backward pass makes again in train mode rather than keep it: "none"; "norms", norms and
        activations from the convolutions' outputs; "blocks", all of a block from its input.
    """
    loop = scan and len(names) > 1
    if not train or lengths is not None or parent.is_initializing() or (remat == "none" and not loop):
        for name in names:
            x = block(name=name)(x, lengths, train)
            x = cpu_barrier(x) if train else x
        return x

    def run(x, variables):
        out, updated = block(parent=None).apply(variables, x, None, True, mutable=["batch_stats"])
        return cpu_barrier(out), updated["batch_stats"]

    def run_in_turn(x, variables):
        statistics = []
        for of_block in variables:
            x, updated = run(x, of_block)
            statistics.append(updated)
        return x, statistics

    if remat == "norms" and not loop:  # of all blocks together, so that not even their inputs are kept
        run_in_turn = jax.checkpoint(run_in_turn, policy=REMATS[remat])
    elif remat != "none":
        run = jax.checkpoint(run, prevent_cse=not loop, policy=REMATS[remat])
    variables = [{kind: parent.get_variable(kind, name) for kind in ("params", "batch_stats")} for name in names]
    if loop:
        x, stacked = jax.lax.scan(run, x, jax.tree.map(lambda *parts: jnp.stack(parts), *variables))
        statistics = [jax.tree.map(lambda part: part[i], stacked) for i in range(len(names))]  # noqa: B023
    else:
        x, statistics = run_in_turn(x, variables)
    for name, updated in zip(names, statistics, strict=True):
        parent.put_variable("batch_stats", name, updated)
    return x
