"""The training loop: from a config and a workdir to a trained run, resumed where an earlier start ended."""

import contextlib
import functools
import os
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import memo_jax
from memo_jax import config as configs
from memo_jax import interrupts
from memo_jax.data.batches import Utterances, speaker_numbers, steps_per_epoch, table_numbers, training_batches
from memo_jax.files import as_path, check_bucket
from memo_jax.locks import exclusive
from memo_jax.log import MetricsLog, Progress, plural
from memo_jax.models import SPEAKER_HEAD
from memo_jax.training import processes
from memo_jax.training.checkpoint import Checkpointer, load_extra
from memo_jax.training.gate import check_rule
from memo_jax.training.goodput import Goodput
from memo_jax.training.loss_gate import gate_threshold
from memo_jax.training.monitor import Evaluation, Monitor
from memo_jax.training.positives import Positives
from memo_jax.training.profile import ProfiledSteps, Profiler
from memo_jax.training.program import StepCompiledInBackground, abstract_state, augmentation_key, create_state
from memo_jax.training.recipe import build_recipe, crop_numbers, has_loss_gate, load_augmentation_banks, reads_labels
from memo_jax.training.run_record import RunRecord
from memo_jax.training.saved_checkpoint import saved_steps
from memo_jax.training.state import TrainState, Variables, backbone_variables
from memo_jax.training.step import Recipe
from memo_jax.xla import sharding
from memo_jax.xla.devices import chosen_devices

# Keys that a resumed run may change: they decide what is watched and kept, not what is learned. The dataset and the
# table of labels may move, since the fingerprint of the one and the checksum of the other identify them.
FREE_ON_RESUME = (
    "checkpoint.",
    "evaluation.",
    "log_every_steps",
    "data.train",
    "data.workers",
    "supervised.labels",
    "collapse.",
    "split_above_megabytes",
)
LENGTH = ("total_epochs", "total_steps")  # may grow: the run continues, with schedules that span the new length


class Inputs(NamedTuple):
    """What a run is made from, checked: everything but the banks, which take long to load. Durations are in steps."""

    utterances: Utterances
    labels: np.ndarray | None  # of the utterances, −1 where unknown; None for training without labels
    label_note: str  # what to tell about labels from a table, or ""
    recipe: Recipe
    positives: Positives | None
    epoch_steps: int
    total: int
    save_every: int
    keep_every: int
    evaluate_every: int


