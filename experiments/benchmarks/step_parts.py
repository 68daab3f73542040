"""Where the time of a training step goes: each part compiled by itself, beside the limit that this machine sets.

    python experiments/benchmarks/step_parts.py [--config FILE] [--batch-size 4] [--runs 3] [--json]
        [--config.KEY=VALUE …]

A part's limit is the longer of two times: its FLOPs at the best rate of a matrix product here, in the config's
`model.dtype`, and the bytes of its arguments and results at the best rate of a copy (read and written). FLOPs are XLA's
own count before optimisation. Bytes leave out what a part keeps between forward and backward pass, which is why some
parts can never reach their limit. Each time is the median of the runs: on a CPU in CPU-seconds, which other work on the
machine disturbs least; on a GPU or TPU (the first one) in seconds. The parts add up to more than `step`, in which the
compiler sees all of them at once.
"""

import argparse
import functools
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from machine import best_seconds
from memo_jax import config as configs
from memo_jax import features
from memo_jax.files import as_json
from memo_jax.log import progress
from memo_jax.models import head_part
from memo_jax.training import augment, losses
from memo_jax.training import recipe as recipes
from memo_jax.training.program import create_state
from memo_jax.training.state import student_params
from memo_jax.training.step import (
    embeddings_by_view,
    logits_by_view,
    objective,
    teacher_outputs,
    train_step_on_features,
)
from memo_jax.xla import sharding
from memo_jax.xla.compiler import compiler_options
from memo_jax.xla.memory import keep_freed_memory
from synthetic import example_banks, example_batch

PLATFORM = jax.default_backend()
SECOND, CLOCK = ("CPU-second", time.process_time) if PLATFORM == "cpu" else ("second", time.perf_counter)
UPDATES = (  # take a state, which is donated, and return it first
    "optimiser and moving average",
    "step, from log-mel",
    "the same by the gradient of the whole objective",
)
AUTHORS = Path(__file__).resolve().parents[2] / "configs" / "memo_voxceleb2.py"


