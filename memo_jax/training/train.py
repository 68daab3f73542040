"""The training loop: from a config and a workdir to a trained run, resumed if it was begun before."""

import concurrent.futures
import contextlib
import functools
import time
import zlib
from pathlib import Path

import jax
import numpy as np

import memo_jax
from memo_jax import config as configs
from memo_jax.data.batches import Utterances, open_utterances, steps_per_epoch, training_batches
from memo_jax.files import as_path, check_bucket
from memo_jax.log import MetricsLog, Progress
from memo_jax.training import processes
from memo_jax.training import state as states
from memo_jax.training.checkpoint import Checkpointer, load_extra, saved_steps
from memo_jax.training.collapse import CollapseWatch, check_finite
from memo_jax.training.program import create_state, lowered_step
from memo_jax.training.recipe import build_recipe, load_augmentation_banks
from memo_jax.training.run_record import RunRecord
from memo_jax.training.step import Recipe
from memo_jax.xla import sharding

# Keys that a resumed run may change: they say what is watched and kept, not what is learnt. The dataset may move; that
# it is the same one its fingerprint tells.
FREE_ON_RESUME = (
    "checkpoint.",
    "evaluation.",
    "log_every_steps",
    "data.train",
    "data.workers",
    "collapse.",
    "split_above_megabytes",
)
TIMES = ("seconds_per_step", "utterances_per_second", "cpu_seconds")  # what a row says of the machine's speed


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


