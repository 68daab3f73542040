"""Trial lists: embeddings of the recordings in them, scores, error rates, a report."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from memo_jax.audio import SAMPLE_RATE
from memo_jax.config import ConfigDict
from memo_jax.data.batches import Utterances
from memo_jax.files import as_path, check_writable, in_bucket, is_zip, write_text
from memo_jax.inference.batches import WaveFunction, apply_to_recordings
from memo_jax.inference.embedder import check_embedding, load_model
from memo_jax.inference.hub import is_hub_name
from memo_jax.inference.model_file import Decision, Model, check_holds_only, write_decision
from memo_jax.inference.network import embedding_function, statistics_of_waves
from memo_jax.log import plural
from memo_jax.scoring import metrics
from memo_jax.scoring.calibration import fit_calibration
from memo_jax.scoring.score import (
    DECIMALS,
    P_TARGETS,
    REPLICATES,
    error_intervals,
    error_report,
    interval_note,
    rates_text,
    warnings_of,
    write_scores,
)
from memo_jax.scoring.trials import read_trials, recording_rows, speaker_folder, trial_pairs

RATES = ("eer", *(f"min_dcf_{p}" for p in P_TARGETS))
CRITERIA = RATES  # what a threshold can be tuned for


class TrialEvaluation:
    """A trial list with the recordings in it.

    Args:
      utterances: dataset that holds the recordings.
      trials: path of the trial list.
      enrollments: table of speakers enrolled by several recordings, see `read_trials`.

    Attributes:
      trials: the list. target: bool [N], its labels; None for a list without labels.
      rows: int [M], the utterances that the trials mention; no others are embedded.
      pairs: int [N, 2], the two recordings of every trial, as indices into `rows`; of an enrolled speaker the first.

    Raises:
      ValueError: the list is malformed, has target trials alone or nontarget trials alone, or mentions a recording that
        is missing.
    """

    def __init__(self, utterances: Utterances, trials: str | os.PathLike, enrollments: str | os.PathLike | None = None):
        self.utterances = utterances
        self.trials = read_trials(trials, enrollments)
        self.target = self.trials.target
        if self.target is not None:
            self.trials.require_both_kinds()
        recordings = recording_rows(self.trials, utterances.names)
        self.rows, self._positions = np.unique(recordings, return_inverse=True)
        self.pairs = np.searchsorted(self.rows, trial_pairs(self.trials, utterances.names))

    def embeddings(
        self, function: WaveFunction, crops: int = 0, crop_seconds: float = 4.0, quiet: bool = False
    ) -> np.ndarray:
        """Returns the embeddings of `rows`: [M, D] of the full recordings, or [M, crops, D] of their crops.

        Raises ValueError, naming the recording, for an embedding that is not finite.
        """
        if not crops:
            return self._checked(apply_to_recordings(function, self.utterances, self.rows, quiet=quiet))
        per_crop = crop_embeddings(function, self.utterances, crops, crop_seconds, self.rows, quiet)
        return self._checked(np.stack(list(per_crop), axis=1))

    def _checked(self, embeddings):
        for row, embedding in zip(self.rows, embeddings):
            check_embedding(self.utterances.names[row], embedding)
        return embeddings

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Returns the cosine score of every trial, [N], rounded as in scores.txt so that both yield the same errors."""
        sides = self.trials.side_embeddings(embeddings[self._positions])
        return np.round(metrics.cosine_scores(sides, self.trials.pairs), DECIMALS)

    def network_scores(self, backbone: nn.Module, variables: Any, front_end: str = "log_mel") -> np.ndarray:
        """Returns the scores [N] by a backbone with these variables and this front end."""
        return self.scores(self.embeddings(embedding_function(backbone, variables, front_end), quiet=True))

    def rates(self, scores: np.ndarray) -> dict[str, float]:
        """Returns the RATES of scores [N]; the EER in percent."""
        report = error_report(scores, self.target)
        return {key: report[key] for key in RATES}

    def statistics_scores(self, quiet: bool = False) -> np.ndarray:
        """Returns scores [N] by mean and deviation of the log-mel frames, standardised: the channel baseline."""
        statistics = apply_to_recordings(statistics_of_waves, self.utterances, self.rows, "log-mel statistics", quiet)
        statistics = (statistics - statistics.mean(axis=0)) / np.maximum(statistics.std(axis=0), 1e-6)
        return self.scores(statistics)

    def row_speakers(self) -> list[str]:
        """Returns the speaker of each of `rows`, "" where unknown.

        They are the dataset's or, if the dataset does not know all of them, the first folders of the names.
        """
        names, known = self.utterances.names, self.utterances.speakers
        if all(known):
            return [known[row] for row in self.rows]
        return [speaker_folder(names[row]) if "/" in names[row] else "" for row in self.rows]

    def speakers(self) -> dict[str, str]:
        """Returns {recording, as the trials name it: speaker}, without those of unknown speakers."""
        speakers = self.row_speakers()
        known = {name: speakers[row] for name, row in zip(self.trials.recordings, self._positions)}
        return {name: speaker for name, speaker in known.items() if speaker}