def drawn(function, *arguments, seed=0):
    """Returns normal numbers in the shapes of what a function would return, which is not run."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), jax.eval_shape(function, *arguments))


def parts_of(config):
    """Returns {name of a part: (function, its arguments)}, the whole step last."""
    recipe, mesh = recipes.build_recipe(config, 1000), sharding.data_mesh(jax.devices()[:1])
    state = create_state(config, recipe, mesh)
    batch, banks, key = example_batch(config), example_banks(), jax.random.key(1)
    waves = {kind: x.reshape(-1, x.shape[-1]).astype(np.float32) / 32768 for kind, x in batch.items()}
    crops = [x for kind, x in waves.items() if kind != "teacher"]
    counts = [x.shape[1] for kind, x in batch.items() if kind != "teacher"]
    seen = drawn(recipes.build_front_end(config), key, batch, banks)
    views = seen.students

    parts = {
        "augmentation": (
            lambda key, crops, banks: [
                augment.augment(key, x, banks, views=n) for x, n in zip(crops, counts, strict=True)
            ],
            (key, crops, banks),
        ),
        "log-mel": (lambda crops: [features.normalized_log_mel(features.mel_power(x)) for x in crops], (crops,)),
    }
    if "teacher" in waves:
        is_clean, views_of_teachers = config.teacher.view == "clean", batch["teacher"].shape[1]

        def teachers_front_end(key, crops, banks):
            heard = crops if is_clean else augment.augment(key, crops, banks, views=views_of_teachers)
            return features.normalized_log_mel(features.mel_power(heard))

        parts["front end of crops for teachers only"] = (teachers_front_end, (key, waves["teacher"], banks))
    logits, distributions, all_embeddings = {}, {}, {}
    for name, branch in recipe.branches.items():
        params, stats = state.student[name]["params"], state.student[name]["batch_stats"]

        def embed(params, stats, views, backbone=branch.backbone):
            embeddings = []
            for x in views:
                of_views, stats = embeddings_by_view(backbone, params, stats, x)
                embeddings.append(of_views)
            return embeddings, stats

        def train_backbone(params, stats, views, gradients, embed=embed):
            _, vjp, stats = jax.vjp(lambda p: embed(p, stats, views), params, has_aux=True)
            return vjp(gradients), stats

        def project(params, stats, embeddings, branch=branch):
            logits, stats = {}, dict(stats)
            for head in branch.head_names:
                part = head_part(head)
                logits[head], (_, stats[part]) = logits_by_view(branch.head, params[part], stats[part], embeddings)
            return logits, stats

        def train_heads(params, stats, embeddings, gradients, project=project):
            _, vjp, stats = jax.vjp(lambda p, e: project(p, stats, e), params, embeddings, has_aux=True)
            return vjp(gradients), stats

        heads = {key: value for key, value in params.items() if key != "backbone"}
        head_stats = {key: value for key, value in stats.items() if key != "backbone"}
        backbone, backbone_stats = params["backbone"], stats["backbone"]
        all_embeddings[name], _ = embeddings, _ = drawn(embed, backbone, backbone_stats, views)
        logits[name], _ = drawn(project, heads, head_stats, embeddings)
        distributions[name] = drawn(
            functools.partial(teacher_outputs, branch, weights=recipe.weights),
            state.teacher[name],
            state.center[name],
            seen.of_teachers,
            0.04,
        ).distributions
        parts |= {
            f"{name}, forward": (embed, (backbone, backbone_stats, views)),
            f"{name}, forward and backward": (train_backbone, (backbone, backbone_stats, views, embeddings)),
            f"{name}, teacher's forward": (embed, (backbone, backbone_stats, views[:1])),
            f"{name}'s heads, forward": (project, (heads, head_stats, embeddings)),
            f"{name}'s heads, forward and backward": (train_heads, (heads, head_stats, embeddings, logits[name])),
        }

    def distill(logits, distributions):
        return sum(
            losses.distillation(logits[a][head], distributions[b][head], 0.1)
            for a in logits
            for b in logits
            for head in ["self" if a == b else config.loss.cross_head]
            if a == b or config.loss.cross
        )

    parts["distillation losses, forward and backward"] = (jax.grad(distill), (logits, distributions))
    parts |= option_parts(config, logits, distributions, all_embeddings)
    parameters = student_params(state)
    averages = {name: state.teacher[name]["params"] for name in recipe.branches}

    def update(state, gradients):
        averages, opt_state, parameters = state

        def update_part(gradients, opt_state, parameters):
            updates, opt_state = recipe.optimizer.update(gradients, opt_state, parameters)
            return optax.apply_updates(parameters, updates), opt_state

        updated = {
            name: {
                part: update_part(of_part, opt_state[name][part], parameters[name][part])
                for part, of_part in of_branch.items()
            }
            for name, of_branch in gradients.items()
        }
        parameters, opt_state = (
            {name: {part: x[i] for part, x in of_branch.items()} for name, of_branch in updated.items()} for i in (0, 1)
        )
        return (jax.tree.map(lambda t, s: 0.996 * t + 0.004 * s, averages, parameters), opt_state, parameters), ()

    parts[UPDATES[0]] = (update, ((averages, state.opt_state, parameters), averages))
    parts[UPDATES[1]] = (lambda state, views: train_step_on_features(state, views, recipe), (state, seen))

    def plain_step(state, views):
        """A step without its metrics, centres and statistics, whose backward pass is not cut."""
        parameters = student_params(state)
        gradients = jax.grad(objective)(parameters, state, views, recipe)
        averages = {name: state.teacher[name]["params"] for name in recipe.branches}
        (averages, opt_state, parameters), _ = update((averages, state.opt_state, parameters), gradients)
        roles = {
            role: {name: variables[name] | {"params": params[name]} for name in variables}
            for role, variables, params in (
                ("student", state.student, parameters),
                ("teacher", state.teacher, averages),
            )
        }
        return state.replace(opt_state=opt_state, **roles), ()

    parts[UPDATES[2]] = (plain_step, (state, seen))
    return parts


def option_parts(config, logits, distributions, embeddings):
    """Returns the parts that a config's options add to a step, each for all branches and heads."""
    loss, bottleneck, parts = config.loss, config.model.head_bottleneck, {}
    flat = jax.tree.leaves(logits)
    projections = drawn(lambda: [jnp.zeros((*x.shape[:2], bottleneck)) for x in flat])
    joined = [jnp.concatenate(of_branch) for of_branch in embeddings.values()]

    def summed(term):
        return jax.grad(lambda arrays: sum(jax.tree.leaves([term(x) for x in arrays])))

    if loss.targets == "sinkhorn":
        teachers = jax.tree.leaves(distributions)
        parts["balanced targets"] = (lambda xs: [losses.sinkhorn_distributions(x, 0.04)[0] for x in xs], (teachers,))
    if loss.mean_entropy:
        gap = summed(lambda x: losses.mean_entropy_gap(x, loss.student_temp))
        parts["mean entropy, forward and backward"] = (gap, (flat,))
    if loss.koleo:
        parts["KoLeo, forward and backward"] = (summed(losses.koleo), (joined,))
    if loss.variance or loss.covariance:
        parts["variance and covariance, forward and backward"] = (
            summed(losses.variance_and_covariance),
            (projections,),
        )
    return parts


