"""Trial lists: embeddings of the recordings in them, scores, error rates, a report."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from memo_jax.audio import SAMPLE_RATE
from memo_jax.data.batches import Utterances, open_utterances
from memo_jax.files import as_path, write_text
from memo_jax.inference.batches import apply_to_recordings
from memo_jax.inference.embedder import load_model, log_mel_statistics
from memo_jax.inference.model_file import Decision, Model, embedding_function
from memo_jax.scoring import metrics
from memo_jax.scoring.calibration import fit_calibration
from memo_jax.scoring.score import DECIMALS, P_TARGETS, REPLICATES, eer_interval, error_report, rates_text, write_scores
from memo_jax.scoring.trials import read_trials, speaker_folder, trial_pairs

CRITERIA = ("eer", *(f"min_dcf_{p}" for p in P_TARGETS))  # what a threshold can be tuned for


class TrialEvaluation:
    """A trial list with the recordings in it.

    Args:
      utterances: dataset that holds the recordings.
      trials: path of the trial list.

    Attributes:
      trials: the list. target: bool [N], its labels.
      rows: int [M], the utterances that the trials mention; no others are embedded.
      pairs: int [N, 2], the two recordings of every trial, as indices into `rows`.

    Raises:
      ValueError: the list is malformed, lacks target or nontarget trials, or mentions a recording that is missing.
    """

    def __init__(self, utterances: Utterances, trials: str | os.PathLike):
        self.utterances = utterances
        self.trials = read_trials(trials)
        pairs = trial_pairs(self.trials, utterances.names)
        self.rows, inverse = np.unique(pairs, return_inverse=True)
        self.pairs = inverse.reshape(pairs.shape)
        self.target = self.trials.target
        for kind, present in (("target", self.target.any()), ("nontarget", not self.target.all())):
            if not present:
                raise ValueError(f"{trials} has no {kind} trial: error rates need both kinds")

    def embeddings(self, function, crops: int = 0, crop_seconds: float = 4.0, quiet: bool = False) -> np.ndarray:
        """Returns the embeddings [M, D] of the full recordings, or [M, crops, D] of their crops, as `rows`."""
        if not crops:
            return apply_to_recordings(function, self.utterances, self.rows, quiet=quiet)
        per_crop = [
            apply_to_recordings(
                function,
                Crops(self.utterances, i, crops, crop_seconds),
                self.rows,
                f"embedding crop {i + 1} of {crops}",
                quiet,
            )
            for i in range(crops)
        ]
        return np.stack(per_crop, axis=1)

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Returns the cosine score of every trial, [N], rounded as in scores.txt so that both give the same errors."""
        return np.round(metrics.cosine_scores(embeddings, self.pairs), DECIMALS)

    def eer(self, backbone: nn.Module, variables: Any) -> float:
        """Returns the equal error rate of a backbone with these variables, a fraction."""
        function = embedding_function(backbone, variables)
        return metrics.eer(self.scores(self.embeddings(function, quiet=True)), self.target)

    def statistics_scores(self, quiet: bool = False) -> np.ndarray:
        """Returns scores [N] by mean and deviation of the log-mel frames, standardised: the channel baseline."""
        statistics = apply_to_recordings(log_mel_statistics, self.utterances, self.rows, "log-mel statistics", quiet)
        statistics = (statistics - statistics.mean(axis=0)) / np.maximum(statistics.std(axis=0), 1e-6)
        return self.scores(statistics)

    def row_speakers(self) -> list[str]:
        """Returns the speaker of each of `rows`, "" where nobody knows.

        They are the dataset's or, if the dataset does not know all of them, the first folders of the names.
        """
        names, known = self.utterances.names, self.utterances.speakers
        if all(known):
            return [known[row] for row in self.rows]
        return [speaker_folder(names[row]) if "/" in names[row] else "" for row in self.rows]

    def speakers(self) -> dict[str, str]:
        """Returns {recording, as the trials name it: speaker}, without those of unknown speakers."""
        speakers = self.row_speakers()
        rows = np.empty(len(self.trials.recordings), np.int64)
        rows[self.trials.pairs] = self.pairs
        known = {name: speakers[row] for name, row in zip(self.trials.recordings, rows)}
        return {name: speaker for name, speaker in known.items() if speaker}


def training_evaluation(config) -> Callable[[Any, dict[str, Any]], dict[str, float]] | None:
    """Returns what `train` evaluates by: a function (recipe, {branch: backbone variables}) → {"eer/BRANCH": percent}.

    None if the config names no trial list. Raises ValueError if only one of evaluation.data and evaluation.trials is
    given, and as `TrialEvaluation`.
    """
    if not config.evaluation.trials:
        if config.evaluation.data:
            raise ValueError("evaluation.data is set but evaluation.trials is not: give a trial list of its recordings")
        return None
    if not config.evaluation.data:
        raise ValueError("evaluation.trials is set but evaluation.data is not: give the dataset of its recordings")
    trials = TrialEvaluation(open_utterances(config.evaluation.data), config.evaluation.trials)

    def evaluation(recipe, backbones):
        return {f"eer/{name}": 100 * trials.eer(of.backbone, backbones[name]) for name, of in recipe.branches.items()}

    return evaluation


