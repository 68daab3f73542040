"""The training loop: from a config and a workdir to a trained run, resumed if it was begun before."""

import contextlib
import functools
import re
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import memo_jax
from memo_jax import augment, config as configs, features, optim, processes, sharding, state as states
from memo_jax.checkpoint import Checkpointer, load_extra
from memo_jax.collapse import CollapseWatch, check_finite
from memo_jax.data import Utterances, open_utterances, steps_per_epoch, training_batches
from memo_jax.gate import GateRule
from memo_jax.log import MetricsLog, Progress
from memo_jax.models import Branch, build_backbone
from memo_jax.models.ecapa import FORMS
from memo_jax.models.heads import DINOHead
from memo_jax.step import LossWeights, Recipe, train_step

# Keys that a resumed run may change: they say what is watched and kept, not what is learnt. The dataset may move; that
# it is the same one its fingerprint tells.
FREE_ON_RESUME = (
    "checkpoint.", "evaluation.", "log_every_steps", "data.train", "data.workers", "collapse.", "split_above_megabytes",
)
POSITIVE = (
    "log_every_steps", "model.embedding_dim", "model.resnet_base_channels", "model.campplus_growth",
    "model.campplus_channels", "model.head_hidden", "model.head_bottleneck", "model.prototypes", "loss.student_temp",
    "loss.contrastive_temperature", "teacher.temp", "teacher.end_temp",
)
FRACTIONS = ("loss.center_momentum", "teacher.momentum", "teacher.end_momentum", "optimizer.sgd_momentum")


def check_ranges(config) -> None:
    """Raises ValueError naming a key whose value no run can work with."""
    for keys, fits, wanted in (
        (POSITIVE, lambda value: value > 0, "above 0"), (FRACTIONS, lambda value: 0 <= value <= 1, "in [0, 1]")
    ):
        for key in keys:
            group, _, name = key.rpartition(".")
            value = (config[group] if group else config)[name]
            if not fits(value):
                raise ValueError(f"{key} is {value}: must be {wanted}")
    if config.data.global_crops < 2:
        raise ValueError(f"data.global_crops is {config.data.global_crops}: a teacher's view needs another")
    channels, blocks = config.model.ecapa_channels, config.model.resnet_blocks
    if len(channels) != 5 or min(channels) < 1 or any(width % 8 for width in channels[1:4]):
        raise ValueError(f"model.ecapa_channels is {channels}: give five widths, those of the blocks multiples of 8")
    if len(blocks) != 4 or min(blocks) < 1:
        raise ValueError(f"model.resnet_blocks is {blocks}: give four numbers of blocks, each at least 1")
    layers = config.model.campplus_layers
    if len(layers) != 3 or min(layers) < 1:
        raise ValueError(f"model.campplus_layers is {layers}: give three numbers of layers, each at least 1")
    if config.model.ecapa_form not in FORMS:
        raise ValueError(f"model.ecapa_form is {config.model.ecapa_form!r}: choose {' or '.join(FORMS)}")


def build_branches(config) -> dict[str, Branch]:
    """Returns the config's branches by name; raises ValueError naming the key that is wrong."""
    check_ranges(config)
    model, names = config.model, tuple(config.model.branches)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"model.branches {names}: name at least one backbone, each once")
    if config.loss.cross_head not in ("cross", "self"):
        raise ValueError(f"loss.cross_head {config.loss.cross_head!r}: choose cross or self")
    if model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype {model.dtype!r}: choose float32 or bfloat16")
    dtype = jnp.dtype(model.dtype)
    arguments = {
        "ecapa": {
            "channels": tuple(model.ecapa_channels), "form": model.ecapa_form,
            "embedding_norm": model.ecapa_embedding_norm,
        },
        "resnet": {"base_channels": model.resnet_base_channels, "blocks": tuple(model.resnet_blocks)},
        "campplus": {
            "layers": tuple(model.campplus_layers), "growth": model.campplus_growth,
            "stem_channels": model.campplus_channels,
        },
    }
    crosses = len(names) > 1 and config.loss.cross != 0 and config.loss.cross_head == "cross"
    head = DINOHead(model.prototypes, model.head_hidden, model.head_bottleneck, dtype)
    return {
        name: Branch(
            build_backbone(name, embedding_dim=model.embedding_dim, dtype=dtype, **arguments.get(name, {})),
            head, ("self", "cross") if crosses else ("self",),
        )
        for name in names
    }