def training_evaluation(config: ConfigDict) -> Callable[[Any, dict[str, Any]], dict[str, float]] | None:
    """Returns what `train` evaluates with: a function (recipe, {branch: backbone variables}) → {"RATE/BRANCH": value}.

    The rates are RATES: "eer" in percent, "min_dcf_0.01", "min_dcf_0.05". Where there are several branches, the last
    ones are those of their mean score, under all their names, such as "ecapa,resnet".
    None if the config names no trial list. Raises ValueError if only one of evaluation.data and evaluation.trials is
    given, and like `TrialEvaluation`.
    """
    if not config.evaluation.trials:
        if config.evaluation.data:
            raise ValueError("evaluation.data is set but evaluation.trials is not: give a trial list of its recordings")
        return None
    if not config.evaluation.data:
        raise ValueError("evaluation.trials is set but evaluation.data is not: give the dataset of its recordings")
    listed = TrialEvaluation(Utterances(config.evaluation.data), config.evaluation.trials)
    listed.trials.require_both_kinds()  # a list without labels, too, is of no use here

    def evaluation(recipe, backbones):
        scores = {
            name: listed.network_scores(branch.backbone, backbones[name], config.features.front_end)
            for name, branch in recipe.branches.items()
        }
        if len(scores) > 1:
            scores[",".join(scores)] = metrics.average_scores(list(scores.values()))
        return {f"{key}/{name}": rate for name, found in scores.items() for key, rate in listed.rates(found).items()}

    return evaluation


class Crops:
    """One crop of each recording: number `index` of `count` crops spread evenly, each of `seconds`.

    Recordings that are shorter are repeated, as in training.

    Args:
      waves: the recordings, int16 [L] at 16 kHz.
      index: from 0.
      count: at least 1.
      seconds: length of a crop, positive.

    Raises:
      ValueError: crops that hold no sample.
    """

    def __init__(self, waves: Sequence[np.ndarray], index: int, count: int, seconds: float):
        self.waves, self.share, self.samples = waves, index / max(count - 1, 1), round(seconds * SAMPLE_RATE)
        if self.samples < 1:
            raise ValueError(f"crops of {seconds} s: give a positive number of seconds")

    def __len__(self) -> int:
        return len(self.waves)

    def __getitem__(self, row: int) -> np.ndarray:
        wave = self.waves[row]
        start = round(self.share * max(len(wave) - self.samples, 0))
        return np.resize(wave[start : start + self.samples], self.samples)


def crop_embeddings(
    function: WaveFunction,
    waves: Sequence[np.ndarray],
    crops: int,
    seconds: float,
    rows: Sequence[int] | None = None,
    quiet: bool = False,
) -> Iterator[np.ndarray]:
    """Yields the embeddings of each crop, float32 [N, D]; arguments as of `Crops` and `apply_to_recordings`."""
    for i in range(crops):
        of_crop = Crops(waves, i, crops, seconds)
        yield apply_to_recordings(function, of_crop, rows, f"embedding crop {i + 1} of {crops}", quiet)