def train(
    config,
    workdir: str | os.PathLike,
    *,
    evaluation: Evaluation | None = None,
    start: Mapping[str, Variables] | None = None,
    stop_at_step: int | None = None,
    profile: ProfiledSteps | None = None,
    quiet: bool = False,
) -> dict[str, float]:
    """Trains the run of a workdir, or resumes it, and returns its last metrics.

    Args:
      config: a config with all keys of configs/base.py.
      workdir: folder of the run, local or gs://…; gets config.json, run.json, metrics.jsonl, tensorboard/ and
        checkpoints.
      evaluation: tests the teachers while training; `inference.evaluate.training_evaluation(config)`.
      start: parts of networks of the model file or workdir that `config.init` names, as in `program.create_state`;
        `inference.workdir.starting_parts(config)`.
      stop_at_step: stop there, with a checkpoint, as if interrupted; the schedules still span the whole run.
      profile: steps that the first process profiles into <workdir>/profile.
      quiet: show no progress.

    Raises:
      ValueError: a config that cannot work, or a workdir made with another one.
      TrainingStopped: losses are not finite, or the run has collapsed.
      OSError: the dataset, a bank or the workdir cannot be read or written, or another process trains in the workdir.
      StopRequested: one of the processes received SIGTERM; the state has been saved.
    """
    if config.init and not start:
        raise ValueError(f"init is {config.init}, but train() was given no network to start from")
    workdir, inputs = as_path(workdir), checked_inputs(config, evaluation)
    check_bucket(workdir)
    end = inputs.total if stop_at_step is None else min(stop_at_step, inputs.total)
    goodput = Goodput()
    first, mesh, recipe = jax.process_index() == 0, sharding.data_mesh(), inputs.recipe
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(processes.StopRequest())
        lock = processes.in_first(lambda: stack.enter_context(exclusive(workdir, inside=True)))
        begin = check_same_run(workdir, config, inputs)
        profiler = stack.enter_context(contextlib.closing(Profiler(workdir, profile, begin, end, active=first)))
        banks = load_augmentation_banks(config)
        processes.check_agreement(agreed_inputs(config, inputs, banks))
        interrupts.check()
        banks_here, positives = sharding.replicate(mesh, banks), inputs.positives

        def compiled_step(partnered):
            return stack.enter_context(StepCompiledInBackground(config, recipe, mesh, banks_here, partnered))

        if begin < end:
            take_step = compiled_step(positives is not None and positives.are_on(begin))
        if first:  # only now: a config that cannot work claims no workdir
            configs.save_config(workdir, config)
        checkpoints = stack.enter_context(
            Checkpointer(workdir, keep=config.checkpoint.keep, keep_every=inputs.keep_every)
        )
        log = stack.enter_context(MetricsLog(workdir, active=first))
        if begin:
            state = checkpoints.restore(abstract_state(config, recipe, mesh))
        else:
            start, start_note = with_known_speakers(config, inputs, start or {})
            state = create_state(config, recipe, mesh, start)
        partners = None
        if positives and positives.are_on(begin) and not positives.are_due(begin):
            partners = np.asarray(state.partners.addressable_data(0))
        batches = batches_of(config, inputs, begin, partners)
        stack.callback(lambda: batches.close())
        # A run killed before its first checkpoint evaluates the untrained network again.
        log.truncate_after(begin or -1)
        shown = stack.enter_context(
            Progress(inputs.total, "training", "step", initial=begin, active=first and not quiet)
        )
        shown.write(announcement(config, inputs, banks, begin))
        if not begin and start_note:
            shown.write(start_note)
        if begin >= end:
            shown.write(f"nothing to do: {workdir} has been trained for {begin} steps already")
        data, active = data_record(config, inputs.utterances, banks), first and begin < end
        record = RunRecord(workdir, seed=config.seed, data=data, begin=begin, total=inputs.total, active=active)
        if record.extended_from:
            shown.write(extension_text(record.extended_from, inputs.total, begin))
        extra = data_identity(inputs) | {"version": memo_jax.__version__}
        key = augmentation_key(config, mesh)
        monitor = Monitor(
            config, recipe, log, shown, goodput, end=end, epoch_steps=inputs.epoch_steps, evaluation=evaluation
        )
        monitor.starts_from(state, teacher_backbones(state) if begin == 0 else None)
        if partners is not None:
            monitor.lasting = positives.described(partners)
        for number in range(begin + 1, end + 1):
            if positives and positives.are_due(number - 1):
                with monitor.between_steps("positives"):
                    batches.close()  # it has read ahead with the partners of before
                    if number - 1 == positives.first != begin and crop_numbers(config, True) != crop_numbers(config):
                        take_step = compiled_step(True)
                    partners = positives.drawn(state, recipe, mesh, number - 1)
                    interrupts.check()
                    state = state.replace(partners=sharding.replicate(mesh, partners))
                    batches = batches_of(config, inputs, number - 1, partners)
                    monitor.lasting = positives.described(partners)
                    shown.write(partners_text(number - 1, monitor.lasting))
            profiler.before(number)
            with goodput.waiting_for_input(monitor.running):
                batch = sharding.global_batch(mesh, next(batches))
            with goodput.counting("compile") if take_step.is_new else contextlib.nullcontext():
                state, metrics = take_step(state, batch, banks_here, key)
            monitor.took(number, metrics)
            if number % inputs.epoch_steps == 0:
                state = at_epoch_end(config, state, number // inputs.epoch_steps, mesh, shown)
            if said := profiler.after(number, state):
                shown.write(said)
            stops = stop.reached(number)
            saves = stops or number == end or number % inputs.save_every == 0
            evaluates = evaluation is not None and (number == end or number % inputs.evaluate_every == 0)
            if saves or evaluates or monitor.untrained:
                # Checked first, so that a state that is not finite is never saved.
                monitor.settle(state, teacher_backbones(state) if evaluates else None)
            if saves:
                with goodput.counting("checkpoint"):
                    if lock:
                        lock.check()
                    log.upload()  # so that a run resumed from there has all rows up to it
                    checkpoints.save(number, state, extra)
            if stops and number < inputs.total:
                checkpoints.wait()
                record.end(number)
                raise processes.StopRequested(number)
        with goodput.counting("checkpoint"):
            checkpoints.wait()
        record.end(end)
        if begin < end:
            shown.write(str(goodput))
    return monitor.last


def at_epoch_end(config, state: TrainState, epoch: int, mesh: Mesh, shown: Progress) -> TrainState:
    """Returns the state with which the epoch after number `epoch`, from 1, begins: the loss gate is set anew."""
    if not has_loss_gate(config) or epoch < config.supervised.loss_gate_after_epochs:
        return state
    losses = np.asarray(state.loss_gate.losses.addressable_data(0))
    threshold = processes.from_first(np.float32(gate_threshold(losses)))
    passing, seen = int((losses <= threshold).sum()), int((losses >= 0).sum())
    shown.write(
        f"epoch {epoch}: the loss gate is at {threshold:.4g}; {plural(len(losses) - passing, 'utterance')} of {seen:,} "
        "left out"
    )
    return state.replace(loss_gate=state.loss_gate.replace(threshold=sharding.replicate(mesh, threshold)))


def partners_text(step: int, metrics: Mapping[str, float]) -> str:
    """Returns the message of new partners."""
    same = metrics.get("positives/same_speaker")
    return f"step {step}: drew partners; {metrics['positives/other']:.1%} have another recording than their own" + (
        "" if same is None else f", {same:.1%} of these of the same speaker"
    )


def extension_text(before: int, total: int, begin: int) -> str:
    """Returns the message of a run that resumes with a greater length."""
    return (
        f"extended from {before} to {total} steps: the schedules span the new length from step {begin + 1} on, so this "
        f"run differs from one that was {total} steps long from the start"
    )


def checked_inputs(config, evaluation: Evaluation | None) -> Inputs:
    """Returns what the config asks for; raises ValueError, naming the key, for a config that cannot work."""
    if not config.data.train:
        raise ValueError("data.train is empty: give a dataset made by `memo-jax prepare`, --config.data.train=DATASET")
    if config.evaluation.trials and evaluation is None:
        raise ValueError(
            "evaluation.trials is set, but train() was given no evaluation: give it "
            "evaluation=memo_jax.inference.evaluate.training_evaluation(config)"
        )
    utterances = Utterances(config.data.train)
    epoch_steps = steps_per_epoch(len(utterances), config.data.batch_size)
    labels, label_note = labels_of(config, utterances)
    recipe = build_recipe(config, epoch_steps, 1 if labels is None else int(labels.max()) + 1, len(utterances))
    positives = Positives(config, utterances, epoch_steps) if config.positives.clusters else None
    check_rule(recipe.gate_rule)
    if config.checkpoint.keep < 1:
        raise ValueError(f"checkpoint.keep is {config.checkpoint.keep}: at least 1 checkpoint must stay")
    devices = sharding.data_mesh().size
    if config.data.batch_size % devices:
        raise ValueError(f"data.batch_size {config.data.batch_size} is not a multiple of the {devices} devices")
    steps = functools.partial(configs.duration_in_steps, steps_per_epoch=epoch_steps)
    inputs = Inputs(
        utterances,
        labels,
        label_note,
        recipe,
        positives,
        epoch_steps,
        total=steps(config, "total"),
        save_every=max(steps(config.checkpoint, "every"), 1),
        keep_every=steps(config.checkpoint, "keep_every"),
        evaluate_every=max(steps(config.evaluation, "every"), 1),
    )
    batches_of(config, inputs, 0).close()  # checks the crops; reads nothing yet
    return inputs


def labels_of(config, utterances: Utterances) -> tuple[np.ndarray | None, str]:
    """Returns the utterances' labels, None for training without, and what to tell about those of a table, or ""."""
    if not reads_labels(config):
        return None, ""
    table = config.supervised.labels
    if not table:
        return speaker_numbers(utterances), ""
    labels, unused = table_numbers(utterances, table)
    note = f"labels: {labels.max() + 1:,} of {table}"
    if missing := int((labels < 0).sum()):
        note += f"; {plural(missing, 'utterance')} without a label: not part of the loss on labels"
    if unused:
        note += f"; {plural(unused, 'name')} of the table not in the dataset"
    return labels, note


def with_known_speakers(config, inputs: Inputs, start: Mapping[str, Variables]) -> tuple[Mapping[str, Variables], str]:
    """Returns the parts to start from, with speaker heads only for the labels that they are of, and what to tell."""
    if inputs.labels is None or not any(SPEAKER_HEAD in parts["params"] for parts in start.values()):
        return start, ""
    if load_extra(config.init)["labels"] == data_identity(inputs)["labels"]:
        return start, f"the labels are those of {config.init}: their directions go on"
    without = {
        branch: parts | {"params": {part: tree for part, tree in parts["params"].items() if part != SPEAKER_HEAD}}
        for branch, parts in start.items()
    }
    return without, f"the labels are not those of {config.init}: their directions start anew"


def check_same_config(workdir: str | os.PathLike, config, free: tuple[str, ...] = FREE_ON_RESUME) -> None:
    """Raises ValueError naming the keys, of those not in `free`, when the workdir was made with another config."""
    old = configs.read_config(workdir)
    if old is not None:
        changed = [d for d in configs.config_differences(old, config) if not d.startswith(free)]
        if changed:
            raise ValueError(
                f"{workdir} was made with another config ({'; '.join(changed)}): use another workdir, or give the "
                "same values to resume"
            )


def check_same_run(workdir: str | os.PathLike, config, inputs: Inputs) -> int:
    """Returns the step that a run resumes after, 0 at its beginning.

    Raises ValueError for another dataset, or for another config, apart from a greater length.
    """
    check_same_config(workdir, config, (*FREE_ON_RESUME, *LENGTH))
    steps = saved_steps(workdir)
    if not steps:
        return 0
    saved = load_extra(workdir)
    for kind, value in data_identity(inputs).items():
        if saved[kind] != value:
            if kind == "labels" and config.supervised.labels:
                raise ValueError(
                    f"supervised.labels: {config.supervised.labels} does not have the labels that {workdir} was "
                    "trained with: give that table to resume, or use another workdir"
                )
            what = "its fingerprint differs" if kind == "fingerprint" else "its speakers differ"
            raise ValueError(
                f"{config.data.train} is not the dataset that {workdir} was trained on ({what}): "
                "give that one to resume, or use another workdir"
            )
    old, new = (
        configs.duration_in_steps(one, "total", inputs.epoch_steps)
        for one in (configs.read_config(workdir) or config, config)
    )
    if new < old:
        raise ValueError(
            f"{workdir} is a run of {old} steps and cannot become one of {new}: a run may be extended, not shortened; "
            f"--stop-at-step {new} stops it there"
        )
    return steps[-1]


def batches_of(config, inputs: Inputs, start: int, partners: np.ndarray | None = None):
    """Returns this process's batches of the steps after `start`, with the teachers' crops from `partners`, if given."""
    numbers = crop_numbers(config, partners is not None)
    return training_batches(
        inputs.utterances,
        batch_size=config.data.batch_size,
        global_crops=numbers["global"],
        global_seconds=config.data.global_seconds,
        local_crops=numbers["local"],
        local_seconds=config.data.local_seconds,
        teacher_crops=numbers["teacher"],
        partners=partners,
        seed=config.seed,
        start=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        labels=inputs.labels,
        numbered=has_loss_gate(config),
    )


def bank_record(rows: np.ndarray) -> dict[str, int]:
    """Returns how many rows a bank holds, into which recordings are cut, and a checksum of them."""
    return {"rows": len(rows), "checksum": zlib.crc32(rows)}


def data_record(config, utterances: Utterances, banks: dict[str, np.ndarray]) -> dict:
    """Returns the description of the data in run.json."""
    return {
        "train": str(config.data.train),
        "fingerprint": utterances.fingerprint,
        "utterances": len(utterances),
        "banks": {name: bank_record(rows) for name, rows in banks.items()},
    }


def data_identity(inputs: Inputs) -> dict:
    """Returns what identifies a dataset: the fingerprint of its audio, and a checksum of the labels used."""
    labels = None if inputs.labels is None else zlib.crc32(inputs.labels)
    return {"fingerprint": inputs.utterances.fingerprint, "labels": labels}


def agreed_inputs(config, inputs: Inputs, banks: dict[str, np.ndarray]) -> dict[str, str]:
    """Returns {name: text} of everything that must be the same in all processes."""
    return {
        "the config": configs.config_to_json(config),
        "the dataset": str(data_identity(inputs)),
        "the version of memo-jax": memo_jax.__version__,
    } | {f"the bank of {name}": str(bank_record(rows)) for name, rows in banks.items()}


def teacher_backbones(state: TrainState) -> dict:
    """Returns {branch: variables} of the teachers' backbones, as one device of this process holds them."""
    return {name: sharding.on_one_device(backbone_variables(of)) for name, of in state.teacher.items()}


def announcement(config, inputs: Inputs, banks: dict[str, np.ndarray], begin: int) -> str:
    """Returns what a run says when it starts."""
    devices = chosen_devices()
    # Recordings are cut into rows of a bank, so these are no numbers of recordings.
    cut = f" × {config.augment.bank_seconds:g} s"
    bank_text = ", ".join(
        plural(len(rows), "room response") if name == "rir" else f"{name} {len(rows)}{cut}"
        for name, rows in banks.items()
    )
    if not bank_text:
        bank_text = "no bank of noise or rooms" + (
            "; other utterances are added as babble" if config.augment.babble_from_batch else ""
        )
    lines = [
        f"{len(inputs.utterances)} utterances, {inputs.epoch_steps} steps an epoch, {inputs.total} steps in all"
        + (f", resumed after step {begin}" if begin else ""),
        f"branches {', '.join(inputs.recipe.branches)} on {len(devices)} {devices[0].platform} device(s)"
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")
        + f", gate rule {inputs.recipe.gate_rule.name}",
        f"augmentation: {bank_text}",
    ]
    if inputs.label_note:
        lines.append(inputs.label_note)
    return "\n".join(lines)