def build_recipe(config, epoch_steps: int) -> Recipe:
    """Returns what the config's steps have in common; raises ValueError naming a bad key."""
    steps = functools.partial(configs.duration_in_steps, steps_per_epoch=epoch_steps)
    total = steps(config, "total")
    if total < 1:
        raise ValueError("the run has no steps: set total_epochs or total_steps above 0")
    schedules = optim.Schedules(
        optim.cosine_learning_rate(
            optim.scaled_learning_rate(config.optimizer.learning_rate, config.data.batch_size),
            config.optimizer.end_learning_rate, min(steps(config.optimizer, "warmup"), total), total,
        ),
        optim.cosine_momentum(config.teacher.momentum, config.teacher.end_momentum, total),
        optim.epoch_teacher_temp(
            config.teacher.temp, config.teacher.end_temp, config.teacher.temp_warmup_epochs, epoch_steps
        ),
        steps(config.optimizer, "freeze_prototypes"),
    )
    optimizer = optim.build_optimizer(
        config.optimizer.name, schedules, weight_decay=config.optimizer.weight_decay,
        clip_norm=config.optimizer.clip_norm, sgd_momentum=config.optimizer.sgd_momentum,
    )
    gate = config.gate
    rule = GateRule(
        gate.rule, gate.smoothing, steps(gate, "window"), steps(gate, "min"), gate.min_improvement,
        gate.min_alignment, steps(gate, "stop"),
    )
    return Recipe(build_branches(config), optimizer, schedules, LossWeights(**config.loss), rule)


def build_front_end(config):
    """Returns the function (key, batch, banks) → views: int16 crops, augmented, as normalised log-mel."""
    settings = {name: config.augment[name] for name in ("clean", "both", "reverb_share", "babble_from_batch")}
    settings["snr_db"] = {name: tuple(config.augment[f"{name}_snr_db"]) for name in augment.CATEGORIES}

    def front_end(key, batch, banks):
        views = []
        for i, kind in enumerate(("global", "local")):
            if kind in batch:
                crops = batch[kind]
                count = crops.shape[1]
                waves = crops.reshape(-1, crops.shape[-1]).astype(jnp.float32) / 32768
                waves = augment.augment(jax.random.fold_in(key, i), waves, banks, views=count, **settings)
                mel = features.normalized_log_mel(features.mel_power(waves))
                views.append(mel.reshape((-1, count) + mel.shape[1:]))
        return tuple(views)

    return front_end


def load_banks(config) -> dict[str, np.ndarray]:
    """Returns the config's augmentation banks; a run without any is announced by the caller."""
    from memo_jax import banks

    a = config.augment
    return banks.load_banks(
        noise=a.noise, music=a.music, speech=a.speech, rirs=a.rirs, seconds=a.bank_seconds,
        rir_seconds=a.rir_seconds, max_megabytes=a.bank_megabytes, seed=config.seed,
    )


def jitted_step(config, recipe: Recipe, mesh):
    """Returns the compiled-once train step (state, batch, banks, key) → (state, metrics); the state is donated."""
    whole, split = sharding.replicated(mesh), sharding.split_batch(mesh)
    state = jax.tree.map(lambda x: x.sharding, abstract_state(config, recipe, mesh))
    step = functools.partial(train_step, recipe=recipe, front_end=build_front_end(config))
    return jax.jit(step, in_shardings=(state, split, whole, whole), out_shardings=(state, whole), donate_argnums=0)


def state_maker(recipe: Recipe):
    """Returns the function key → state before the first step."""
    return functools.partial(
        states.initial_state, branches=recipe.branches, mels=features.MEL_BINS, optimizer=recipe.optimizer,
        rule=recipe.gate_rule,
    )


def abstract_state(config, recipe: Recipe, mesh) -> states.TrainState:
    """Returns shapes, types and shardings of the state, for devices that need not exist.

    Large prototypes, of which a step uses one head's at a time, and what the optimiser keeps of large parameters, which
    it uses once a step, are split over the devices. All else is held whole by each.
    """
    large = config.split_above_megabytes * 1e6 or float("inf")

    def placed(path, x):
        splits = (path[0].name == "opt_state" or optim.is_prototypes(path)) and x.size * x.dtype.itemsize >= large
        held = sharding.split_longest_axis(mesh, x.shape) if splits else sharding.replicated(mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=held)

    shapes = jax.eval_shape(state_maker(recipe), jax.random.key(config.seed))
    return jax.tree_util.tree_map_with_path(placed, shapes)


def initial_state(config, recipe: Recipe, mesh=None) -> states.TrainState:
    """Returns the state before the first step, which the config's seed alone decides."""
    options = {}
    if mesh is not None:
        options["out_shardings"] = jax.tree.map(lambda x: x.sharding, abstract_state(config, recipe, mesh))
    if jax.default_backend() == "cpu":
        # It runs once: optimising hundreds of small kernels for it would take several times as long as it saves.
        options["compiler_options"] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(state_maker(recipe), **options)(jax.random.key(config.seed))


