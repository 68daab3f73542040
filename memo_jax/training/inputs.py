"""What a run is made from, checked before anything is written: dataset, labels, recipe, and how long it is."""

import collections
import zlib
from typing import NamedTuple

import jax
import numpy as np

from memo_jax import config as configs
from memo_jax.data.batches import (
    TrainingBatches,
    Utterances,
    speaker_numbers,
    steps_per_epoch,
    table_numbers,
    training_batches,
)
from memo_jax.files import as_path
from memo_jax.log import plural
from memo_jax.training.monitor import Evaluation
from memo_jax.training.positives import Positives
from memo_jax.training.recipe import build_recipe, crop_numbers, has_loss_gate, reads_labels
from memo_jax.training.step import Recipe
from memo_jax.version import __version__
from memo_jax.xla import sharding


class Inputs(NamedTuple):
    """What a run is made from, checked: everything but the banks, which take long to load. Durations are in steps."""

    utterances: Utterances
    labels: np.ndarray | None  # of the utterances, −1 where unknown; None for training without labels
    label_note: str  # what to report about labels from a table, or ""
    recipe: Recipe
    positives: Positives | None
    epoch_steps: int
    total: int
    save_every: int
    keep_every: int
    evaluate_every: int


def checked_inputs(config: configs.ConfigDict, evaluation: Evaluation | None) -> Inputs:
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
    if config.checkpoint.keep < 1:
        raise ValueError(f"checkpoint.keep is {config.checkpoint.keep}: at least 1 checkpoint must stay")
    mesh = sharding.data_mesh()
    if config.data.batch_size % mesh.size:
        raise ValueError(f"data.batch_size {config.data.batch_size} is not a multiple of the {mesh.size} devices")
    of_processes = collections.Counter(device.process_index for device in mesh.devices.flat)
    if len(set(of_processes.values())) > 1:
        raise ValueError(f"the processes have {sorted(of_processes.values())} devices: give all of them equally many")
    inputs = Inputs(
        utterances,
        labels,
        label_note,
        recipe,
        positives,
        epoch_steps,
        total=configs.duration_in_steps(config, "total", epoch_steps),
        save_every=configs.interval_in_steps(config, "checkpoint.every", epoch_steps),
        keep_every=configs.duration_in_steps(config, "checkpoint.keep_every", epoch_steps),
        evaluate_every=configs.interval_in_steps(config, "evaluation.every", epoch_steps),
    )
    batches_of(config, inputs, 0).close()  # checks the crops; reads nothing yet
    return inputs


def labels_of(config: configs.ConfigDict, utterances: Utterances) -> tuple[np.ndarray | None, str]:
    """Returns the utterances' labels, None for training without, and what to report about those of a table, or "".

    Raises ValueError as `speaker_numbers` and `table_numbers` do.
    """
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


def batches_of(
    config: configs.ConfigDict, inputs: Inputs, start: int, partners: np.ndarray | None = None
) -> TrainingBatches:
    """Returns this process's batches of the steps after `start`, with the teachers' crops from `partners`, if given.

    Raises ValueError as `training_batches` does.
    """
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
    """Returns how many rows, into which recordings are cut, a bank holds, and their checksum."""
    return {"rows": len(rows), "checksum": zlib.crc32(rows)}


def data_record(config: configs.ConfigDict, utterances: Utterances, banks: dict[str, np.ndarray]) -> dict:
    """Returns the description of the data in run.json."""
    return {
        "train": str(config.data.train),
        "fingerprint": utterances.fingerprint,
        "utterances": len(utterances),
        "banks": {name: bank_record(rows) for name, rows in banks.items()},
    }


def evaluation_record(config: configs.ConfigDict) -> dict[str, int | str] | None:
    """Returns the checksum of the trial list that the config names and the fingerprint of its recordings, or None."""
    if not config.evaluation.trials:
        return None
    return {
        "trials": zlib.crc32(as_path(config.evaluation.trials).read_bytes()),
        "fingerprint": Utterances(config.evaluation.data).fingerprint,
    }


def data_identity(inputs: Inputs) -> dict:
    """Returns what identifies a dataset: the fingerprint of its audio, and a checksum of the labels used."""
    labels = None if inputs.labels is None else zlib.crc32(inputs.labels)
    return {"fingerprint": inputs.utterances.fingerprint, "labels": labels}


def agreed_inputs(config: configs.ConfigDict, inputs: Inputs) -> dict[str, str]:
    """Returns {name: text} of what must be the same in all processes before they load their banks."""
    return {
        "the config": configs.config_to_json(config),
        "the dataset": str(data_identity(inputs)),
        "the version of memo-jax": __version__,
    }


def agreed_banks(banks: dict[str, np.ndarray]) -> dict[str, str]:
    """Returns {name: text} of banks, which must be the same in all processes."""
    return {f"the bank of {name}": str(bank_record(rows)) for name, rows in banks.items()}