def machine_limits(dtype):
    """Returns the FLOP and bytes of a second at best: of a matrix product, and of a copy, read and written."""
    size, megabytes, calls = (2048, 256, 1) if PLATFORM == "cpu" else (8192, 1024, 10)
    # Not ones: their product takes less power, and a GPU that is not at its limit of power runs faster.
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda x: x @ x)

    def repeated(function, x):
        for _ in range(calls):  # an accelerator begins one while the next is asked for
            result = function(x)
        result.block_until_ready()

    if PLATFORM == "cpu":
        source = np.ones(megabytes * 2**18, np.float32)
        target = np.empty_like(source)
        copy = functools.partial(np.copyto, target, source)
    else:
        source, negative = jnp.ones(megabytes * 2**18, jnp.float32), jax.jit(jnp.negative)
        copy = functools.partial(repeated, negative, source)
    return (
        2 * size**3 * calls / best_seconds(functools.partial(repeated, product, square), CLOCK),
        2 * source.nbytes * calls / best_seconds(copy, CLOCK),
    )


def measured(name, function, arguments, runs, peak, bandwidth):
    """Returns what a part takes, and what it would at its limit."""
    updates = name in UPDATES
    begin = time.process_time()
    jitted = jax.jit(function, donate_argnums=0 if updates else ())
    compiled = jitted.lower(*arguments).compile(compiler_options(PLATFORM))
    compile_seconds = time.process_time() - begin
    shapes = jax.eval_shape(function, *arguments)
    moved = sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves((arguments, shapes))
        if hasattr(x, "dtype") and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    )
    if updates:  # other parts need what would be donated
        arguments = (jax.tree.map(jnp.copy, arguments[0]), *arguments[1:])
    times = []
    for i in range(runs + 1):
        begin = CLOCK()
        results = jax.block_until_ready(compiled(*arguments))
        if i:
            times.append(CLOCK() - begin)
        if updates:
            arguments = (results[0], *arguments[1:])
    flops, seconds = float(compiled.cost_analysis().get("flops", 0)), statistics.median(times)
    limit = max(flops / peak, moved / bandwidth)
    return {
        "part": name,
        "seconds": seconds,
        "gigaflops": flops / 1e9,
        "gigabytes": moved / 1e9,
        "bound_by": "products" if flops / peak > moved / bandwidth else "memory",
        "limit_seconds": limit,
        "of_limit": limit / seconds,
        "temporary_gigabytes": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "compile_cpu_seconds": compile_seconds,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=AUTHORS, help="default: the authors' sizes")
    parser.add_argument("--batch-size", type=int, default=4, help="default: 4")
    parser.add_argument("--runs", type=int, default=3, help="of each part, after one that is not counted (default: 3)")
    parser.add_argument("--parts", default="", help="only those in whose name this regular expression is found")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments=None) -> dict:
    """Measures and prints."""
    options, overrides = build_parser().parse_known_args(arguments)
    config = configs.load_config(options.config, overrides + [f"--config.data.batch_size={options.batch_size}"])
    keep_freed_memory()  # as training does: fresh pages would cost more than what is written into them
    peak, bandwidth = machine_limits(config.model.dtype)
    parts = {name: part for name, part in parts_of(config).items() if re.search(options.parts, name)}
    if not options.json:
        print(f"a {SECOND} does {peak / 1e9:.0f} GFLOP of a matrix product, or moves {bandwidth / 1e9:.1f} GB\n")
        print(f"| part | {SECOND}s | GFLOP | GB | limit, s | of the limit | temporary, GB |\n" + "|---" * 7 + "|")
    rows = []
    for name in progress(list(parts), label="measure", unit="part"):
        row = measured(name, *parts[name], options.runs, peak, bandwidth)
        rows.append(row)
        if not options.json:
            print(
                f"| {name} | {row['seconds']:.4f} | {row['gigaflops']:.1f} | {row['gigabytes']:.2f} "
                f"| {row['limit_seconds']:.4f} ({row['bound_by']}) | {row['of_limit']:.0%} "
                f"| {row['temporary_gigabytes']:.2f} |",
                flush=True,
            )
    result = {
        "batch_size": options.batch_size,
        "platform": PLATFORM,
        "peak_gigaflops": peak / 1e9,
        "gigabytes_per_second": bandwidth / 1e9,
        "parts": rows,
    }
    if options.json:
        print(as_json(result))
    return result


if __name__ == "__main__":
    main()