def check_same_run(workdir: Path, config) -> None:
    """Raises ValueError naming the keys when the workdir was made with another config."""
    old = configs.read_config(workdir)
    if old is not None:
        changed = [d for d in configs.config_differences(old, config) if not d.startswith(FREE_ON_RESUME)]
        if changed:
            raise ValueError(
                f"{workdir} was made with another config ({'; '.join(changed)}): use another workdir, or give the "
                "same values to resume"
            )


def restored(checkpoints: Checkpointer, state: states.TrainState, batches, workdir: Path, config) -> states.TrainState:
    """Returns the latest checkpoint's state, with `batches` set to where they were, or `state` when there is none.

    Raises ValueError when the checkpoint is of another dataset.
    """
    step = checkpoints.latest_step()
    if step is None:
        return state
    if load_extra(workdir, step)["fingerprint"] != batches.get_state()["fingerprint"]:
        raise ValueError(
            f"{config.data.train} is not the dataset that {workdir} was trained on (its fingerprint differs): "
            "give that one to resume, or use another workdir"
        )
    return checkpoints.restore(state, batches)[0]


def train(config, workdir, *, stop_at_step: int | None = None, quiet: bool = False) -> dict:
    """Trains (or goes on training) the run of a workdir and returns its last metrics.

    Args:
      config: a config with all keys of configs/base.py.
      workdir: folder of the run: config.json, metrics.jsonl, tensorboard/, checkpoints.
      stop_at_step: stop there, with a checkpoint, as if interrupted; the schedules still span the whole run.
      quiet: show no progress.

    Raises:
      ValueError: a config that cannot work, or a workdir made with another one.
      TrainingStopped: losses are not finite, or the run has collapsed.
      OSError: the dataset, a bank or the workdir cannot be read or written.
      StopRequested: SIGTERM came, to any of the processes; the state has been saved.
    """
    if re.match(r"[a-z][a-z0-9]*:/", str(workdir)):
        raise ValueError(f"{workdir} is no path of the file system: mount the bucket, and give a folder in it")
    workdir = Path(workdir)
    if not config.data.train:
        raise ValueError("data.train is empty: give a dataset made by `memo-jax prepare`, --config.data.train=DATASET")
    utterances = open_utterances(config.data.train)
    epoch_steps = steps_per_epoch(len(utterances), config.data.batch_size)
    recipe = build_recipe(config, epoch_steps)
    steps = functools.partial(configs.duration_in_steps, steps_per_epoch=epoch_steps)
    total = steps(config, "total")
    save_every = max(steps(config.checkpoint, "every"), 1)
    evaluation = load_evaluation(config)
    evaluate_every = max(steps(config.evaluation, "every"), 1)
    mesh = sharding.data_mesh()
    if config.data.batch_size % mesh.size:
        raise ValueError(f"data.batch_size {config.data.batch_size} is not a multiple of the {mesh.size} devices")
    first = jax.process_index() == 0
    banks = load_banks(config)
    processes.check_agreement({
        "the config": configs.config_to_json(config),
        "the dataset": utterances.fingerprint,
        "the version of memo-jax": memo_jax.__version__,
    } | {f"the bank of {name}": str(zlib.crc32(rows)) for name, rows in banks.items()})
    check_same_run(workdir, config)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(processes.StopRequest())
        batches = training_batches(
            utterances, batch_size=config.data.batch_size, global_crops=config.data.global_crops,
            global_seconds=config.data.global_seconds, local_crops=config.data.local_crops,
            local_seconds=config.data.local_seconds, seed=config.seed, process_index=jax.process_index(),
            process_count=jax.process_count(), workers=config.data.workers,
        )
        stack.callback(batches.close)
        state = initial_state(config, recipe, mesh)
        # Only now, so that a config which cannot work claims no workdir.
        if first:
            configs.save_config(workdir, config)
        checkpoints = stack.enter_context(Checkpointer(
            workdir, keep=config.checkpoint.keep, keep_every=steps(config.checkpoint, "keep_every") or None
        ))
        log = stack.enter_context(MetricsLog(workdir, active=first))
        state = restored(checkpoints, state, batches, workdir, config)
        begin = int(state.step)
        # A run killed before its first checkpoint evaluates the untrained network again.
        log.truncate_after(begin or -1)
        end = total if stop_at_step is None else min(stop_at_step, total)

        shown = stack.enter_context(Progress(total, "training", "step", initial=begin, active=first and not quiet))
        shown.write(announcement(config, utterances, banks, recipe, begin, total, epoch_steps))
        if begin >= end:
            shown.write(f"nothing to do: {workdir} has been trained for {begin} steps already")
        extra = {"fingerprint": utterances.fingerprint, "version": memo_jax.__version__}
        banks = sharding.replicate(mesh, banks)
        key = jax.jit(lambda: jax.random.key(config.seed + 1), out_shardings=sharding.replicated(mesh))()
        step_function = jitted_step(config, recipe, mesh)
        watch = CollapseWatch(config.collapse, config.model.prototypes)
        last: dict[str, float] = {}
        closed = bool(state.gate.closed)
        pending = None
        mark = time.perf_counter()

        def read(number, metrics):
            """Waits for a step's metrics and checks them."""
            nonlocal last, mark, closed
            last = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not last["gate/open"]:
                last = {k: v for k, v in last.items() if not k.startswith(("loss/contrastive", "alignment"))}
                if not closed and recipe.gate_rule.name != "never" and config.loss.contrastive:
                    shown.write(
                        f"step {number - 1}: the gate has closed ({recipe.gate_rule.name}); distillation goes on alone"
                    )
                closed = True
            watch.check(number, last)
            now = time.perf_counter()
            last["seconds_per_step"], mark = now - mark, now
            last["utterances_per_second"] = config.data.batch_size / last["seconds_per_step"]
            shown.update(1, loss=last["loss"])

        def write(number, evaluated):
            """Logs the metrics that were read, where a row is due."""
            if number % config.log_every_steps == 0 or number in (1, end) or evaluated:
                times = {"epoch": number / epoch_steps, "cpu_seconds": time.process_time()}
                log.write(number, last | evaluated | times)

        def evaluate(number):
            """Returns {"eer/…": percent} of the teachers. Each process computes it, so none waits for another."""
            nonlocal mark
            result = evaluation(recipe, {name: sharding.on_one_device(of) for name, of in state.teacher.items()})
            mark = time.perf_counter()
            shown.write(f"step {number}: " + ", ".join(f"{k} {v:.2f} %" for k, v in result.items()))
            return result

        if begin == 0 and evaluation:
            log.write(0, {"epoch": 0.0} | evaluate(0))
        for number in range(begin + 1, end + 1):
            batch = sharding.global_batch(mesh, next(batches))
            state, metrics = step_function(state, batch, banks, key)
            if pending:
                read(*pending)
                write(pending[0], {})
            pending = (number, metrics)
            stops = stop.reached(number)
            saves = number % save_every == 0 or number == end or stops
            evaluates = evaluation is not None and (number % evaluate_every == 0 or number == end)
            if saves or evaluates:
                # Checked first, so that a state that is not finite is never saved.
                read(*pending)
                pending = None
                check_finite(number, state)
                write(number, evaluate(number) if evaluates else {})
                if saves:
                    checkpoints.save(number, state, batches, extra)
            if stops and number < total:
                checkpoints.wait()
                raise processes.StopRequested(
                    f"SIGTERM: stopped after step {number}, which is saved; the same command goes on from there"
                )
    return last


