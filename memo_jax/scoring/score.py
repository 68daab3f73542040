"""Embeddings and a trial list → scores and the error rates that the field reports."""

import os
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from typing import Any

import numpy as np

from memo_jax.files import one_line, write_text
from memo_jax.log import plural
from memo_jax.scoring import calibration, confidence, metrics
from memo_jax.scoring.embedding_file import Embeddings, check_same_model, read_embeddings
from memo_jax.scoring.trials import (
    Trials,
    name_without_extension,
    read_table,
    read_trials,
    recording_rows,
    speaker_folder,
    speaker_pairs,
    text_lines,
)

P_TARGETS = (0.01, 0.05)
REPLICATES = 1000  # of the bootstrap
DECIMALS = 6  # of a score

Speakers = Callable[[str], str] | Mapping[str, str]


def error_report(scores: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Returns `eer` in percent, the `eer_threshold` on the scores, and `min_dcf_P` for every P of P_TARGETS."""
    equal = metrics.eer_point(scores, target)
    return {"eer": 100 * equal.value, "eer_threshold": equal.threshold} | {
        f"min_dcf_{p}": metrics.min_dcf(scores, target, p) for p in P_TARGETS
    }


def error_intervals(
    scores: np.ndarray, trials: Trials, speakers: Speakers = speaker_folder, replicates: int = REPLICATES
) -> dict[str, Any]:
    """Returns the 95 % intervals of EER and minDCF by the bootstrap over speakers.

    Returns:
      {"eer_interval": [low, high] in percent, "min_dcf_P_interval": [low, high] for every P of P_TARGETS}, or None for
      each of them and "no_interval", why there is none.
    """
    measures = {"eer_interval": (100, metrics.WeightedTrials.eer)}
    measures |= {f"min_dcf_{p}_interval": (1, methodcaller("min_dcf", p)) for p in P_TARGETS}
    if replicates == 0:
        return dict.fromkeys(measures) | {"no_interval": "the number of bootstrap replicates is 0"}
    intervals = {}
    try:
        pairs = speaker_pairs(trials, speakers)
        for name, (unit, metric) in measures.items():
            found = confidence.bootstrap_interval(metric, scores, trials.target, pairs, replicates=replicates)
            intervals[name] = [unit * end for end in found]
    except ValueError as error:
        return dict.fromkeys(measures) | {"no_interval": one_line(error)}
    return intervals


def calibrated_report(
    scores: np.ndarray, target: np.ndarray, tuning_scores: np.ndarray, tuning_target: np.ndarray
) -> dict[str, float]:
    """Returns `act_dcf_P`, `cllr` and `min_cllr` of scores calibrated on other trials, and what was fitted.

    That is `calibration_scale` and `calibration_offset`, with `calibration_eer`, in percent, of the trials fitted on.
    """
    fitted = calibration.fit_calibration(tuning_scores, tuning_target)
    llrs = fitted(scores)
    return {f"act_dcf_{p}": calibration.act_dcf(llrs, target, p) for p in P_TARGETS} | {
        "cllr": calibration.cllr(llrs, target),
        "min_cllr": calibration.min_cllr(scores, target),
        "calibration_scale": fitted.scale,
        "calibration_offset": fitted.offset,
        "calibration_eer": 100 * metrics.eer(tuning_scores, tuning_target),
    }


def trial_scores(
    embeddings: np.ndarray,
    pairs: np.ndarray,
    *,
    cohort: np.ndarray | None = None,
    mean_subtraction: bool = False,
    as_norm: int = 0,
) -> np.ndarray:
    """Returns the scores of trials, float64 [N].

    Args:
      embeddings: [M, D], or [M, R, D] for R crops per recording.
      pairs: int [N, 2], rows of the two recordings of each trial.
      cohort: embeddings [C, D] of other recordings, whose speakers are unknown.
      mean_subtraction: subtract the cohort's mean from every embedding, the cohort's too.
      as_norm: normalise by this many nearest cohort utterances; 0 for none.

    Raises:
      ValueError: a cohort is needed and missing, or see `metrics.cosine_scores` and `metrics.as_norm`.
    """
    if cohort is None and (mean_subtraction or as_norm):
        raise ValueError("mean subtraction and AS-norm need a cohort: embeddings of recordings that are in no trial")
    if mean_subtraction:
        embeddings, cohort = (metrics.subtract_mean(rows, cohort) for rows in (embeddings, cohort))
    scores = metrics.cosine_scores(embeddings, pairs)
    return metrics.as_norm(scores, embeddings, pairs, cohort, top=as_norm) if as_norm else scores


def score(
    embeddings: Sequence[str | os.PathLike],
    trials: str | os.PathLike,
    *,
    cohorts: Sequence[str | os.PathLike] = (),
    mean_subtraction: bool = False,
    as_norm: int = 0,
    calibration_trials: str | os.PathLike | None = None,
    compare: Sequence[str | os.PathLike] = (),
    speakers: str | os.PathLike | None = None,
    enrollments: str | os.PathLike | None = None,
    replicates: int = REPLICATES,
    scores_file: str | os.PathLike | None = None,
) -> dict:
    """Scores a trial list by files of embeddings; the scores of several files (both branches) are averaged.

    Args:
      embeddings: files with the recordings of the trials, one per system.
      trials: trial list, see `read_trials`; for one without labels, only `scores_file` is written.
      cohorts: files of embeddings of other recordings, one for each of `embeddings`, in their order.
      mean_subtraction: see `trial_scores`.
      as_norm: see `trial_scores`.
      calibration_trials: another list of recordings in `embeddings`, to calibrate on.
      compare: files of embeddings of another system: is the first better? Scored by plain cosine.
      speakers: table with lines `name speaker` (Kaldi's utt2spk) for the bootstrap; the first folder of names by
        default.
      enrollments: table of speakers enrolled by several recordings, see `read_trials`.
      replicates: how many draws of speakers the bootstrap takes; 0 leaves it out.
      scores_file: where to write `score enrol test` lines.

    Returns:
      {"eer": percent, "eer_threshold", "min_dcf_0.01", "min_dcf_0.05", and of each rate the interval, "eer_interval",
      "min_dcf_0.01_interval", …: [low, high] or None, "trials", "targets"}, with calibration also "act_dcf_0.01",
      "act_dcf_0.05", "cllr", "min_cllr", with a comparison "comparison": {"eer", "min_dcf_…", "difference", "interval",
      "p_value"}. Whatever makes error rates come out too low is counted: "self_trials" (of a recording with itself),
      with a cohort "cohort_in_trials" (its recordings that are in the trials), with calibration
      "calibration_trials_in_both" (trials that it was fitted on). Without labels, rates are missing.

    Raises:
      ValueError: bad input, named; also when cohort and embeddings are from different models.
    """
    if cohorts and len(cohorts) != len(embeddings):
        raise ValueError(f"{len(cohorts)} cohorts for {len(embeddings)} files of embeddings: give one for each")
    if cohorts and not (mean_subtraction or as_norm):
        raise ValueError("a cohort is for --mean-subtraction or --as-norm N: add one of them, or leave out --cohort")
    listed = read_trials(trials, enrollments)
    if listed.target is not None:
        listed.require_both_kinds()
    elif scores_file is None:
        raise ValueError(f"{trials} has no labels, so only scores can be written: give --scores FILE")
    else:
        needless = {"calibrate": calibration_trials, "compare": compare, "speakers": speakers}
        if given := [f"--{name}" for name, value in needless.items() if value]:
            raise ValueError(f"{trials} has no labels, so there are no error rates: leave out {' and '.join(given)}")
    systems = [read_embeddings(path) for path in embeddings]
    backgrounds = [_cohort_of(*files) for files in zip(systems, embeddings, cohorts)] or [None] * len(systems)

    def treated_scores(listed):
        return metrics.average_scores(
            [
                trial_scores(
                    listed.side_embeddings(system.embeddings[recording_rows(listed, system.names, path)]),
                    listed.pairs,
                    mean_subtraction=mean_subtraction,
                    as_norm=as_norm,
                    cohort=None if background is None else background.embeddings,
                )
                for path, system, background in zip(embeddings, systems, backgrounds)
            ]
        )

    scores = treated_scores(listed)
    results: dict[str, Any] = {"trials": len(listed), "models": [system.model for system in systems]}
    results["self_trials"] = int(listed.self_tests.sum())
    if cohorts:
        results["cohort_in_trials"] = max(
            _recordings_in_trials(listed, system, background) for system, background in zip(systems, backgrounds)
        )
    if listed.target is not None:
        results |= _labelled_results(
            scores, listed, treated_scores, speakers, replicates, calibration_trials, enrollments, compare
        )
    if scores_file is not None:
        write_scores(scores_file, listed, scores)
    return results


def _cohort_of(system: Embeddings, path, cohort) -> Embeddings:
    """The cohort of a system; ValueError if it is from another model or of another dimension."""
    background = read_embeddings(cohort)
    check_same_model(system.model, path, background.model, cohort)
    dimensions = system.embeddings.shape[1], background.embeddings.shape[1]
    if dimensions[0] != dimensions[1]:
        raise ValueError(
            f"{path} has {dimensions[0]}-dimensional embeddings and its cohort {cohort} {dimensions[1]}-dimensional "
            "ones: embed both with one model"
        )
    return background


def _labelled_results(
    scores, trials: Trials, treated_scores, speakers, replicates, calibration_trials, enrollments, compare
) -> dict[str, Any]:
    """What `score` returns for a list with labels."""
    table = speaker_folder
    if speakers is not None:
        table = read_table(speakers, "name", "speaker")
        speaker_pairs(trials, table)  # a table that does not fit is an error, uninformative names are not
    results = {"targets": int(trials.target.sum())} | error_report(scores, trials.target)
    results |= error_intervals(scores, trials, table, replicates)
    if calibration_trials is not None:
        tuning = read_trials(calibration_trials, enrollments)
        tuning.require_both_kinds()
        results |= calibrated_report(scores, trials.target, treated_scores(tuning), tuning.target) | {
            "calibration_trials": str(calibration_trials),
            "calibration_trials_in_both": _trials_in_both(trials, tuning),
        }
    if compare:
        others = [(path, read_embeddings(path)) for path in compare]
        plain = metrics.average_scores(
            [
                trial_scores(
                    trials.side_embeddings(other.embeddings[recording_rows(trials, other.names, path)]), trials.pairs
                )
                for path, other in others
            ]
        )
        results["comparison"] = comparison(scores, plain, trials, table, replicates)
    return results


def _recordings_in_trials(trials: Trials, system: Embeddings, cohort: Embeddings) -> int:
    """How many recordings of a cohort are in trials: by name, whatever the extension, or by the same embedding."""
    named = {name_without_extension(name) for name in trials.recordings}
    rows = {system.embeddings[row].tobytes() for row in recording_rows(trials, system.names)}
    return sum(
        name_without_extension(name) in named or row.tobytes() in rows
        for name, row in zip(cohort.names, cohort.embeddings)
    )


def _trials_in_both(one: Trials, other: Trials) -> int:
    """How many trials of the first list are in the second, too, in either order."""
    known = {frozenset(pair) for pair in zip(other.enrol, other.test)}
    return sum(frozenset(pair) in known for pair in zip(one.enrol, one.test))


def comparison(
    scores: np.ndarray, other_scores: np.ndarray, trials: Trials, speakers: Speakers, replicates: int = REPLICATES
) -> dict:
    """Returns the other system's error rates, and the difference of the EERs, ours − theirs, in percent.

    With `replicates` of the paired bootstrap also its 95 % `interval` and the `p_value` of "not better"; None without.
    """
    other = error_report(other_scores, trials.target)
    row = {key: value for key, value in other.items() if key != "eer_threshold"} | {
        "difference": 100 * metrics.eer(scores, trials.target) - other["eer"],
        "interval": None,
        "p_value": None,
    }
    if replicates:
        pairs = speaker_pairs(trials, speakers)
        found = confidence.paired_bootstrap(
            metrics.WeightedTrials.eer, scores, other_scores, trials.target, pairs, replicates=replicates
        )
        row |= {"interval": [100 * end for end in found.interval], "p_value": found.p_value}
    return row


def write_scores(path: str | os.PathLike, trials: Trials, scores: np.ndarray) -> None:
    """Writes `score enrol test` lines, tab-separated, in the order of the trial list.

    Args:
      path: of the file, which is replaced.
      trials: the trial list, of N trials.
      scores: [N], one of each trial; they are rounded.
    """
    rows = zip(scores, trials.enrol, trials.test, strict=True)
    write_text(path, "".join(f"{s:.{DECIMALS}f}\t{a}\t{b}\n" for s, a, b in rows))


def read_scores(path: str | os.PathLike, trials: Trials) -> np.ndarray:
    """Returns the scores [N] that `write_scores` wrote for these trials.

    Raises ValueError naming the file if it has other trials.
    """
    lines = [line.split("\t") for line in text_lines(path, "scores")]
    if [line[1:] for line in lines] != [list(pair) for pair in zip(trials.enrol, trials.test, strict=True)]:
        raise ValueError(f"{path}: not the scores of these trials")
    return np.array([float(line[0]) for line in lines])


def rates_text(row: Mapping) -> str:
    """Returns "EER 3.21 % (2.9–3.5), minDCF(0.01) …" of an `error_report`, with intervals where it has them."""
    equal = f"EER {row['eer']:6.2f} %{in_brackets(row.get('eer_interval'), 2)}"
    costs = (
        f"minDCF({p}) {row[f'min_dcf_{p}']:.3f}{in_brackets(row.get(f'min_dcf_{p}_interval'), 3)}" for p in P_TARGETS
    )
    return ", ".join([equal, *costs])


def in_brackets(interval: Sequence[float] | None, digits: int) -> str:
    """Returns " (2.94–3.51)" of an interval; "" without one."""
    return f" ({interval[0]:.{digits}f}–{interval[1]:.{digits}f})" if interval else ""


def interval_note(results: Mapping) -> str:
    """Returns a line that says what the brackets of `rates_text` are, or why there are none."""
    if results["eer_interval"]:
        return "  (in brackets 95 % intervals, by bootstrap over speakers)"
    return f"  (no interval: {results['no_interval']})"


def warnings_of(results: Mapping) -> list[str]:
    """Returns a line for everything in results of `score` or `evaluate` that makes error rates come out too low."""
    warnings = []
    if count := results.get("self_trials"):
        verb = "compares" if count == 1 else "compare"
        warnings.append(f"{plural(count, 'trial')} {verb} a recording with itself, which is always right: remove them")
    if count := results.get("cohort_in_trials"):
        verb = "takes" if count == 1 else "take"
        warnings.append(
            f"{plural(count, 'recording')} of the cohort {verb} part in the trials. Error rates come out too low: take "
            "a cohort of other recordings"
        )
    if count := results.get("calibration_trials_in_both"):
        verb = "was" if count == 1 else "were"
        warnings.append(
            f"{plural(count, 'trial')} {verb} calibrated on, too. Calibrated costs come out too low: calibrate on "
            "others"
        )
    if results.get("calibration_eer") == 0:
        warnings.append(
            "the trials calibrated on have no errors, so how steep the calibration is means nothing: calibrate on more"
        )
    return [f"  WARNING: {text}" for text in warnings]


def score_text(results: Mapping) -> str:
    """Returns what `score` found as human-readable text."""
    lines = [plural(results["trials"], "trial"), *warnings_of(results)]
    if "eer" not in results:
        return "\n".join([*lines, "  the list has no labels: scores are written, error rates are unknown"])
    lines[0] += f", {results['targets']:,} of them target"
    lines += [f"  {rates_text(results)}", interval_note(results)]
    if "cllr" in results:
        costs = ", ".join(f"actDCF({p}) {results[f'act_dcf_{p}']:.3f}" for p in P_TARGETS)
        lines.append(
            f"  calibrated on {results['calibration_trials']}: {costs}, Cllr {results['cllr']:.3f} "
            f"(at best {results['min_cllr']:.3f})"
        )
    if "comparison" in results:
        other = results["comparison"]
        text = f"  compared with {rates_text(other)}: the EERs differ by {other['difference']:+.2f}"
        if other["interval"]:
            low, high = other["interval"]
            text += f" ({low:+.2f} to {high:+.2f}), p = {other['p_value']:.3g} for “not better”"
        lines.append(text)
    return "\n".join(lines)
