"""Embeddings and a trial list → scores and the error rates that the field reports."""

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from memo_jax.files import write_text
from memo_jax.scoring import calibration, confidence, metrics
from memo_jax.scoring.embedding_file import check_same_model, read_embeddings
from memo_jax.scoring.trials import Trials, read_trials, speaker_folder, speaker_pairs, trial_pairs

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


def eer_interval(
    scores: np.ndarray, trials: Trials, speakers: Speakers = speaker_folder, replicates: int = REPLICATES
) -> list[float] | None:
    """Returns the 95 % interval of the EER in percent, [low, high], by the bootstrap over speakers.

    None where no speakers that agree with the labels are known, or too few of them.
    """
    if replicates == 0:
        return None
    try:
        pairs = speaker_pairs(trials, speakers)
        interval = confidence.bootstrap_interval(metrics.eer, scores, trials.target, pairs, replicates=replicates)
    except ValueError:
        return None
    return [100 * end for end in interval]


def calibrated_report(scores, target, tuning_scores, tuning_target) -> dict[str, float]:
    """Returns `act_dcf_P`, `cllr` and `min_cllr` of scores calibrated on other trials, and the `scale` and `offset`."""
    fitted = calibration.fit_calibration(tuning_scores, tuning_target)
    llrs = fitted(scores)
    return {f"act_dcf_{p}": calibration.act_dcf(llrs, target, p) for p in P_TARGETS} | {
        "cllr": calibration.cllr(llrs, target),
        "min_cllr": calibration.min_cllr(scores, target),
        "calibration_scale": fitted.scale,
        "calibration_offset": fitted.offset,
    }


