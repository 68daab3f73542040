"""Rounds of pseudo-labels: cluster with the current network, train on the clusters, test, and repeat."""

import json
import os
from operator import attrgetter
from pathlib import Path
from typing import Any

from memo_jax import config as configs
from memo_jax.data.batches import Utterances
from memo_jax.files import check_local, read_text, replacing, write_text
from memo_jax.inference.cluster import ITERATIONS, cluster_text, cluster_to_table, embeddings_of, known_labels
from memo_jax.inference.embedder import load_model
from memo_jax.inference.evaluate import RATES, TrialEvaluation, training_evaluation
from memo_jax.inference.model_file import read_model, write_model
from memo_jax.inference.workdir import starting_parts, workdir_model
from memo_jax.locks import exclusive
from memo_jax.log import say
from memo_jax.training.saved_checkpoint import saved_steps
from memo_jax.training.train import FREE_ON_RESUME, check_same_config, train

OPTIONS, TABLE, BEST = "pseudo_label.json", "rounds.tsv", "best.safetensors"
MODEL, CLUSTERS, RESULTS = "model.safetensors", "clusters.tsv", "round.json"  # in the folder of a round
COLUMNS = ("round", *RATES, "clusters", "purity", "nmi", "verdict")
# The lists that rounds are compared on must stay what they are.
FREE = tuple(key for key in FREE_ON_RESUME if key != "evaluation.")