def train(config, workdir, *, start=None, stop_at_step: int | None = None, quiet: bool = False) -> dict:
    """Trains (or goes on training) the run of a workdir and returns its last metrics.

    Args:
      config: a config with all keys of configs/base.py.
      workdir: folder of the run, perhaps gs://…: config.json, run.json, metrics.jsonl, tensorboard/, checkpoints.
      start: {branch: variables of its backbone} that a new run begins with, read from the model file that `config.init`
        names (`inference.workdir.starting_backbones`).
      stop_at_step: stop there, with a checkpoint, as if interrupted; the schedules still span the whole run.
      quiet: show no progress.

    Raises:
      ValueError: a config that cannot work, or a workdir made with another one.
      TrainingStopped: losses are not finite, or the run has collapsed.
      OSError: the dataset, a bank or the workdir cannot be read or written.
      StopRequested: SIGTERM came, to any of the processes; the state has been saved.
    """
    workdir = as_path(workdir)
    if not config.data.train:
        raise ValueError("data.train is empty: give a dataset made by `memo-jax prepare`, --config.data.train=DATASET")
    if config.init and not start:
        raise ValueError(f"config.init is {config.init!r}, but no network of that file was given")
    check_bucket(workdir)
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
    banks = load_augmentation_banks(config)
    processes.check_agreement(
        {
            "the config": configs.config_to_json(config),
            "the dataset": utterances.fingerprint,
            "the version of memo-jax": memo_jax.__version__,
        }
        | {f"the bank of {name}": str(bank_summary(rows)) for name, rows in banks.items()}
    )
    check_same_run(workdir, config)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(processes.StopRequest())
        batches = training_batches(
            utterances,
            batch_size=config.data.batch_size,
            global_crops=config.data.global_crops,
            global_seconds=config.data.global_seconds,
            local_crops=config.data.local_crops,
            local_seconds=config.data.local_seconds,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.data.workers,
        )
        stack.callback(batches.close)
        end = total if stop_at_step is None else min(stop_at_step, total)
        banks_here = sharding.replicate(mesh, banks)
        # Compiled beside all that comes before the first step. An error there is told at once, not after compiling.
        compiler = concurrent.futures.ThreadPoolExecutor(1, "compiler")
        stack.callback(compiler.shutdown, wait=False)
        if max(saved_steps(workdir), default=0) < end:
            # Traced here and not beside what comes next: two threads that trace take turns.
            step_function = compiler.submit(lowered_step(config, recipe, mesh, banks_here).compile)
        state = create_state(config, recipe, mesh, start)
        # Only now, so that a config which cannot work claims no workdir.
        if first:
            configs.save_config(workdir, config)
        checkpoints = stack.enter_context(
            Checkpointer(
                workdir, keep=config.checkpoint.keep, keep_every=steps(config.checkpoint, "keep_every") or None
            )
        )
        log = stack.enter_context(MetricsLog(workdir, active=first))
        state = restored(checkpoints, state, batches, workdir, config)
        begin = int(state.step)
        # A run killed before its first checkpoint evaluates the untrained network again.
        log.truncate_after(begin or -1)

        shown = stack.enter_context(Progress(total, "training", "step", initial=begin, active=first and not quiet))
        shown.write(announcement(config, utterances, banks, recipe, begin, total, epoch_steps))
        if begin >= end:
            shown.write(f"nothing to do: {workdir} has been trained for {begin} steps already")
        made_of = {
            "train": str(config.data.train),
            "fingerprint": utterances.fingerprint,
            "utterances": len(utterances),
            "banks": {name: bank_summary(rows) for name, rows in banks.items()},
        }
        record = RunRecord(workdir, seed=config.seed, data=made_of, begin=begin, active=first and begin < end)
        extra = {"fingerprint": utterances.fingerprint, "version": memo_jax.__version__}
        key = jax.jit(lambda: jax.random.key(config.seed + 1), out_shardings=sharding.replicated(mesh))()
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

        def evaluate(number, backbones):
            """Returns {"eer/…": percent} of `backbones`. Each process computes it, so none waits for another."""
            nonlocal mark
            result = evaluation(recipe, backbones)
            mark = time.perf_counter()
            shown.write(f"step {number}: " + ", ".join(f"{k} {v:.2f} %" for k, v in result.items()))
            return result

        # Evaluated after the first step, whose program is so compiled without the evaluation's beside it.
        untrained = jax.tree.map(np.array, teacher_backbones(state)) if begin == 0 and evaluation else None
        for number in range(begin + 1, end + 1):
            batch = sharding.global_batch(mesh, next(batches))
            if number == begin + 1:
                take_step = step_function.result()
                jax.clear_caches()  # of all that the process has traced: 70 MB with the authors' sizes
            state, metrics = take_step(state, batch, banks_here, key)
            if pending:
                read(*pending)
                write(pending[0], {})
            pending = (number, metrics)
            stops = stop.reached(number)
            saves = number % save_every == 0 or number == end or stops
            evaluates = evaluation is not None and (number % evaluate_every == 0 or number == end)
            if saves or evaluates or untrained:
                # Checked first, so that a state that is not finite is never saved.
                read(*pending)
                pending = None
                check_finite(number, state)
                if untrained:
                    log.write(0, {"epoch": 0.0} | evaluate(0, untrained))
                    untrained = None
                write(number, evaluate(number, teacher_backbones(state)) if evaluates else {})
                if saves:
                    log.upload()  # so that a run resumed from there has all rows up to it
                    checkpoints.save(number, state, batches, extra)
            if stops and number < total:
                checkpoints.wait()
                record.end(number)
                raise processes.StopRequested(
                    f"SIGTERM: stopped after step {number}, which is saved; the same command goes on from there"
                )
        checkpoints.wait()
        record.end(end)
    return last


def bank_summary(rows) -> dict:
    """Returns how many recordings a bank holds, and a checksum of them."""
    return {"recordings": len(rows), "checksum": zlib.crc32(rows)}


def teacher_backbones(state: states.TrainState) -> dict:
    """Returns {branch: variables} of the teachers' backbones, as one device of this process holds them."""
    return {name: sharding.on_one_device(states.backbone_variables(of)) for name, of in state.teacher.items()}


def load_evaluation(config):
    """Returns a function (recipe, teacher_backbones) → {"eer/…": percent} for the config's trial list, or None."""
    if not config.evaluation.trials:
        if config.evaluation.data:
            raise ValueError("evaluation.data is set but evaluation.trials is not: give a trial list of its recordings")
        return None
    from memo_jax.inference.evaluate import TrialEvaluation

    if not config.evaluation.data:
        raise ValueError("evaluation.trials is set but evaluation.data is not: give the dataset of its recordings")
    trials = TrialEvaluation(open_utterances(config.evaluation.data), config.evaluation.trials)

    def evaluation(recipe, backbones):
        return {f"eer/{name}": 100 * trials.eer(of.backbone, backbones[name]) for name, of in recipe.branches.items()}

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