class Crops:
    """One crop of each recording: number `index` of `count` crops spread evenly, each of `seconds`.

    Recordings that are shorter are repeated, as in training.
    """

    def __init__(self, waves, index: int, count: int, seconds: float):
        self.waves, self.share, self.samples = waves, index / max(count - 1, 1), round(seconds * SAMPLE_RATE)
        if self.samples < 1:
            raise ValueError(f"crops of {seconds} s: give a positive number of seconds")

    def __len__(self) -> int:
        return len(self.waves)

    def __getitem__(self, row) -> np.ndarray:
        wave = self.waves[row]
        start = round(self.share * max(len(wave) - self.samples, 0))
        return np.resize(wave[start : start + self.samples], self.samples)


def evaluate(
    model,
    data,
    trials,
    output,
    branch: str | None = None,
    role: str | None = None,
    step: int | None = None,
    crops: int = 0,
    crop_seconds: float = 4.0,
    save_threshold: str | None = None,
    replicates: int = REPLICATES,
    quiet: bool = False,
) -> dict:
    """Scores a trial list with a trained network and writes results.json, det.png and scores into `output`.

    The scores are lines `score enrol test` in the order of the trial list: scores.txt of the network,
    log_mel_statistics.txt of plain statistics.

    Args:
      model: workdir of a training run, or a model file.
      data: dataset with the recordings of the trials.
      trials: trial list, VoxCeleb form (`1 a b`) or Kaldi form (`a b target`).
      output: folder for the results; made when missing.
      branch, role, step: which network of a workdir, see `Embedder.load`.
      crops, crop_seconds: take so many crops of a recording, spread evenly, and the mean score of all pairs of them,
        instead of full recordings.
      save_threshold: one of CRITERIA: keep the threshold that reaches it here, and a calibration, with the model.
      replicates: of the bootstrap for the interval; 0 leaves it out.

    Returns:
      What results.json holds: `eer` (percent), `eer_interval`, `min_dcf_0.01`, `min_dcf_0.05`, `trials`, `targets`,
      the error rates of plain log-mel statistics under `log_mel_statistics`, and which network and data these are of.
    """
    network = load_model(model, branch=branch, role=role, step=step)
    evaluation = TrialEvaluation(open_utterances(data), trials)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    scores = evaluation.scores(evaluation.embeddings(network.function, crops, crop_seconds, quiet))
    baseline = evaluation.statistics_scores(quiet)
    results = error_report(scores, evaluation.target) | {
        "eer_interval": eer_interval(scores, evaluation.trials, evaluation.speakers(), replicates),
        "trials": len(evaluation.target),
        "targets": int(evaluation.target.sum()),
        "recordings": len(evaluation.rows),
        "log_mel_statistics": error_report(baseline, evaluation.target),
        "network": network_name(network),
        "fingerprint": network.fingerprint,
        "model": str(as_path(model)),
        **{key: network.provenance.get(key) for key in ("branch", "role", "step")},
        "data": str(data),
        "trial_list": str(trials),
        "crops": crops,
    }
    from memo_jax.report.learning_curves import plot_det

    plot_det(
        {results["network"]: (scores, evaluation.target), "log-mel statistics": (baseline, evaluation.target)},
        output / "det.png",
    )
    write_scores(output / "scores.txt", evaluation.trials, scores)
    write_scores(output / "log_mel_statistics.txt", evaluation.trials, baseline)
    if save_threshold is not None:
        from memo_jax.inference.workdir import save_decision

        decision = tuned_decision(scores, evaluation.target, save_threshold, trials)
        save_decision(model, network, decision)
        results["saved_threshold"] = decision.threshold
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def tuned_decision(scores, target, criterion: str, trials) -> Decision:
    """Returns the threshold of a criterion (of CRITERIA) on scores, with their calibration."""
    if criterion not in CRITERIA:
        raise ValueError(f"no threshold for {criterion!r}: choose one of {', '.join(CRITERIA)}")
    if criterion == "eer":
        point, unit = metrics.eer_point(scores, target), 100
    else:
        point, unit = metrics.min_dcf_point(scores, target, float(criterion.removeprefix("min_dcf_"))), 1
    fitted = fit_calibration(scores, target)
    text = (
        f"{criterion} of {unit * point.value:.4g}{' %' if unit == 100 else ''} on {len(target):,} trials of "
        f"{Path(trials).name}"
    )
    return Decision(point.threshold, fitted.scale, fitted.offset, text)


def network_name(model: Model) -> str:
    """Returns what to call a network in tables: "ecapa teacher, step 600", or its backbone."""
    known = model.provenance
    if {"branch", "role", "step"} <= known.keys():
        return f"{known['branch']} {known['role']}, step {known['step']}"
    return str(known.get("name", "network"))


def evaluation_text(results: dict) -> str:
    """Returns the results of `evaluate` as text for people."""
    counts = (results[name] for name in ("trials", "targets", "recordings"))
    lines = ["{:,} trials, {:,} of them target, {:,} recordings".format(*counts)]
    for name, row in ((results["network"], results), ("log-mel statistics", results["log_mel_statistics"])):
        lines.append(f"  {name:<28} {rates_text(row)}")
    if results["eer_interval"]:
        lines.append("  (in brackets the 95 % interval, by bootstrap over speakers)")
    else:
        lines.append("  (no interval: the speakers of the recordings are unknown or too few, or --replicates is 0)")
    if "saved_threshold" in results:
        lines.append(f"  threshold {results['saved_threshold']:.4f} is saved with the model")
    return "\n".join(lines)
