"""Prints the numbers of the model card from the folder that package_model.py wrote.

    python experiments/model_card.py --package package

Two tables, of the error rates on each list beside those of log-mel statistics, and of the probabilities that the saved
calibration gives; and the size, the fingerprint, the threshold and the calibration of the file.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from memo_jax.inference.model_file import Decision, read_model
from memo_jax.models import parameter_count
from memo_jax.scoring.calibration import Calibration, cllr, fit_calibration
from memo_jax.scoring.score import read_scores
from memo_jax.scoring.trials import read_trials

RATES = {"eer": ("EER, %", 2), "min_dcf_0.01": ("minDCF(0.01)", 3), "min_dcf_0.05": ("minDCF(0.05)", 3)}


def markdown(rows: list[list[str]]) -> str:
    """Returns a Markdown table; the first row is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def error_rates(results: dict[str, dict[str, Any]]) -> str:
    """Returns the table of error rates with 95 % intervals, from {list: results.json of `memo-jax eval`}.

    Raises ValueError naming a list without intervals.
    """
    rows = [["list", *(title for title, _ in RATES.values()), "log-mel statistics"]]
    for name, result in results.items():
        if not result.get("eer_interval"):
            raise ValueError(f"{name}: its results have no intervals: evaluate it again, with --replicates 300")
        cells = []
        for key, (_, digits) in RATES.items():
            low, high = result[f"{key}_interval"]
            cells.append(f"{result[key]:.{digits}f} ({low:.2f}–{high:.2f})")
        statistics = (f"{result['log_mel_statistics'][key]:.{digits}f}" for key, (_, digits) in RATES.items())
        rows.append([name, *cells, " / ".join(statistics)])
    return markdown(rows)


def probabilities(folders: dict[str, Path], results: dict[str, dict[str, Any]], decision: Decision) -> str:
    """Returns the table of what a decision's calibration gives on lists: at an even prior, and over all priors (Cllr).

    Raises ValueError where the scores in a folder are not of the trials of its list.
    """
    rows = [["list", "different people above 0.5, %", "same people below 0.5, %", "Cllr", "Cllr, calibrated there"]]
    for name, folder in folders.items():
        trials = read_trials(results[name]["trial_list"])
        scores, target = read_scores(folder / "scores.txt", trials), trials.target
        llrs = Calibration(decision.scale, decision.offset)(scores)
        rows.append(
            [
                name,
                f"{100 * np.mean(llrs[~target] > 0):.0f}",
                f"{100 * np.mean(llrs[target] < 0):.0f}",
                f"{cllr(llrs, target):.2f}",
                f"{cllr(fit_calibration(scores, target)(scores), target):.2f}",
            ]
        )
    return markdown(rows)


def main(arguments=None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--package", type=Path, required=True, metavar="DIR", help="output of package_model.py")
    package = parser.parse_args(arguments).package
    try:
        model = read_model(package / "default_model.safetensors")
        found = [*package.glob("results/*/results.json"), *package.glob("run/results/*/results.json")]
        folders = {path.parent.name: path.parent for path in sorted(found)}
        results = {name: json.loads((path / "results.json").read_text()) for name, path in folders.items()}
        if model.decision is None or not results:
            raise ValueError(f"{package} has no {'results' if model.decision else 'threshold'}: run package_model.py")
        networks = {model.fingerprint, read_model(package / "network.safetensors").fingerprint}
        for name, result in results.items():
            if result["fingerprint"] not in networks:
                raise ValueError(
                    f"{folders[name]}: results of another network: remove it, or both .safetensors where the training "
                    "has gone on, and run package_model.py again"
                )
        decision, size = model.decision, (package / "default_model.safetensors").stat().st_size
        parameters = parameter_count(model.variables["params"])
        print(f"{size / 1e6:.1f} MB, {parameters:,} parameters, fingerprint {model.fingerprint}")
        print(f"threshold {decision.threshold:.3f}, calibration {decision.scale:.3f} · score {decision.offset:+.3f}\n")
        print(error_rates(results), probabilities(folders, results, decision), sep="\n\n")
    except (OSError, ValueError) as error:
        print(f"model_card.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
