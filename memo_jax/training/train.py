"""The training loop: from a config and a workdir to a trained run, resumed where an earlier start ended."""

import contextlib
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from memo_jax import config as configs
from memo_jax import interrupts
from memo_jax.files import as_path, check_bucket
from memo_jax.locks import Lock, exclusive
from memo_jax.log import MetricsLog, Progress, plural
from memo_jax.models import SPEAKER_HEAD, Variables
from memo_jax.training import processes
from memo_jax.training.checkpoint import Checkpointer, load_extra
from memo_jax.training.feed import Feed
from memo_jax.training.goodput import Goodput
from memo_jax.training.inputs import (
    Inputs,
    agreed_banks,
    agreed_inputs,
    bank_record,
    checked_inputs,
    data_identity,
    data_record,
    evaluation_record,
)
from memo_jax.training.loss_gate import gate_threshold
from memo_jax.training.monitor import Evaluation, Monitor
from memo_jax.training.profile import ProfiledSteps, Profiler
from memo_jax.training.program import abstract_state, create_state
from memo_jax.training.recipe import has_loss_gate, load_augmentation_banks
from memo_jax.training.run_record import RunRecord, length_at, read_run
from memo_jax.training.saved_checkpoint import saved_steps
from memo_jax.training.state import TrainState, backbone_variables
from memo_jax.version import __version__
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


def train(
    config: configs.ConfigDict,
    workdir: str | os.PathLike,
    *,
    evaluation: Evaluation | None = None,
    start: Mapping[str, Variables] | None = None,
    stop_at_step: int | None = None,
    profile: ProfiledSteps | None = None,
) -> dict[str, float]:
    """Trains the run of a workdir, or resumes it, and returns its last metrics.

    Args:
      config: a config with all keys of configs/base.py.
      workdir: folder of the run, local or gs://…; gets config.json, run.json, metrics.jsonl, tensorboard/ and
        checkpoints.
      evaluation: tests the teachers while training; `inference.evaluate.training_evaluation(config)`.
      start: parts of networks of the model file or workdir that `config.init` names, as in `program.create_state`;
        `inference.workdir.starting_parts(config)`. A run that resumes needs none.
      stop_at_step: stop there, with a checkpoint, as if interrupted; the schedules still span the whole run.
      profile: steps that the first process profiles into <workdir>/profile.

    Raises:
      ValueError: a config that cannot work, or a workdir made with another one.
      TrainingStopped: losses are not finite, or the run has collapsed.
      OSError: the dataset, a bank or the workdir cannot be read or written, or another process trains in the workdir.
      StopRequested: one of the processes received SIGTERM; the state has been saved.
    """
    workdir, inputs = as_path(workdir), checked_inputs(config, evaluation)
    check_bucket(workdir)
    end = inputs.total if stop_at_step is None else min(stop_at_step, inputs.total)
    first, mesh, recipe, goodput = jax.process_index() == 0, sharding.data_mesh(), inputs.recipe, Goodput()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(processes.StopRequest())
        lock = processes.on_first_process(lambda: stack.enter_context(exclusive(workdir, inside=True)))
        begin = check_same_run(workdir, config, inputs)
        if config.init and not start and not begin:
            raise ValueError(f"init is {config.init}, but train() was given no network to start from")
        profiler = stack.enter_context(contextlib.closing(Profiler(workdir, profile, begin, end, active=first)))
        steps = {"the latest checkpoint": str(begin), "the step to stop at": str(end)}
        processes.check_agreement(agreed_inputs(config, inputs) | steps)
        banks = checked_banks(config, workdir, begin)
        interrupts.check()
        feed = stack.enter_context(Feed(config, inputs, mesh, banks, begin, compiles=begin < end))
        if first:  # only now: a config that cannot work claims no workdir
            configs.save_config(workdir, config)
        checkpoints = stack.enter_context(Checkpointer(workdir, config.checkpoint.keep, inputs.keep_every))
        log = stack.enter_context(MetricsLog(workdir, active=first))
        state, start_note = state_after(begin, config, inputs, mesh, checkpoints, start or {})
        # A run killed before its first checkpoint evaluates the untrained network again.
        log.truncate_after(begin or -1)
        progress = stack.enter_context(Progress(inputs.total, "training", "step", begin, active=first))
        record = start_record(workdir, config, inputs, banks, begin, end, start_note, progress)
        monitor = Monitor(
            config, recipe, log, progress, goodput, end=end, epoch_steps=inputs.epoch_steps, evaluation=evaluation
        )
        monitor.start(state, None if begin else teacher_backbones(state), load_extra(workdir) if begin else {})
        feed.open(state, monitor)
        for number in range(begin + 1, end + 1):
            state = take_step(number, state, inputs, feed, monitor, profiler)
            stops = stop.reached(number)
            saves = stops or number == end or number % inputs.save_every == 0
            evaluates = evaluation is not None and (number == end or number % inputs.evaluate_every == 0)
            if saves or evaluates or monitor.untrained:
                # Checked first, so that a state that is not finite is never saved.
                monitor.settle(state, teacher_backbones(state) if evaluates else None)
            if saves:
                save(number, state, inputs, checkpoints, monitor, lock)
            if stops and number < inputs.total:
                checkpoints.wait()
                record.end(number)
                raise processes.StopRequested(number)
        with goodput.counting("checkpoint"):
            checkpoints.wait()
        record.end(end)
        if begin < end:
            progress.write(str(goodput))
    return monitor.last