def pseudo_label(
    config: configs.ConfigDict,
    workdir: str | os.PathLike,
    model: str | os.PathLike,
    rounds: int,
    *,
    from_scratch: bool = False,
    kmeans: int | None = None,
    clusters: int | None = None,
    linkage: str = "ward",
    iterations: int = ITERATIONS,
    seed: int = 0,
    crops: int = 0,
    crop_seconds: float = 4.0,
    labels: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Trains networks in rounds, each on clusters made by the network before it, and keeps the best.

    Round r clusters the training data with the network of round r − 1, trains on the clusters, and measures the error
    rates on the validation list, `evaluation.trials`. Round 0 is the network to start from. If it is interrupted,
    calling it again resumes where it was and ends the same. More rounds may be asked for later.

    Args:
      config: of the training of a round, with `supervised.weight` above 0 and a validation list.
      workdir: folder, with a workdir of training `round_R` for every round. Gets rounds.tsv, and best.safetensors: the
        network with the lowest EER, which may be that of round 0.
      model: the network to start from: a workdir or a model file.
      rounds: at least 1.
      from_scratch: a round's training starts from random weights, not from the network that made its clusters.
      kmeans: as for `cluster_to_table`.
      clusters: likewise.
      linkage: likewise.
      iterations: likewise.
      seed: likewise.
      crops: as for `embeddings_of`.
      crop_seconds: likewise.
      labels: known speakers, for purity and NMI in the report alone.

    Returns:
      {"rounds": a list of {"round", the RATES, "clusters", "purity", "nmi", "verdict"}, "best": number of the best
      round, "output": its model file}. What is not known is None.

    Raises:
      ValueError: a config or network that cannot work, or a workdir of other rounds.
      TrainingStopped, StopRequested, OSError: as for `train`.
    """
    check_local(workdir)
    workdir = Path(workdir)
    check_config(config)
    if rounds < 1:
        raise ValueError(f"{rounds} rounds: give at least 1")
    if labels is not None:
        known_labels(labels)
    training_evaluation(config)  # checks the lists before the long work
    trials = TrialEvaluation(Utterances(config.evaluation.data), config.evaluation.trials)
    utterances = Utterances(config.data.train)
    start = load_model(model)
    branch = ",".join(name for name in start.member_arguments if name in config.model.branches) or None
    options = {
        "model": start.fingerprint,
        "dataset": utterances.fingerprint,
        "from_scratch": from_scratch,
        "kmeans": kmeans,
        "clusters": clusters,
        "linkage": linkage,
        "iterations": iterations,
        "seed": seed,
        "crops": crops,
        "crop_seconds": crop_seconds,
    }
    with exclusive(workdir, inside=True):
        check_same_config(workdir, config, FREE)
        check_same_options(workdir, options)
        if (workdir / f"round_{rounds + 1}" / RESULTS).exists():
            raise ValueError(f"{workdir} has more than {rounds} rounds, which would be lost: give as many or more")
        first = workdir / "round_0"
        if not (first / MODEL).exists():
            write_model(first / MODEL, start)
        if not from_scratch:
            starting_parts(configs.with_overrides(config, [f"--config.init={first / MODEL}"]))  # checks that it fits
        configs.save_config(workdir, config)
        write_text(workdir / OPTIONS, json.dumps(options, indent=2) + "\n")
        rows: list[dict] = []
        for number in range(rounds + 1):
            folder = workdir / f"round_{number}"
            if read_text(folder / RESULTS) is None:
                clustered: dict = {}
                if number:
                    clustered = clusters_of_round(folder, utterances, options, labels)
                    train_round(config, folder, from_scratch, branch)
                measure_round(folder, number, trials, clustered)
            rows.append(json.loads(read_text(folder / RESULTS)))
            judge(rows)
            best = best_round(rows)
            write_text(workdir / TABLE, table_text(rows, "\t"))
            with replacing(workdir / BEST) as partial:
                partial.write_bytes((workdir / f"round_{best}" / MODEL).read_bytes())
            say(f"round {number}: EER {rows[-1]['eer']:.2f} %, {rows[-1]['verdict']}")
    return {"rounds": rows, "best": best, "output": str(workdir / BEST)}


def check_config(config: configs.ConfigDict) -> None:
    """Raises ValueError naming a key with which there can be no rounds."""
    for key, wrong, wanted in (
        ("supervised.weight", not config.supervised.weight, "set it above 0, as configs/pseudo_labels.py does"),
        ("supervised.labels", config.supervised.labels, "leave it out: the rounds make the labels"),
        ("init", config.init, "leave it out: --model is the network to start from"),
        ("data.train", not config.data.train, "give a dataset made by `memo-jax prepare`"),
        ("evaluation.trials", not config.evaluation.trials, "give a validation list, to choose the best round by"),
    ):
        if wrong:
            raise ValueError(f"{key} is {attrgetter(key)(config)!r}: {wanted}")


def check_same_options(workdir: Path, options: dict) -> None:
    """Raises ValueError naming what differs if the rounds of a workdir were made with other options."""
    text = read_text(workdir / OPTIONS)
    if text is None:
        return
    old = json.loads(text)
    changed = [f"{key}: {old.get(key)} → {value}" for key, value in options.items() if old.get(key) != value]
    if changed:
        raise ValueError(
            f"the rounds in {workdir} were started with other options ({'; '.join(changed)}): give the same ones "
            "to resume, or use another workdir"
        )


def clusters_of_round(folder: Path, utterances: Utterances, options: dict, labels: str | os.PathLike | None) -> dict:
    """Clusters the dataset with the network of the previous round, unless that is done; returns the report."""
    report = folder / "clusters.json"
    if (text := read_text(report)) is None:
        before = read_model(previous(folder) / MODEL)
        found = cluster_to_table(
            embeddings_of(before, utterances, options["crops"], options["crop_seconds"]),
            folder / CLUSTERS,
            labels=labels,
            figure=folder / "sizes.png",
            **{key: options[key] for key in ("kmeans", "clusters", "linkage", "iterations", "seed")},
        )
        text = json.dumps(found, indent=2) + "\n"
        write_text(report, text)
        say(cluster_text(found))
    return json.loads(text)


def train_round(config: configs.ConfigDict, folder: Path, from_scratch: bool, branch: str | None) -> None:
    """Trains on the clusters of a round, or resumes it, and writes the teacher of `branch` as its model.

    Raises as `train` does.
    """
    changes = [f"--config.supervised.labels={folder / CLUSTERS}"]
    if not from_scratch:
        changes.append(f"--config.init={previous(folder) / MODEL}")
    of_round = configs.with_overrides(config, changes)
    start = None if saved_steps(folder) else starting_parts(of_round)
    if (begun := configs.read_config(folder)) is not None:  # perhaps by another path to this folder
        of_round = configs.with_overrides(of_round, [f"--config.init={begun.init}"])
    train(of_round, folder, evaluation=training_evaluation(of_round), start=start)
    write_model(folder / MODEL, workdir_model(folder, branch))


def measure_round(folder: Path, number: int, trials: TrialEvaluation, clustered: dict) -> None:
    """Writes the row of a round: the error rates of its network, and what its clusters are like."""
    network = read_model(folder / MODEL)
    measured = trials.rates(trials.network_scores(network.module, network.variables, network.front_end))
    row = {"round": number} | measured | {key: clustered.get(key) for key in ("clusters", "purity", "nmi")}
    write_text(folder / RESULTS, json.dumps(row, indent=2) + "\n")


def previous(folder: Path) -> Path:
    """Returns the folder of the previous round."""
    return folder.with_name(f"round_{int(folder.name.removeprefix('round_')) - 1}")


def best_round(rows: list[dict]) -> int:
    """Returns the number of the round with the lowest EER; of equal ones, with the lowest minDCF, then the first."""
    return min(rows, key=lambda row: tuple(row[key] for key in RATES))["round"]


def judge(rows: list[dict]) -> None:
    """Adds to the last round how it compares with those before."""
    *before, last = rows
    if not before:
        last["verdict"] = "the network to start from"
        return
    best = rows[best_round(before)]
    if best_round(rows) == last["round"]:
        last["verdict"] = f"the best so far (round {best['round']}: {best['eer']:.2f} %)"
    elif last["eer"] > before[-1]["eer"]:
        last["verdict"] = f"WORSE than round {before[-1]['round']} ({before[-1]['eer']:.2f} %)"
        if best is not before[-1]:
            last["verdict"] += f" and than round {best['round']} ({best['eer']:.2f} %), which is kept"
    else:
        last["verdict"] = f"not better than round {best['round']} ({best['eer']:.2f} %), which is kept"


def table_text(rows: list[dict], separator: str | None = None) -> str:
    """Returns the rounds as lines with a header: divided by a separator, or else in columns for people."""
    lines = [list(COLUMNS)]
    for row in rows:
        values = [row[key] for key in COLUMNS]
        lines.append(
            ["" if value is None else f"{value:.4g}" if type(value) is float else str(value) for value in values]
        )
    if separator is not None:
        return "".join(f"{separator.join(line)}\n" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() + "\n" for line in lines)


def rounds_text(result: dict) -> str:
    """Returns the result of `pseudo_label` as human-readable text."""
    text = table_text(result["rounds"])
    if result["best"] == 0:
        text += "no round has a lower EER than the network to start from, which is kept\n"
    else:
        text += f"the best is round {result['best']}\n"
    return text + result["output"]
