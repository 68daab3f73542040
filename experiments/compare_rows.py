r"""Error rates of rows of the study by network, and differences between any two, on the same resampled speakers.

    python experiments/compare_rows.py --output runs/epochs multi-head:dino-ecapa multi-head:dino-ecapa@time \
        memo-step+ecapa+resnet:multi-head+ecapa+resnet

Each argument is a comparison SYSTEM:OTHER. A system is a row of ablation.py, at equal steps or, with @time, at equal
time, and after + the networks whose mean score is meant; without any, the network that the study reports. Differences
are over the seeds that both have. The runs are those that run.py left in its --output.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from memo_jax.scoring.score import error_report
from model_card import markdown
from study_results import Run, Scores, difference, read_results, runs_by_row, spread, tested_runs


class System(NamedTuple):
    """What a text ROW[@time][+NETWORK…] names."""

    row: str
    budget: str
    networks: list[str] | None  # None: the one that the study reports

    @classmethod
    def of(cls, text: str) -> "System":
        """Returns the system of a text."""
        place, *networks = text.split("+")
        row, _, budget = place.partition("@")
        return cls(row, budget or "steps", networks or None)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("comparisons", nargs="+", metavar="SYSTEM:OTHER")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="of run.py")
    parser.add_argument("--replicates", type=int, default=1000, metavar="N", help="of the bootstrap over speakers")
    options = parser.parse_args(arguments)
    try:
        print(tables(options.output, [text.split(":") for text in options.comparisons], options.replicates))
    except (ValueError, OSError) as error:
        print(f"compare_rows.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def tables(output: Path, comparisons: list[list[str]], replicates: int) -> str:
    """Returns the table of all systems that are compared, and that of the differences."""
    if wrong := [":".join(pair) for pair in comparisons if len(pair) != 2]:
        raise ValueError(f"{wrong[0]}: give SYSTEM:OTHER")
    found = read_results(output)
    names = list(dict.fromkeys(name for run in found for name in run.result["tests"]))
    lists = [Scores(output, name) for name in names]
    systems = {text: runs_of(found, text, names) for pair in comparisons for text in pair}
    rates = [["system", "seeds", *(f"{name}: EER %, minDCF(0.05)" for name in names)]]
    for text, runs in systems.items():
        rates.append([f"`{text}`", str(len(runs)), *(rates_of(text, runs, scores) for scores in lists)])
    differences = [["difference of EER", "seeds", *names]]
    for one, other in comparisons:
        seeds = sorted(systems[one].keys() & systems[other].keys())
        if not seeds:
            raise ValueError(f"{one} and {other} have no seed in common in {output}")
        cells = []
        for scores in lists:
            pair = [
                scores.of_runs([systems[text][s] for s in seeds], System.of(text).networks) for text in (one, other)
            ]
            cells.append(difference(*pair, scores, replicates))
        differences.append([f"`{one}` against `{other}`", str(len(seeds)), *cells])
    return f"{markdown(rates)}\n\n{markdown(differences)}"


def runs_of(found: list[Run], text: str, names: list[str]) -> dict[int, Run]:
    """Returns {seed: run} of a system; ValueError where it has none that was tested on all lists."""
    row, budget, networks = System.of(text)
    of_row = runs_by_row(found, budget)
    runs = {
        seed: run for seed, run in tested_runs(of_row, row, names[0]).items() if set(names) <= set(run.result["tests"])
    }
    if not runs:
        raise ValueError(f"{text}: no run of that row is done")
    unknown = set(networks or ()) - set(next(iter(runs.values())).result["branches"])
    if unknown:
        raise ValueError(f"{text}: no network {', '.join(sorted(unknown))} in that row")
    return runs


def rates_of(text: str, runs: dict[int, Run], scores: Scores) -> str:
    """Returns the EER of a system on a list, with its standard deviation over seeds, and the mean minDCF."""
    of_seeds = scores.of_runs(list(runs.values()), System.of(text).networks)
    reports = [error_report(one, scores.trials.target) for one in of_seeds]
    cost = sum(report["min_dcf_0.05"] for report in reports) / len(reports)
    return f"{spread([report['eer'] for report in reports], 2)}, {cost:.3f}"


if __name__ == "__main__":
    sys.exit(main())
