"""Do the networks of MeMo learn more together than each alone? Trains both ways with several seeds, and compares.

    python experiments/together.py --config configs/small.py --test validation=data/validation:lists/trials.txt \
        --output runs/together --config.data.train=data/train --config.total_steps=1500

For each seed, three kinds of runs with the same data, length and settings:

* `together`: the config as it is.
* `self`: a run for each of its backbones, with distillation from its own teacher and the contrastive loss.
* `alone`: a run for each of its backbones, with the contrastive loss only.

Every run is tested on each list, each network by itself and the mean of the scores of all networks of a kind. Prints a
table: mean error rates over seeds, and the difference of EER to `together` on the same resampled speakers. A run that
was interrupted goes on where the same command is given again. `--config.KEY=VALUE` reaches every run.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from memo_jax.config import load_config
from memo_jax.scoring import confidence, metrics
from memo_jax.scoring.score import error_report, read_scores
from memo_jax.scoring.trials import Trials, read_trials, speaker_pairs
from memo_jax.training.saved_checkpoint import saved_steps
from model_card import markdown

STOPPED = 3  # exit status of training that has collapsed
KINDS = {
    "together": (),
    "self": ("loss.cross=0",),
    "alone": ("loss.cross=0", "loss.self=0", "loss.mean_entropy=0", "loss.koleo=0", "gate.rule=always"),
}


def runs_of(kind: str, branches: list[str]) -> dict[str, list[str]]:
    """Returns {name of a run: the networks in it} of a kind."""
    return {kind: branches} if kind == "together" else {f"{kind}-{branch}": [branch] for branch in branches}


def train(options, kind: str, seed: int, name: str, networks: list[str]) -> None:
    """Trains a run, or resumes it, and tests its networks. Raises ValueError if a command fails."""
    workdir = options.output / f"seed-{seed}" / name
    overrides = [f"seed={seed}", f"model.branches={','.join(networks)},", *KINDS[kind]]
    arguments = ["train", "--config", options.config, "--workdir", workdir]
    called(arguments + options.overrides + [f"--config.{text}" for text in overrides])
    for test, (data, trials) in options.tests.items():
        for network in networks:
            results = workdir / test / network
            step = saved_steps(workdir)[-1]  # a longer run is tested again
            if tested_step(results / "results.json") != step:
                arguments = ["eval", "--model", workdir, "--branch", network, "--data", data, "--trials", trials]
                called([*arguments, "--output", results, "--replicates", "0"])


def tested_step(results: Path) -> int | None:
    """Returns the step whose network was tested, None if none was."""
    return json.loads(results.read_text())["step"] if results.exists() else None


def called(arguments: list) -> None:
    """Runs a command of memo-jax; raises ValueError, naming it, if it fails."""
    command = [sys.executable, "-m", "memo_jax", *map(str, arguments)]
    print(f"$ {' '.join(command)}", file=sys.stderr, flush=True)
    if status := subprocess.run(command, check=False).returncode:
        more = "" if status == STOPPED else "; the same command goes on from there"
        raise ValueError(f"memo-jax {arguments[0]} ended with status {status}{more}")


def scores_of(options, kind: str, test: str, trials: Trials) -> dict[str, np.ndarray]:
    """Returns {network: scores [seeds, trials]} of a kind on a list, and those of their mean as "mean"."""
    found = {
        network: np.stack(
            [
                read_scores(options.output / f"seed-{seed}" / name / test / network / "scores.txt", trials)
                for seed in options.seeds
            ]
        )
        for name, networks in runs_of(kind, options.branches).items()
        for network in networks
    }
    return found | {"mean": np.mean(list(found.values()), axis=0)}


def comparison(test: str, trials: Trials, scores: dict[str, dict[str, np.ndarray]], replicates: int) -> str:
    """Returns the table of a list from {kind: {network: scores [seeds, trials]}}."""
    rows = [["network", "runs", "EER, %", "minDCF(0.01)", "minDCF(0.05)", "`together` against it"]]
    pairs = speaker_pairs(trials)
    for network in scores["together"]:
        for kind, of_kind in scores.items():
            reports = [error_report(run, trials.target) for run in of_kind[network]]
            cells = [
                spread([report[key] for report in reports], digits)
                for key, digits in (("eer", 2), ("min_dcf_0.01", 3), ("min_dcf_0.05", 3))
            ]
            against = "–"
            if kind != "together":
                found = confidence.paired_bootstrap(
                    metrics.WeightedTrials.eer,
                    scores["together"][network],
                    of_kind[network],
                    trials.target,
                    pairs,
                    replicates=replicates,
                )
                low, high = (100 * end for end in found.interval)
                against = f"{100 * found.difference:+.2f} ({low:+.1f} to {high:+.1f}), p {found.p_value:.2g}"
            rows.append([network, f"`{kind}`", *cells, against])
    return f"**{test}**\n\n{markdown(rows)}"


def spread(values: list[float], digits: int) -> str:
    """Returns "mean ± standard deviation" over seeds, the mean alone of a single one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main(arguments=None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog="--config.KEY=VALUE overrides the config of every run"
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="of `together`")
    parser.add_argument(
        "--test",
        action="append",
        required=True,
        metavar="NAME=DATASET:TRIALS",
        help="a trial list and its recordings; several times",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the runs go")
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas between (default: %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="with commas between (default: %(default)s)")
    parser.add_argument("--replicates", type=int, default=1000, metavar="N", help="of the bootstrap over speakers")
    options, options.overrides = parser.parse_known_args(arguments)
    for text in options.overrides:
        if not text.startswith("--config."):
            parser.error(f"unknown argument {text!r}")
    try:
        options.seeds = [int(seed) for seed in options.seeds.split(",")]
        options.kinds = list(dict.fromkeys(["together", *options.kinds.split(",")]))
        if unknown := set(options.kinds) - set(KINDS):
            raise ValueError(f"no kind {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
        options.tests = {}
        for text in options.test:
            name, _, places = text.partition("=")
            data, _, trials = places.rpartition(":")
            if not (name and data and trials):
                raise ValueError(f"--test {text}: give NAME=DATASET:TRIALS")
            listed = read_trials(trials)
            speaker_pairs(listed)  # names without a speaker are found before the training
            options.tests[name] = Path(data), listed.path
        options.branches = list(load_config(options.config, options.overrides).model.branches)
        for seed in options.seeds:
            for kind in options.kinds:
                for name, networks in runs_of(kind, options.branches).items():
                    train(options, kind, seed, name, networks)
        for test, (_, path) in options.tests.items():
            trials = read_trials(path)
            scores = {kind: scores_of(options, kind, test, trials) for kind in options.kinds}
            print(comparison(test, trials, scores, options.replicates), end="\n\n")
    except (ValueError, OSError) as error:
        print(f"together.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