def take_step(
    number: int, state: TrainState, inputs: Inputs, feed: Feed, monitor: Monitor, profiler: Profiler
) -> TrainState:
    """Takes step `number` on the next batch and returns the state after it; the old state is donated."""
    goodput, progress = monitor.goodput, monitor.progress
    state = feed.prepare(number, state, monitor, progress)
    profiler.start_if_due(number)
    with goodput.waiting_for_input(monitor.running):
        batch = feed.batch()
    with goodput.counting("compile") if feed.compiles_next else contextlib.nullcontext():
        state, metrics = feed.step(state, batch)
    monitor.record(number, metrics)
    state = with_new_loss_gate(monitor.config, inputs, state, number, progress)
    if said := profiler.stop_if_due(number, state):
        progress.write(said)
    return state


def save(
    number: int, state: TrainState, inputs: Inputs, checkpoints: Checkpointer, monitor: Monitor, lock: Lock | None
) -> None:
    """Saves the state after step `number`; the first process, which has the lock, checks that it still does."""
    with monitor.between_steps("checkpoint"):
        if lock:
            lock.check()
        monitor.log.upload()  # so that a run resumed from there has all rows up to it
        checkpoints.save(number, state, data_identity(inputs) | monitor.to_save() | {"version": __version__})


def with_new_loss_gate(
    config: configs.ConfigDict, inputs: Inputs, state: TrainState, number: int, progress: Progress
) -> TrainState:
    """Returns the state with which the step after `number` begins: after an epoch, with a new loss-gate threshold."""
    epoch, left = divmod(number, inputs.epoch_steps)
    if left or not has_loss_gate(config) or epoch < config.supervised.loss_gate_after_epochs:
        return state
    losses = np.asarray(state.loss_gate.losses.addressable_data(0))
    threshold = processes.broadcast_from_first(np.float32(gate_threshold(losses)))
    passing, seen = int((losses <= threshold).sum()), int((losses >= 0).sum())
    progress.write(
        f"epoch {epoch}: the loss gate is at {threshold:.4g}; {plural(len(losses) - passing, 'utterance')} of {seen:,} "
        "left out"
    )
    return state.replace(
        loss_gate=state.loss_gate.replace(threshold=sharding.replicate(sharding.data_mesh(), threshold))
    )


def state_after(
    step: int,
    config: configs.ConfigDict,
    inputs: Inputs,
    mesh: Mesh,
    checkpoints: Checkpointer,
    start: Mapping[str, Variables],
) -> tuple[TrainState, str]:
    """Returns the state after the latest checkpoint's step and "", or that before step 1 and a note about `start`."""
    if step:
        return checkpoints.restore(abstract_state(config, inputs.recipe, mesh)), ""
    start, note = with_known_speakers(config, inputs, start)
    return create_state(config, inputs.recipe, mesh, start), note


def with_known_speakers(
    config: configs.ConfigDict, inputs: Inputs, start: Mapping[str, Variables]
) -> tuple[Mapping[str, Variables], str]:
    """Returns the parts to start from, with speaker heads only if their labels are the same, and a note."""
    if inputs.labels is None or not any(SPEAKER_HEAD in parts["params"] for parts in start.values()):
        return start, ""
    # The labels are numbers of speakers: those of another dataset are other people.
    before = load_extra(config.init)
    if all(before[key] == value for key, value in data_identity(inputs).items()):
        return start, f"the labels are those of {config.init}: the speaker heads are kept"
    without = {
        branch: parts | {"params": {part: tree for part, tree in parts["params"].items() if part != SPEAKER_HEAD}}
        for branch, parts in start.items()
    }
    return without, f"the labels are not those of {config.init}: the speaker heads start from random values"


