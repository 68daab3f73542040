"""What training costs on TPUs or GPUs that are not at hand: the train step, compiled ahead of time for a topology.

Memory and collectives are those of the compiled program. Its time is an estimate by XLA's cost model and, for what that
leaves out, by FLOPs and bytes (`hlo`).
"""

import contextlib
import copy
import re
import time

import jax
import numpy as np
from jax.sharding import Mesh

from memo_jax import config as configs
from memo_jax.audio import SAMPLE_RATE
from memo_jax.config import ConfigDict
from memo_jax.data.banks import MEGABYTE
from memo_jax.data.batches import Utterances, steps_per_epoch
from memo_jax.log import say_once
from memo_jax.planning.chips import Gpu, Tpu, compile_only_devices
from memo_jax.planning.hlo import collective_seconds, collectives, estimated_seconds
from memo_jax.scoring.trials import read_table
from memo_jax.training.kmeans import BLOCK, jitted_kmeans, jitted_nearest_other, padded_rows
from memo_jax.training.program import lowered_step
from memo_jax.training.recipe import build_recipe
from memo_jax.xla import sharding
from memo_jax.xla.compiler import known_options

try:
    from jax.experimental.compilation_cache.compilation_cache import reset_cache
except ImportError:  # experimental: another version of JAX may have moved it
    reset_cache = None

VOXCELEB2 = 1_092_009  # utterances of the development part
VOXCELEB2_SPEAKERS = 5994
OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
MEASURED = (
    "fits",
    "hbm_bytes",
    "argument_bytes",
    "temporary_bytes",
    "flops",
    "collective_bytes",
    "collectives",
    "seconds_per_step",
    "collective_seconds",
    "utilisation",
    "utterances_per_second",
    "hours",
    "chip_hours",
)
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def plan(config: ConfigDict, topology: str, utterances: int | None = None) -> dict:
    """Compiles the config's train step for a topology, and returns what it needs and costs.

    Args:
      config: of the run; `data.batch_size` is the global one. A folder of augmentation recordings counts as a bank of
        `augment.bank_megabytes`; it is not read.
      topology: as `chips.compile_only_devices` takes it: "v5e:4x4", "h100:8".
      utterances: in an epoch; by default those of `data.train` or, without it, of VoxCeleb2.

    Returns:
      `fits`, `hbm_bytes` (per chip: `argument_bytes`, `temporary_bytes` and the program) of `hbm_limit_bytes`; per chip
      and step `flops`, `collective_bytes`, `collectives` {kind: [number, bytes]}, `seconds_per_step` (of which
      `collective_seconds`), `utilisation` of the peak, `utterances_per_second` of all chips; `steps`, `hours` and
      `chip_hours` of the run; `compile_seconds`; `advice`, what to change. Unknown values of a program that does not
      fit are None. With positives from other recordings the step is the one that uses them, and `kmeans` has
      `seconds` and `hbm_bytes` of a clustering, beside the train state; the time to read and embed is not known.

    Raises:
      ValueError: no such topology, or a batch that its chips cannot share evenly.
      ImportError: the compiler for such chips is not installed.
    """
    chip, devices = compile_only_devices(topology)
    batch = config.data.batch_size
    if batch % len(devices):
        raise ValueError(f"data.batch_size {batch} is not a multiple of the {len(devices)} chips of {topology}")
    dataset = Utterances(config.data.train) if config.data.train else None
    if utterances is None:
        utterances = VOXCELEB2 if dataset is None else len(dataset)
    if config.supervised.labels:
        speakers = len(set(read_table(config.supervised.labels, "name", "label").values()))
    else:
        speakers = VOXCELEB2_SPEAKERS if dataset is None else len(set(dataset.speakers))
    epoch_steps = steps_per_epoch(utterances, batch)
    mesh = sharding.data_mesh(devices)
    recipe, partnered = build_recipe(config, epoch_steps, speakers, utterances), config.positives.clusters > 0
    lowered = lowered_step(config, recipe, mesh, _banks(config.augment, mesh), partnered)
    steps = configs.duration_in_steps(config, "total", epoch_steps)
    result = {
        "topology": topology,
        "chips": len(devices),
        "batch_size": batch,
        "dtype": config.model.dtype,
        "steps": steps,
        "hbm_limit_bytes": int(chip.memory),
    }
    begin = time.perf_counter()
    try:
        with _without_compilation_cache():
            compiled = lowered.compile(known_options(chip.compiler_options))
    except jax.errors.JaxRuntimeError as error:
        used = OUT_OF_MEMORY.search(str(error))
        if not used:
            raise
        measured = dict.fromkeys(MEASURED) | {"fits": False, "hbm_bytes": int(float(used[1]) * UNITS[used[2]])}
        compile_seconds = time.perf_counter() - begin
    else:
        compile_seconds = time.perf_counter() - begin
        flops = model_flops(config, epoch_steps) / len(devices)
        measured = _measured(compiled, chip, len(devices), batch, steps, flops)
    result |= measured | {"compile_seconds": compile_seconds}
    if partnered:
        result["kmeans"] = kmeans_plan(config, mesh, chip, utterances)
    return result | {"advice": advice(result, config, chip)}