def trial_scores(
    embeddings: np.ndarray,
    pairs: np.ndarray,
    *,
    cohort: np.ndarray | None = None,
    mean_subtraction: bool = False,
    as_norm: int = 0,
) -> np.ndarray:
    """Returns the scores [N] of pairs [N, 2] of rows of embeddings [M, D] (or [M, R, D]).

    Args:
      cohort: embeddings [C, D] of other recordings, of which nobody knows the speakers.
      mean_subtraction: subtract the cohort's mean from every embedding, the cohort's too.
      as_norm: normalise by that many nearest cohort utterances; 0 for none.
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
    replicates: int = REPLICATES,
    scores_file: str | os.PathLike | None = None,
) -> dict:
    """Scores a trial list by files of embeddings; the scores of several files (both branches) are averaged.

    Args:
      embeddings: files with the recordings of the trials, one a system.
      trials: trial list, VoxCeleb or Kaldi form.
      cohorts: files of embeddings of other recordings, one for each of `embeddings`, in their order.
      mean_subtraction, as_norm: see `trial_scores`.
      calibration_trials: another list of recordings in `embeddings`, to calibrate on.
      compare: files of embeddings of another system: is the first better? Scored by plain cosine.
      speakers: table `name speaker` a line (Kaldi's utt2spk) for the bootstrap; the first folder of names by default.
      replicates: of the bootstrap; 0 leaves it out.
      scores_file: where to write `score enrol test` lines.

    Returns:
      {"eer": percent, "eer_interval": [low, high] or None, "eer_threshold", "min_dcf_0.01", "min_dcf_0.05", "trials",
      "targets"}, with calibration also "act_dcf_0.01", "act_dcf_0.05", "cllr", "min_cllr", and with a comparison
      "comparison": {"eer", "difference", "interval", "p_value"}.

    Raises:
      ValueError: bad input, named; also when cohort and embeddings are of different models.
    """
    if cohorts and len(cohorts) != len(embeddings):
        raise ValueError(f"{len(cohorts)} cohorts for {len(embeddings)} files of embeddings: give one for each")
    listed = read_trials(trials)
    for kind, present in (("target", listed.target.any()), ("nontarget", not listed.target.all())):
        if not present:
            raise ValueError(f"{trials} has no {kind} trial: error rates need both kinds")
    systems = [read_embeddings(path) for path in embeddings]
    backgrounds = [read_embeddings(path) for path in cohorts] or [None] * len(systems)
    for path, system, background, cohort in zip(embeddings, systems, backgrounds, cohorts):
        check_same_model(system.model, path, background.model, cohort)

    def treated_scores(listed):
        return metrics.average_scores(
            [
                trial_scores(
                    system.embeddings,
                    trial_pairs(listed, system.names),
                    mean_subtraction=mean_subtraction,
                    as_norm=as_norm,
                    cohort=None if background is None else background.embeddings,
                )
                for system, background in zip(systems, backgrounds)
            ]
        )

    scores = treated_scores(listed)
    table = speaker_folder
    if speakers is not None:
        table = read_speakers(speakers)
        speaker_pairs(listed, table)  # a table that does not fit is an error, names that tell nothing are none
    results = error_report(scores, listed.target) | {
        "eer_interval": eer_interval(scores, listed, table, replicates),
        "trials": len(listed),
        "targets": int(listed.target.sum()),
        "models": [system.model for system in systems],
    }
    if calibration_trials is not None:
        tuning = read_trials(calibration_trials)
        results |= calibrated_report(scores, listed.target, treated_scores(tuning), tuning.target) | {
            "calibration_trials": str(calibration_trials)
        }
    if compare:
        others = [read_embeddings(path) for path in compare]
        plain = metrics.average_scores(
            [trial_scores(other.embeddings, trial_pairs(listed, other.names)) for other in others]
        )
        results["comparison"] = comparison(scores, plain, listed, table, replicates)
    if scores_file is not None:
        write_scores(scores_file, listed, scores)
    return results


def comparison(scores, other_scores, trials: Trials, speakers: Speakers, replicates: int = REPLICATES) -> dict:
    """Returns the other's `eer`, the `difference` ours − theirs and its `interval`, percent, and `p_value`."""
    pairs = speaker_pairs(trials, speakers)
    found = confidence.paired_bootstrap(
        metrics.eer, scores, other_scores, trials.target, pairs, replicates=max(replicates, 1)
    )
    return {
        "eer": 100 * metrics.eer(other_scores, trials.target),
        "difference": 100 * found.difference,
        "interval": [100 * end for end in found.interval],
        "p_value": found.p_value,
    }


def read_speakers(path: str | os.PathLike) -> dict[str, str]:
    """Returns {name: speaker} of a table with `name speaker` a line, parted by the line's last space or tab."""
    table = {}
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                fields = line.strip().rsplit("\t" if "\t" in line else None, 1)
                if len(fields) != 2:
                    raise ValueError(f"{path}, line {number}: expected `name speaker`, not {line.strip()[:200]!r}")
                table[fields[0].strip()] = fields[1].strip()
    return table


def write_scores(path: str | os.PathLike, trials: Trials, scores: np.ndarray) -> None:
    """Writes `score enrol test` lines, tab-separated, in the order of the trial list."""
    rows = zip(scores, trials.enrol, trials.test, strict=True)
    write_text(path, "".join(f"{s:.{DECIMALS}f}\t{a}\t{b}\n" for s, a, b in rows))


def rates_text(row: Mapping) -> str:
    """Returns "EER 3.21 % (2.9–3.5), minDCF(0.01) …" of an `error_report`, with its interval where it has one."""
    interval = row.get("eer_interval")
    between = f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else ""
    costs = ", ".join(f"minDCF({p}) {row[f'min_dcf_{p}']:.3f}" for p in P_TARGETS)
    return f"EER {row['eer']:6.2f} %{between}, {costs}"


def summary(results: Mapping) -> str:
    """Returns what `score` found in the form that a person reads."""
    lines = [f"{results['trials']:,} trials, {results['targets']:,} of them target", f"  {rates_text(results)}"]
    if results["eer_interval"]:
        lines.append("  (in brackets the 95 % interval, by bootstrap over speakers)")
    else:
        lines.append("  (no interval: the names do not tell who speaks; give a table with --speakers)")
    if "cllr" in results:
        costs = ", ".join(f"actDCF({p}) {results[f'act_dcf_{p}']:.3f}" for p in P_TARGETS)
        lines.append(
            f"  calibrated on {results['calibration_trials']}: {costs}, Cllr {results['cllr']:.3f} "
            f"(at best {results['min_cllr']:.3f})"
        )
    if "comparison" in results:
        other = results["comparison"]
        lines.append(
            f"  compared with EER {other['eer']:.2f} %: difference {other['difference']:+.2f} "
            f"({other['interval'][0]:+.2f} to {other['interval'][1]:+.2f}), p = {other['p_value']:.3g} for "
            "“not better”"
        )
    return "\n".join(lines)