def load_evaluation(config):
    """Returns a function (recipe, teachers) → {"eer/…": percent} for the config's trial list, or None."""
    if not config.evaluation.trials:
        if config.evaluation.data:
            raise ValueError("evaluation.data is set but evaluation.trials is not: give a trial list of its recordings")
        return None
    from memo_jax.evaluate import TrialEvaluation

    if not config.evaluation.data:
        raise ValueError("evaluation.trials is set but evaluation.data is not: give the dataset of its recordings")
    trials = TrialEvaluation(open_utterances(config.evaluation.data), config.evaluation.trials)

    def evaluation(recipe, teachers):
        return {f"eer/{name}": 100 * trials.eer(branch, teachers[name]) for name, branch in recipe.branches.items()}

    return evaluation


def announcement(
    config, utterances: Utterances, banks, recipe: Recipe, begin: int, total: int, epoch_steps: int
) -> str:
    """Returns what a run says when it starts."""
    bank_text = ", ".join(f"{len(rows)} {name}" for name, rows in banks.items())
    if not bank_text:
        bank_text = "no bank of noise or rooms" + (
            "; other utterances are added as babble" if config.augment.babble_from_batch else ""
        )
    lines = [
        f"{len(utterances)} utterances, {epoch_steps} steps an epoch, {total} steps in all"
        + (f", resumed after step {begin}" if begin else ""),
        f"branches {', '.join(recipe.branches)} on {jax.device_count()} {jax.devices()[0].platform} device(s)"
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")
        + f", gate rule {recipe.gate_rule.name}",
        f"augmentation: {bank_text}",
    ]
    return "\n".join(lines)
