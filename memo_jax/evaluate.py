"""Trial lists: embeddings of the recordings they need, scores, error rates, a report."""

import json
import os
from pathlib import Path

import numpy as np

from memo_jax import config as configs, scoring, sharding
from memo_jax.checkpoint import load_raw, saved_steps
from memo_jax.data import Utterances, open_utterances
from memo_jax.embedder import apply_to_recordings, embedding_function, log_mel_statistics
from memo_jax.models import Branch
from memo_jax.trials import read_trials, trial_pairs

P_TARGETS = (0.01, 0.05)
DECIMALS = 6  # of a score


class TrialEvaluation:
    """A trial list and the recordings it needs.

    Raises:
      ValueError: the list is malformed, or a recording of a trial is missing; the message names it.
    """

    def __init__(self, utterances: Utterances, trials: str | os.PathLike):
        self.utterances = utterances
        self.trials = read_trials(trials)
        pairs = trial_pairs(self.trials, utterances.names)
        # Only recordings that a trial mentions are embedded.
        self.rows, inverse = np.unique(pairs, return_inverse=True)
        self.pairs = inverse.reshape(pairs.shape)
        self.target = self.trials.target
        for kind, present in (("target", self.target.any()), ("nontarget", not self.target.all())):
            if not present:
                raise ValueError(f"{trials} has no {kind} trial: error rates need both kinds")

    def embeddings(self, branch: Branch, variables, quiet: bool = False) -> np.ndarray:
        """Returns the embeddings [N, D] of the recordings, in the order of `rows`."""
        function = embedding_function(branch, variables)
        return apply_to_recordings(function, self.utterances, self.rows, quiet=quiet)

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Returns the cosine score of every trial, rounded as in scores.txt, which so gives the same error rates."""
        return np.round(scoring.cosine_scores(embeddings, self.pairs), DECIMALS)

    def eer(self, branch: Branch, variables) -> float:
        """Returns the equal error rate, a fraction."""
        return scoring.eer(self.scores(self.embeddings(branch, variables, quiet=True)), self.target)

    def statistics_scores(self, quiet: bool = False) -> np.ndarray:
        """Returns scores by log-mel mean and deviation, standardised over the recordings: the channel baseline."""
        statistics = apply_to_recordings(log_mel_statistics, self.utterances, self.rows, "log-mel statistics", quiet)
        statistics = (statistics - statistics.mean(axis=0)) / np.maximum(statistics.std(axis=0), 1e-6)
        return self.scores(statistics)


def error_report(scores: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Returns `eer` in percent and `min_dcf_P` for every P of P_TARGETS."""
    return {"eer": 100 * scoring.eer(scores, target)} | {
        f"min_dcf_{p}": scoring.min_dcf(scores, target, p) for p in P_TARGETS
    }


def load_network(workdir: str | os.PathLike, branch: str, role: str = "teacher", step: int | None = None):
    """Returns (branch module, its variables, step) of a training workdir.

    Step 0 is the untrained network, which the config's seed decides. Raises FileNotFoundError where nothing has been
    trained, ValueError for a branch that the run does not have.
    """
    from memo_jax.train import build_branches, build_recipe, initial_state

    config = configs.read_config(workdir)
    if config is None:
        raise FileNotFoundError(f"{workdir} is not the workdir of a run (it has no config.json)")
    branches = build_branches(config)
    if branch not in branches:
        raise ValueError(f"the run in {workdir} has no branch {branch!r}: choose one of {', '.join(branches)}")
    if role not in ("teacher", "student"):
        raise ValueError(f"role {role!r}: choose teacher or student")
    # Held as training holds it, so that programs which training has compiled are found again.
    mesh = sharding.data_mesh()
    if step == 0:
        return branches[branch], initial_state(config, build_recipe(config, 1), mesh).teacher[branch], 0
    if step is None and (steps := saved_steps(workdir)):
        step = steps[-1]
    state, _ = load_raw(workdir, step, only=[role])
    return branches[branch], sharding.replicate(mesh, state[role][branch]), step


def evaluate(
    workdir, data, trials, output, branch: str = "ecapa", role: str = "teacher", step: int | None = None,
    quiet: bool = False,
) -> dict:
    """Scores a trial list with a trained network and writes results.json, det.png and scores into `output`.

    The scores are lines `score enrol test` in the order of the trial list: scores.txt of the network,
    log_mel_statistics.txt of plain statistics.

    Args:
      workdir: of a training run.
      data: dataset with the recordings of the trials.
      trials: trial list, VoxCeleb form (`1 a b`) or Kaldi form (`a b target`).
      output: folder for the results; made when missing.
      branch, role, step: which network; the EMA teacher of the latest checkpoint by default, untrained at step 0.

    Returns:
      What results.json holds: `eer` (percent), `min_dcf_0.01`, `min_dcf_0.05`, `trials`, `targets`, the error rates
      of plain log-mel statistics under `log_mel_statistics`, and which network and data these are of.
    """
    network, variables, step = load_network(workdir, branch, role, step)
    evaluation = TrialEvaluation(open_utterances(data), trials)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    scores = evaluation.scores(evaluation.embeddings(network, variables, quiet))
    baseline = evaluation.statistics_scores(quiet)
    results = error_report(scores, evaluation.target) | {
        "trials": len(evaluation.target),
        "targets": int(evaluation.target.sum()),
        "recordings": len(evaluation.rows),
        "log_mel_statistics": error_report(baseline, evaluation.target),
        "workdir": str(workdir),
        "branch": branch,
        "role": role,
        "step": int(step),
        "data": str(data),
        "trial_list": str(trials),
    }
    from memo_jax.report import plot_det

    plot_det(
        {f"{branch} {role}, step {step}": (scores, evaluation.target),
         "log-mel statistics": (baseline, evaluation.target)},
        output / "det.png",
    )
    write_scores(output / "scores.txt", evaluation, scores)
    write_scores(output / "log_mel_statistics.txt", evaluation, baseline)
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def write_scores(path: Path, evaluation: TrialEvaluation, scores: np.ndarray) -> None:
    """Writes `score enrol test` lines, tab-separated, in the order of the trial list."""
    listed = evaluation.trials
    lines = (f"{s:.{DECIMALS}f}\t{a}\t{b}\n" for s, a, b in zip(scores, listed.enrol, listed.test, strict=True))
    write_text(path, "".join(lines))


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def summary(results: dict) -> str:
    """Returns the results in the form that a person reads."""
    baseline = results["log_mel_statistics"]
    counts = (results[name] for name in ("trials", "targets", "recordings"))
    lines = ["{:,} trials, {:,} of them target, {:,} recordings".format(*counts)]
    for name, row in ((f"{results['branch']} {results['role']}, step {results['step']}", results),
                      ("log-mel statistics", baseline)):
        costs = ", ".join(f"minDCF({p}) {row[f'min_dcf_{p}']:.3f}" for p in P_TARGETS)
        lines.append(f"  {name:<28} EER {row['eer']:6.2f} %, {costs}")
    return "\n".join(lines)