def evaluate(
    model: str | os.PathLike,
    data: str | os.PathLike,
    trials: str | os.PathLike,
    output: str | os.PathLike,
    branch: str | None = None,
    role: str | None = None,
    step: int | None = None,
    crops: int = 0,
    crop_seconds: float = 4.0,
    save_threshold: str | None = None,
    save_calibration: str | os.PathLike | None = None,
    enrollments: str | os.PathLike | None = None,
    replicates: int = REPLICATES,
    quiet: bool = False,
) -> dict:
    """Scores a trial list with a trained network and writes results.json, det.png and scores into `output`.

    The scores are lines `score enrol test` in the order of the trial list: scores.txt of the network,
    log_mel_statistics.txt of plain statistics.

    Args:
      model: workdir of a training run, a model file, an exported program, or a repository on the Hub.
      data: dataset with the recordings of the trials.
      trials: trial list, see `read_trials`; for one without labels, only scores are written, no error rates.
      output: folder for the results; created if missing.
      branch: of a workdir's networks, the one to test; as for `Embedder.load`.
      role: of a workdir: "teacher" or "student".
      step: of a workdir's checkpoints, the one to test; the latest by default.
      crops: take this many crops of a recording, spread evenly, and the mean score of all pairs of them, instead of
        full recordings; 0 for full recordings.
      crop_seconds: length of a crop.
      save_threshold: one of CRITERIA: save the threshold at this criterion, and a calibration, with the model.
      save_calibration: file for the same, for models that cannot be written; the criterion is `save_threshold` or EER.
      enrollments: table of speakers enrolled by several recordings, see `read_trials`.
      replicates: how many draws of speakers the bootstrap takes for intervals; 0 for none.
      quiet: show no progress.

    Returns:
      What results.json holds: `eer` (percent), `min_dcf_0.01`, `min_dcf_0.05`, the interval of each, such as
      `eer_interval`, `trials`, `targets`, the error rates of plain log-mel statistics under `log_mel_statistics`, and
      which network and data these belong to.

    Raises:
      ValueError: bad trials, recordings that the dataset lacks, an embedding that is not finite, a list without labels
        to tune on, crops to tune on, a threshold that cannot be tuned or cannot be saved with this model, or see
        `Embedder.load`.
      OSError: no such model, dataset or list (FileNotFoundError), or a result cannot be written.
    """
    network = load_model(model, branch=branch, role=role, step=step)
    if save_threshold is not None:
        _check_can_keep_threshold(model, network)
    evaluation = TrialEvaluation(Utterances(data), trials, enrollments)
    target = evaluation.target
    tuned = save_threshold is not None or save_calibration is not None
    if target is None and tuned:
        option = "--save-calibration" if save_threshold is None else "--save-threshold"
        raise ValueError(f"{trials} has no labels, so no threshold can be tuned on it: leave out {option}")
    if crops and tuned:
        raise ValueError("verify embeds whole recordings, so no threshold can be tuned with crops: leave out --crops")
    output = Path(output)
    if save_calibration is not None:
        check_writable(save_calibration)
    check_writable(output / "results.json")  # before the minutes that embedding takes
    scores = evaluation.scores(evaluation.embeddings(network.function, crops, crop_seconds, quiet))
    results: dict[str, Any] = {
        "trials": len(evaluation.trials),
        "recordings": len(evaluation.rows),
        "self_trials": int(evaluation.trials.self_tests.sum()),
        "network": network.name,
        "fingerprint": network.fingerprint,
        "model": str(as_path(model)),
        **{key: network.provenance.get(key) for key in ("branch", "role", "step")},
        "data": str(data),
        "trial_list": str(trials),
        "crops": crops,
        "crop_seconds": crop_seconds,
        "enrollments": None if enrollments is None else str(enrollments),
    }
    if target is None:
        write_scores(output / "scores.txt", evaluation.trials, scores)
        write_text(output / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
        return results
    # Not at the top: `memo-jax train` imports this module, draws nothing, and would wait half a second for matplotlib.
    from memo_jax.scoring.figures import BASELINE, plot_det

    baseline = evaluation.statistics_scores(quiet)
    statistics = error_report(baseline, target)
    results |= error_report(scores, target) | {"targets": int(target.sum()), "log_mel_statistics": statistics}
    results |= error_intervals(scores, evaluation.trials, evaluation.speakers(), replicates)
    results["worse_than_statistics"] = [key for key in RATES if results[key] > statistics[key]]
    plot_det({results["network"]: (scores, target), BASELINE: (baseline, target)}, output / "det.png")
    write_scores(output / "scores.txt", evaluation.trials, scores)
    write_scores(output / "log_mel_statistics.txt", evaluation.trials, baseline)
    try:
        if tuned:
            decision = tuned_decision(scores, target, save_threshold or "eer", trials)
            _save_decision(decision, network, None if save_threshold is None else model, save_calibration, results)
    finally:  # results are worth having even without a threshold
        write_text(output / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results


def _check_can_keep_threshold(model: str | os.PathLike, network: Model) -> None:
    """Raises ValueError where no threshold can be saved with the model, before the minutes that embedding takes."""
    if is_hub_name(model) or not in_bucket(model) and is_zip(model):
        raise ValueError(
            f"{model}: no threshold can be saved there: give the workdir or model file that it is from, then export or "
            "push that again"
        )
    if not in_bucket(model) and os.path.isfile(model):
        check_holds_only(model, network)


def _save_decision(
    decision: Decision,
    network: Model,
    model: str | os.PathLike | None,
    file: str | os.PathLike | None,
    results: dict[str, Any],
) -> None:
    """Saves a decision with the model and in a file, where given; `results` say what was saved, also if one fails."""
    kept = {"saved_threshold": decision.threshold, "calibration": {"scale": decision.scale, "offset": decision.offset}}
    if model is not None:
        from memo_jax.inference.workdir import save_decision

        save_decision(model, network, decision)
        results |= kept | {"saved_in": ["the model"]}
    if file is not None:
        write_decision(file, decision, network.fingerprint)
        results |= kept | {"saved_in": [*results.get("saved_in", []), str(file)]}


def tuned_decision(scores: np.ndarray, target: np.ndarray, criterion: str, trials: str | os.PathLike) -> Decision:
    """Returns the threshold of a criterion (of CRITERIA) on scores, with their calibration.

    The threshold is halfway between the last score that is accepted and the next lower one.

    Raises ValueError where the criterion is best met by accepting nobody: that is not a threshold.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"no threshold for {criterion!r}: choose one of {', '.join(CRITERIA)}")
    if criterion == "eer":
        point, unit = metrics.eer_point(scores, target), 100
    else:
        point, unit = metrics.min_dcf_point(scores, target, float(criterion.removeprefix("min_dcf_"))), 1
    if point.threshold > scores.max():
        raise ValueError(
            f"{criterion} is best ({point.value:.4g}) when nobody is accepted, so no threshold was saved: these scores "
            "do not tell speakers apart well enough for it; use --save-threshold eer"
        )
    fitted = fit_calibration(scores, target)
    below = scores[scores < point.threshold]
    threshold = (point.threshold + below.max()) / 2 if len(below) else point.threshold
    text = (
        f"{criterion} of {unit * point.value:.4g}{' %' if unit == 100 else ''} on {len(target):,} trials of "
        f"{Path(trials).name}"
    )
    return Decision(float(threshold), fitted.scale, fitted.offset, text)


def evaluation_text(results: dict) -> str:
    """Returns the results of `evaluate` as human-readable text."""
    from memo_jax.scoring.figures import BASELINE

    counts = [plural(results["trials"], "trial"), plural(results["recordings"], "recording")]
    if "eer" not in results:
        return f"{', '.join(counts)}\n  the list has no labels: scores are written, error rates are unknown"
    lines = [f"{counts[0]}, {results['targets']:,} of them target, {counts[1]}"]
    width = max(28, len(results["network"]))
    for name, row in ((results["network"], results), (BASELINE, results["log_mel_statistics"])):
        lines.append(f"  {name:<{width}} {rates_text(row)}")
    lines += [interval_note(results), *warnings_of(results)]
    if results["eer"] > 50:
        lines.append("  WARNING: targets have lower scores than nontargets: are the labels of the list swapped?")
    if results["worse_than_statistics"]:
        names = ", ".join("EER" if key == "eer" else f"minDCF({key[8:]})" for key in results["worse_than_statistics"])
        lines.append(f"  WARNING: in {names} the network is worse than plain log-mel statistics")
    if "saved_threshold" in results:
        scale, offset = (results["calibration"][key] for key in ("scale", "offset"))
        lines.append(
            f"  threshold {results['saved_threshold']:.4f} and calibration {scale:.3f} · score {offset:+.3f} are saved "
            f"with {' and '.join(results['saved_in'])}"
        )
    return "\n".join(lines)