def check_same_config(
    workdir: str | os.PathLike, config: configs.ConfigDict, free: tuple[str, ...] = FREE_ON_RESUME
) -> None:
    """Raises ValueError naming the keys not in `free` in which the config differs from that of the workdir."""
    old = configs.read_config(workdir)
    if old is not None:
        changed = [d for d in configs.config_differences(old, config) if not d.startswith(free)]
        if changed:
            raise ValueError(
                f"{workdir} was made with another config ({'; '.join(changed)}): use another workdir, or give the "
                "same values to resume"
            )


def check_same_run(workdir: str | os.PathLike, config: configs.ConfigDict, inputs: Inputs) -> int:
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
    # Not that of its config: an extension may have ended before its first checkpoint.
    old, new = length_at(workdir, steps[-1]) or inputs.total, inputs.total
    if new < old:
        raise ValueError(
            f"{workdir} is a run of {old} steps and cannot become one of {new}: a run may be extended, not shortened; "
            f"--stop-at-step {new} stops it there"
        )
    return steps[-1]


def checked_banks(config: configs.ConfigDict, workdir: str | os.PathLike, begin: int) -> dict[str, np.ndarray]:
    """Returns the config's banks; raises ValueError if those of processes differ, or those that the run began with."""
    banks = load_augmentation_banks(config)
    if banks:
        processes.check_agreement(agreed_banks(banks))
    if begin:
        check_same_banks(workdir, banks)
    return banks


def check_same_banks(workdir: str | os.PathLike, banks: dict[str, np.ndarray]) -> None:
    """Raises ValueError naming a bank whose folder no longer yields what the run of a workdir began with."""
    before = (read_run(workdir) or {"data": {"banks": {}}})["data"]["banks"]
    changed = [name for name, rows in banks.items() if before.get(name, now := bank_record(rows)) != now]
    if changed:
        keys = ", ".join("augment." + ("rirs" if name == "rir" else name) for name in changed)
        raise ValueError(
            f"{keys}: the recordings there are not those that {workdir} was trained with: give those to resume, or use "
            "another workdir"
        )


def teacher_backbones(state: TrainState) -> dict:
    """Returns {branch: variables} of the teachers' backbones, copied to this host: the next step donates its state.

    Host arrays at every step: each way in which arrays can be placed on devices would need programs of its own.
    """
    backbones = {name: backbone_variables(of) for name, of in state.teacher.items()}
    return jax.tree.map(np.array, sharding.on_one_device(backbones))


def start_record(
    workdir: str | os.PathLike,
    config: configs.ConfigDict,
    inputs: Inputs,
    banks: dict[str, np.ndarray],
    begin: int,
    end: int,
    start_note: str,
    progress: Progress,
) -> RunRecord:
    """Returns the record of this start, from step `begin` to `end`, and says what is trained on what."""
    record = RunRecord(
        workdir,
        seed=config.seed,
        data=data_record(config, inputs.utterances, banks),
        evaluation=evaluation_record(config),
        begin=begin,
        total=inputs.total,
        active=jax.process_index() == 0 and begin < end,
    )
    progress.write(announcement(config, inputs, banks, begin, start_note, record.extended_from))
    if begin >= end:
        progress.write(f"nothing to do: {workdir} has been trained for {begin} steps already")
    return record


def announcement(
    config: configs.ConfigDict,
    inputs: Inputs,
    banks: dict[str, np.ndarray],
    begin: int,
    start_note: str,
    extended_from: int | None,
) -> str:
    """Returns what a run says when it starts."""
    devices = chosen_devices()
    # Recordings are cut into rows of a bank, so these are not numbers of recordings.
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
        f"branches {', '.join(inputs.recipe.branches)} on {plural(len(devices), devices[0].platform + ' device')}"
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")
        + f", gate rule {inputs.recipe.gate_rule.name}",
        f"augmentation: {bank_text}",
    ]
    lines += filter(None, (inputs.label_note, start_note))
    if inputs.positives and inputs.positives.first >= inputs.total:
        lines.append(
            f"positives.clusters is set, but partners would first be drawn after step {inputs.positives.first}: lower "
            "positives.from_epochs or positives.from_steps to have any"
        )
    if extended_from:
        lines.append(
            f"extended from {extended_from} to {inputs.total} steps: the schedules span the new length from step "
            f"{begin + 1} on, so this run differs from one that was {inputs.total} steps long from the start"
        )
    return "\n".join(lines)