def kmeans_plan(config: ConfigDict, mesh: Mesh, chip: Tpu | Gpu, utterances: int) -> dict:
    """Compiles the k-means of the config's positives for a mesh; returns its `seconds` and `hbm_bytes` (per chip).

    The bytes are those of its arguments, results and temporaries, without the train state beside it.
    """
    clusters, width, iterations = config.positives.clusters, config.model.embedding_dim, config.positives.iterations
    whole, split = sharding.replicated(mesh), sharding.shard_batch(mesh)

    def rows(count, held=whole):
        return jax.ShapeDtypeStruct((count, width), np.float32, sharding=held)

    number = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    kmeans = jitted_kmeans(mesh, iterations).lower(rows(padded_rows(utterances, mesh), split), rows(clusters), number)
    nearest = jitted_nearest_other(mesh).lower(rows(clusters + -clusters % BLOCK), rows(clusters))
    seconds, size = 0.0, 0
    for lowered in (kmeans, nearest):
        with _without_compilation_cache():
            compiled = lowered.compile(known_options(chip.compiler_options))
        text, memory = compiled.as_text(), compiled.memory_analysis()
        seconds += estimated_seconds(text, chip) + collective_seconds(text, chip, mesh.size)
        size = max(size, memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes)
    return {"utterances": utterances, "clusters": clusters, "seconds": seconds, "hbm_bytes": size}


def model_flops(config: ConfigDict, epoch_steps: int) -> float:
    """Returns the FLOPs of a step of the whole batch, by the definition of its networks, whatever the device.

    A compiled program has more (the zeros of packed planes, recomputed blocks) or seems to have less (loops).
    """
    config = copy.deepcopy(config)
    config.model.update(
        ecapa_remat="none", resnet_remat="none", resnet_packed=False, resnet_scan=False, crop_remat=False
    )
    mesh = sharding.data_mesh(jax.devices("cpu")[:1])
    recipe = build_recipe(config, epoch_steps)
    lowered = lowered_step(config, recipe, mesh, _banks(config.augment, mesh))
    return float(lowered.cost_analysis()["flops"])


@contextlib.contextmanager
def _without_compilation_cache():
    """Turns off the compilation cache: it cannot load programs for absent devices and would hide the compile time."""
    kept = jax.config.jax_enable_compilation_cache
    try:
        _enable_compilation_cache(False)
        yield
    finally:
        _enable_compilation_cache(kept)


