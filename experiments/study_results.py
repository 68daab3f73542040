"""The study's tables from the results of its runs: means over seeds, intervals over speakers, paired tests."""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

import ablation
import study_figures
from memo_jax.files import as_json, write_text
from memo_jax.log import progress
from memo_jax.scoring import confidence, metrics
from memo_jax.scoring.score import read_scores
from memo_jax.scoring.trials import read_trials, speaker_pairs
from study_figures import main_branch

RESULT_FILE = "result.json"
TABLE_FILE = "results.md"
BUDGETS = {"steps": "Equal number of steps", "time": "Equal time"}


class Run(NamedTuple):
    """A run that is done: its folder, which keeps the scores, and its result."""

    folder: Path
    result: dict


def read_results(output: Path) -> list[Run]:
    """Returns all finished runs, in the table's order. Raises ValueError, naming a damaged file."""
    found = []
    for path in output.glob(f"*/*/seed-*/{RESULT_FILE}"):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            place = list(BUDGETS).index(result["budget"]), list(ablation.ROWS).index(result["row"]), result["seed"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: not the result of a run of this study ({error})") from None
        found.append((place, Run(path.parent, result)))
    return [run for _, run in sorted(found, key=lambda one: one[0])]


def runs_by_row(runs: list[Run], budget: str) -> dict[str, list[Run]]:
    """Returns {row: its runs, one per seed}. At equal time, the reference has those at equal steps, which set it."""
    of_budget = {}
    for run in runs:
        borrowed = budget == "time" and run.result["row"] == ablation.REFERENCE
        if run.result["budget"] == ("steps" if borrowed else budget):
            of_budget.setdefault(run.result["row"], []).append(run)
    if budget == "time" and set(of_budget) == {ablation.REFERENCE}:
        return {}
    return {row: of_budget[row] for row in ablation.ROWS if row in of_budget}


def steps_at_equal_time(output: Path, row: str) -> tuple[int, float]:
    """Returns how many steps of a row take as long as the reference, and their ratio to the reference's steps.

    Taken from the cost of a step at equal steps, the median over seeds. Raises ValueError where it was not measured.
    """
    runs = runs_by_row(read_results(output), "steps")
    costs = {
        name: [run.result["cpu_seconds_a_step"] for run in runs.get(name, []) if run.result["cpu_seconds_a_step"]]
        for name in (row, ablation.REFERENCE)
    }
    missing = [name for name, of_row in costs.items() if not of_row]
    if missing:
        raise ValueError(f"no result at equal steps of {', '.join(missing)} in {output}: run those first")
    factor = statistics.median(costs[ablation.REFERENCE]) / statistics.median(costs[row])
    return round(runs[ablation.REFERENCE][0].result["steps"] * factor), factor


class Scores:
    """The scores of runs on one trial list, of the reported branch, each read once."""

    def __init__(self, output: Path, name: str):
        self.name = name
        self.trials = read_trials(output / "trials" / f"{name}.txt")
        try:
            self.pairs = speaker_pairs(self.trials)
        except ValueError:  # the names do not tell who speaks
            self.pairs = None
        self._of_run = {}

    def of_runs(self, runs: list[Run], networks: list[str] | None = None) -> np.ndarray:
        """Returns the scores [runs, trials], the mean over networks; by default of the reported branch alone.

        ValueError when a file is not of this list.
        """
        return np.stack(
            [np.mean([self._read(run, name) for name in networks or [main_branch(run.result)]], axis=0) for run in runs]
        )

    def _read(self, run: Run, network: str) -> np.ndarray:
        path = run.folder / "test" / self.name / network / "scores.txt"
        if path not in self._of_run:
            self._of_run[path] = read_scores(path, self.trials)
        return self._of_run[path]


def collect(output: Path, results: Path, replicates: int = 1000) -> str:
    """Writes the results of all runs, one JSON each, the table and the plots into `results`; returns the table."""
    runs = read_results(output)
    if not runs:
        raise ValueError(f"{output} holds no result yet")
    results.mkdir(parents=True, exist_ok=True)
    for _, result in runs:
        name = f"{result['budget']}-{result['row']}-seed-{result['seed']}.json"
        write_text(results / name, as_json(result, indent=1) + "\n")
    names = list(dict.fromkeys(name for run in runs for name in run.result["tests"]))
    scores = {name: Scores(output, name) for name in names}
    budgets = {budget: rows for budget in BUDGETS if (rows := runs_by_row(runs, budget))}
    work = [(budget, row, name) for budget, rows in budgets.items() for row in rows for name in names]
    cells = {
        (budget, row, name): rate_cells(budget, budgets[budget], row, scores[name], replicates)
        for budget, row, name in progress(work, label="bootstrap", unit="cell")
    }
    parts = [
        f"### {BUDGETS[budget]}\n\n{table(budget, rows, names, cells)}\n\n{further_table(rows, names)}"
        for budget, rows in budgets.items()
    ]
    text = "\n\n".join([*parts, legend(runs, names, replicates)]) + "\n"
    write_text(results / TABLE_FILE, text)
    study_figures.plot_all(
        {b: {row: [r.result for r in of] for row, of in rows.items()} for b, rows in budgets.items()}, results
    )
    return text


def table(budget: str, rows: dict[str, list[Run]], names: list[str], cells: dict) -> str:
    """Returns the table of one budget in Markdown."""
    head = ["row", "system", "seeds", "steps", "CPU-min", "gate closes"]
    head += [text for name in names for text in (f"{name}: EER %", "against")]
    lines = [head, ["---"] * len(head)]
    for row, runs in rows.items():
        results = [run.result for run in runs]
        cost = [result["cpu_seconds"] / 60 for result in results if result["cpu_seconds"]]
        closed = [result["gate"]["closed_at"] for result in results]
        lines.append(
            [
                f"`{row}`",
                ablation.ROWS[row].title,
                str(len(runs)),
                spread([result["steps"] for result in results], 0),
                f"{statistics.mean(cost):.1f}" if cost else "–",
                "–" if set(closed) == {None} else ", ".join("–" if step is None else str(step) for step in closed),
                *(text for name in names for text in cells[budget, row, name]),
            ]
        )
    return markdown(lines)


def further_table(rows: dict[str, list[Run]], names: list[str]) -> str:
    """Returns the rates of one budget that the table leaves out: minDCF, and the EER of the other branch."""
    head = ["row"] + [text for name in names for text in (f"{name}: minDCF", "other branch, EER %")]
    lines = [head, ["---"] * len(head)]
    for row, runs in rows.items():
        line = [f"`{row}`"]
        for name in names:
            tested = [
                (main_branch(run.result), run.result["tests"][name]) for run in runs if name in run.result["tests"]
            ]
            others = [rates["eer"] for main, test in tested for branch, rates in test.items() if branch != main]
            line += [spread([test[main]["min_dcf_0.05"] for main, test in tested], 3), spread(others, 2)]
        lines.append(line)
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """Returns the lines of a table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rate_cells(budget: str, rows: dict[str, list[Run]], row: str, scores: Scores, replicates: int) -> list[str]:
    """Returns what the table says about a row on one trial list: its EER, and how that compares with other rows."""
    runs = tested_runs(rows, row, scores.name)
    if not runs:
        return ["collapsed" if rows[row][0].result["status"] == "collapsed" else "–", "–"]
    rate = spread([run.result["tests"][scores.name][main_branch(run.result)]["eer"] for run in runs.values()], 2)
    if scores.pairs is not None:
        low, high = confidence.bootstrap_interval(
            metrics.WeightedTrials.eer,
            scores.of_runs(list(runs.values())),
            scores.trials.target,
            scores.pairs,
            replicates=replicates,
        )
        rate += f" ({100 * low:.1f}–{100 * high:.1f})"
    if collapsed := sum(run.result["status"] == "collapsed" for run in rows[row]):
        rate += f", {collapsed} of {len(rows[row])} collapsed"
    against = ablation.ROWS[row].against if budget == "steps" else {ablation.REFERENCE} - {row}
    found = [comparison(runs, other, tested_runs(rows, other, scores.name), scores, replicates) for other in against]
    return [rate, "<br>".join(filter(None, found)) or "–"]


def tested_runs(rows: dict[str, list[Run]], row: str, name: str) -> dict[int, Run]:
    """Returns {seed: run} of a row's runs that were tested on a trial list."""
    return {run.result["seed"]: run for run in rows.get(row, []) if name in run.result["tests"]}


def comparison(runs: dict[int, Run], name: str, others: dict[int, Run], scores: Scores, replicates: int) -> str | None:
    """Returns the difference of EER to the row of that name, over the seeds that both have; None without any."""
    seeds = sorted(runs.keys() & others.keys())
    if not seeds or scores.pairs is None:
        return None
    systems = [scores.of_runs([of[seed] for seed in seeds]) for of in (runs, others)]
    return f"`{name}` {difference(*systems, scores, replicates)}"


def difference(one: np.ndarray, other: np.ndarray, scores: Scores, replicates: int) -> str:
    """Returns the difference of EER between two systems' scores [seeds, trials] on a list, its interval, and p."""
    systems = one, other
    rates = [np.mean([metrics.eer(run, scores.trials.target) for run in system]) for system in systems]
    # One-sided in whichever direction the difference points, so that a worse row is as visible as a better one.
    sign = 1 if rates[0] <= rates[1] else -1
    found = confidence.paired_bootstrap(
        metrics.WeightedTrials.eer, *systems[::sign], scores.trials.target, scores.pairs, replicates=replicates
    )
    low, high = sorted(100 * sign * end for end in found.interval)
    return f"{100 * sign * found.difference:+.2f} ({low:+.1f} to {high:+.1f}), p {found.p_value:.2g}"


def spread(values: list[float], decimals: int) -> str:
    """Returns "mean ± deviation" over seeds, the mean alone of a single one or of equal numbers, – of none."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{decimals}f}"
    if len(values) < 2 or min(values) == max(values):
        return mean
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}"


def legend(runs: list[Run], names: list[str], replicates: int) -> str:
    """Returns what the table's numbers mean, with the baseline of each trial list and what the runs were made with."""
    lines = [
        "EER of the ECAPA-TDNN's teacher (of the only branch where there is no other): mean ± standard deviation over "
        f"seeds; in brackets the 95 % interval of that mean over speakers ({replicates} replicates of the bootstrap). "
        "minDCF at a prior of 0.05. Against: difference of EER in percent points to the row named, over the seeds that "
        "both have, negative is better; its interval, and the one-sided p of the paired bootstrap over speakers, not "
        "corrected for the number of comparisons. CPU-min: of the steps alone, without compilation and evaluation. "
        "Gate closes: the first step without the contrastive loss, by seed; – where it stayed open or never was."
    ]
    for name in names:
        rates = next(
            branch["log_mel_statistics"] for run in runs for branch in run.result["tests"].get(name, {}).values()
        )
        lines.append(f"Log-mel statistics on {name}: {rates['eer']:.2f} % EER, minDCF {rates['min_dcf_0.05']:.3f}.")
    commits = sorted({str(run.result["commit"]) for run in runs})
    lines.append(f"Runs: {len(runs)}; commits: {', '.join(commits)}.")
    return "\n\n".join(lines)