def _enable_compilation_cache(enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    if reset_cache is None:
        say_once("this JAX has no reset_cache: a program may come from the cache, so compile_seconds may be too short")
    else:
        reset_cache()  # JAX reads the setting when the cache is initialised


def _banks(augment, mesh):
    """Returns the shapes of a config's banks at their largest."""
    banks, whole = {}, sharding.replicated(mesh)
    for kind, folder, dtype, seconds in (
        ("noise", augment.noise, np.int16, augment.bank_seconds),
        ("music", augment.music, np.int16, augment.bank_seconds),
        ("speech", augment.speech, np.int16, augment.bank_seconds),
        ("rir", augment.rirs, np.float32, augment.rir_seconds),
    ):
        if folder:
            length = round(seconds * SAMPLE_RATE)
            rows = int(augment.bank_megabytes * MEGABYTE // (length * np.dtype(dtype).itemsize))
            banks[kind] = jax.ShapeDtypeStruct((max(rows, 1), length), dtype, sharding=whole)
    return banks


def _measured(compiled, chip: Tpu | Gpu, chips: int, batch: int, steps: int, flops: float) -> dict:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes + kept
    total = memory.argument_size_in_bytes + temporary + memory.generated_code_size_in_bytes
    moved, moving = collectives(text), collective_seconds(text, chip, chips)
    seconds = estimated_seconds(text, chip) + moving
    hours = steps * seconds / 3600
    return dict(
        zip(
            MEASURED,
            (
                total <= chip.memory,
                total,
                memory.argument_size_in_bytes,
                temporary,
                flops,
                sum(size for _, size in moved.values()),
                {kind: list(of) for kind, of in moved.items()},
                seconds,
                moving,
                flops / chip.peak / seconds,
                batch / seconds,
                hours,
                hours * chips,
            ),
            strict=True,
        )
    )


def advice(result: dict, config: ConfigDict, chip: Tpu | Gpu) -> list[str]:
    """Returns what to change in a config, given its plan; empty for nothing."""
    chips, per_chip, lines = result["chips"], result["batch_size"] // result["chips"], []
    if not result["fits"]:
        most = int(per_chip * chip.memory / result["hbm_bytes"])
        lines.append(
            f"it needs {result['hbm_bytes'] / 2**30:.1f} GiB a chip of {chip.memory / 2**30:.0f}: "
            f"try --config.data.batch_size={max(most, 1) * chips} ({max(most, 1)} utterances a chip), or as "
            "many utterances on more chips"
        )
    if config.model.dtype != "bfloat16":
        lines.append("--config.model.dtype=bfloat16 halves the memory of activations; the peak is that of bfloat16")
    if isinstance(chip, Gpu) and 0.75 * chip.memory < result["hbm_bytes"] <= chip.memory:
        lines.append("JAX takes 75 % of a GPU's memory by default; give it more: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95")
    if per_chip < 8 and result["fits"]:
        lines.append(f"only {per_chip} utterances a chip: a larger batch or fewer chips would use them better")
    return lines


def plan_text(result: dict) -> str:
    """Returns a plan as text."""
    gib = 2**30
    lines = [
        f"{result['topology']}: {result['chips']} chips, {result['batch_size']} utterances a step "
        f"({result['batch_size'] // result['chips']} a chip), {result['dtype']}",
        f"  memory a chip       {result['hbm_bytes'] / gib:.2f} of {result['hbm_limit_bytes'] / gib:.0f} GiB: "
        + ("fits" if result["fits"] else "DOES NOT FIT"),
    ]
    if result["flops"] is not None:
        kinds = result["collectives"].items()
        moved = ", ".join(f"{count} {kind} {size / 1e6:.1f} MB" for kind, (count, size) in kinds)
        lines += [
            f"                      arguments {result['argument_bytes'] / gib:.2f}, temporary "
            f"{result['temporary_bytes'] / gib:.2f}, headroom "
            f"{(result['hbm_limit_bytes'] - result['hbm_bytes']) / gib:.2f} GiB",
            f"  computation a chip  {result['flops'] / 1e12:.4g} TFLOP a step",
            f"  collectives         {moved or 'none'}",
            f"  time (estimate)     {result['seconds_per_step']:.4g} s a step, of which collectives "
            f"{result['collective_seconds']:.2g} s; {100 * result['utilisation']:.1f} % of the peak, "
            f"{result['utterances_per_second']:,.0f} utterances a second",
            f"  the whole run       {result['steps']:,} steps: {result['hours']:,.1f} hours, "
            f"{result['chip_hours']:,.0f} chip hours",
        ]
    if "kmeans" in result:
        of = result["kmeans"]
        lines.append(
            f"  k-means (estimate)  {of['utterances']:,} embeddings into {of['clusters']:,} clusters: "
            f"{of['seconds']:.2g} s, and {of['hbm_bytes'] / gib:.2f} GiB a chip beside the state"
        )
    lines.append(f"  compiled in         {result['compile_seconds']:.0f} s")
    return "\n".join(lines + [f"  {line}" for line in result["advice"]])
