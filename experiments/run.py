r"""Runs the study: trains, tests and records every row of experiments/ablation.py with every seed; then the table.

    python experiments/run.py --data DATASET --noise DIR --music DIR --rirs DIR \
        --test NAME=DATASET:TRIALS --test OTHER=DATASET:TRIALS --output DIR

Several such processes, on several machines that see the same folder, share the runs: each takes the next free one.
After a kill, the same command continues from the last checkpoint. `--config.KEY=VALUE` changes a key of every run.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

import ablation
import claims
import memo_jax
import study_results
from memo_jax.config import load_config
from memo_jax.files import as_json, write_text
from memo_jax.log import read_metrics
from memo_jax.scoring.trials import read_trials
from memo_jax.training.run_record import read_run

STUDY_CONFIG = Path(__file__).parents[1] / "configs" / "study.py"
BUDGETS = ("steps", "time")
STOPPED = 3  # exit status of `memo-jax train` after a collapse, which is a result, too


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0 when all runs are done or taken by others, 1 after a failure, 2 on bad input."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if not (text.startswith("--config.") and "=" in text)]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    options.overrides = [text.removeprefix("--config.") for text in rest]
    try:
        rows = ablation.chosen_rows(options.rows)
        seeds = [int(text) for text in options.seeds.split(",")]
        tests = dict(test_of(text) for text in options.test)
        failed = [] if options.collect_only else run_all(options, rows, seeds, tests)
        print(study_results.collect(options.output, options.results, options.replicates))
    except (ValueError, OSError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    for text in failed:
        print(f"run.py: {text}", file=sys.stderr)
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, metavar="DATASET", help="to train on, made by `memo-jax prepare`")
    for kind in ("noise", "music", "speech", "rirs"):
        parser.add_argument(f"--{kind}", default="", metavar="DIR", help=f"folder for augment.{kind}")
    parser.add_argument(
        "--test",
        action="append",
        default=[],
        metavar="NAME=DATASET:TRIALS",
        help="a trial list and its recordings; several times; the first is followed while training",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of all runs and of the queue")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path(__file__).parent / "results",
        metavar="DIR",
        help="where results, table and plots are collected (default: experiments/results)",
    )
    parser.add_argument("--rows", default="all", help="names with commas between, main, many-epochs, or all (default)")
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas between (default: %(default)s)")
    parser.add_argument(
        "--budget",
        choices=BUDGETS,
        default="steps",
        help="steps: equal for all; time: as many as take the time of the row "
        f"{ablation.REFERENCE}, by the results at equal steps in the same folder",
    )
    parser.add_argument("--config", type=Path, default=STUDY_CONFIG, metavar="FILE", help="(default: configs/study.py)")
    parser.add_argument(
        "--followed-recordings",
        type=int,
        default=300,
        metavar="N",
        help="of the first test, by whose trials runs are followed; 0: all (default: %(default)s)",
    )
    parser.add_argument("--replicates", type=int, default=1000, metavar="N", help="of the bootstrap over speakers")
    here = shlex.join([sys.executable, "-m", "memo_jax", "train"])
    parser.add_argument(
        "--train-command",
        metavar="TEXT",
        default=here,
        help='such as "srun memo-jax train --distributed" (default: memo-jax train here)',
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="take over the runs of processes on other machines, when you know that these have ended",
    )
    parser.add_argument("--collect-only", action="store_true", help="run nothing, collect what there is")
    return parser


def test_of(text: str) -> tuple[str, tuple[Path, Path]]:
    """Returns (name, (dataset, trials)) of NAME=DATASET:TRIALS; raises ValueError for what is not there."""
    name, equals, rest = text.partition("=")
    dataset, colon, trials = rest.rpartition(":")
    if not (name and equals and colon) or "/" in name:
        raise ValueError(f"--test {text}: expected NAME=DATASET:TRIALS")
    if not Path(dataset).is_dir():
        raise FileNotFoundError(f"--test {text}: {dataset} is not a folder")
    if not Path(trials).is_file():
        raise FileNotFoundError(f"--test {text}: {trials} is not a file")
    return name, (Path(dataset), Path(trials))


def run_all(options, rows: list[str], seeds: list[int], tests: dict) -> list[str]:
    """Does every run that is neither done nor taken, seed by seed; returns a line for each that failed."""
    if not options.data or not tests:
        raise ValueError("give --data and at least one --test, or --collect-only")
    lists = {name: own_trials(options.output, name, trials) for name, (_, trials) in tests.items()}
    first = next(iter(tests))
    followed = followed_trials(options.output, first, lists[first], options.followed_recordings)
    tests = {name: (dataset, lists[name]) for name, (dataset, _) in tests.items()}
    # All rows with one seed come before the next seed, so that the table is complete early.
    failed = []
    for seed in seeds:
        for row in rows:
            folder = run_folder(options.output, options.budget, row, seed)
            if (folder / study_results.RESULT_FILE).exists():
                continue
            if options.budget == "time" and row == ablation.REFERENCE:
                continue  # it takes its own time: the run at equal steps is the same one
            claim = claims.take(folder, options.take_over)
            if claim is None:
                print(f"{row}, seed {seed}: taken by another process", file=sys.stderr)
                continue
            try:
                problem = run_one(options, row, seed, tests, followed, folder)
            finally:
                claim.release()
            if problem:
                failed.append(f"{row}, seed {seed}, equal {options.budget}: {problem}")
                print(f"run.py: {failed[-1]}", file=sys.stderr)
    return failed


def own_trials(output: Path, name: str, trials: Path) -> Path:
    """Returns the study's copy of a trial list, OUTPUT/trials/NAME.txt; ValueError when that is another list."""
    copy = output / "trials" / f"{name}.txt"
    text = trials.read_text(encoding="utf-8-sig")
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_text(copy, text)
    elif copy.read_text(encoding="utf-8") != text:
        raise ValueError(f"{trials} is not the list that {copy} is a copy of: give that one, or another --output")
    return copy


def followed_trials(output: Path, name: str, trials: Path, recordings: int) -> Path:
    """Returns a list of the trials among some recordings, always the same ones, for following runs at less cost."""
    listed = read_trials(trials)
    listed.require_both_kinds()
    if not 0 < recordings < len(listed.recordings):
        return trials
    chosen = np.zeros(len(listed.recordings), bool)
    chosen[np.random.default_rng(0).permutation(len(chosen))[:recordings]] = True
    rows = np.flatnonzero(chosen[listed.pairs].all(axis=1))
    lines = [f"{int(listed.target[i])}\t{listed.enrol[i]}\t{listed.test[i]}\n" for i in rows]
    path = output / "trials" / f"{name}-followed-{recordings}.txt"
    write_text(path, "".join(lines))
    return path


def run_folder(output: Path, budget: str, row: str, seed: int) -> Path:
    """Returns where a run lives: OUTPUT/BUDGET/ROW/seed-N."""
    return output / budget / row / f"seed-{seed}"


def overrides_of(options, row: str, seed: int, tests: dict, followed: Path) -> list[str]:
    """Returns the "key=value" texts of a run: paths and seed, the row's, the command's, its length."""
    dataset, _ = next(iter(tests.values()))
    common = [
        f"seed={seed}",
        f"data.train={options.data}",
        f"evaluation.data={dataset}",
        f"evaluation.trials={followed}",
        *(f"augment.{kind}={getattr(options, kind)}" for kind in ("noise", "music", "speech", "rirs")),
    ]
    texts = [*common, *ablation.ROWS[row].overrides, *options.overrides]
    texts += ablation.gate_overrides(row, load_config(options.config, [f"--config.{text}" for text in texts]))
    return texts + time_overrides(options, row, texts) if options.budget == "time" else texts


def time_overrides(options, row: str, texts: list[str]) -> list[str]:
    """Returns the overrides that give a row the time of the reference; evaluations stay as many."""
    path = options.output / "time" / row / "steps.json"
    if not path.exists():
        steps, factor = study_results.steps_at_equal_time(options.output, row)
        path.parent.mkdir(parents=True, exist_ok=True)
        # The first process to get here decides for all seeds, whatever is measured later.
        claims.write_once(path, json.dumps({"total_steps": steps, "factor": factor}) + "\n")
    length = json.loads(path.read_text(encoding="utf-8"))
    evaluation = load_config(options.config, [f"--config.{text}" for text in texts]).evaluation
    unit = "steps" if evaluation.every_steps > 0 else "epochs"
    every = evaluation[f"every_{unit}"] * length["factor"]
    every = max(round(every), 1) if unit == "steps" else every
    return [f"total_steps={length['total_steps']}", "total_epochs=-1", f"evaluation.every_{unit}={every}"]


def stage_two_overrides(options, row: str, seed: int, folder: Path) -> list[str]:
    """Returns the overrides of a row that starts from another one's network, and clusters its embeddings first.

    ValueError where that row has not been run, or its embeddings cannot be clustered.
    """
    chosen = ablation.ROWS[row]
    start, labels = run_folder(options.output, options.budget, chosen.start, seed), folder / "clusters.tsv"
    if not (start / study_results.RESULT_FILE).exists():
        raise ValueError(f"it starts from {chosen.start}, seed {seed}, which has no result yet: run that row first")
    if not labels.exists():
        folder.mkdir(parents=True, exist_ok=True)
        of_network = ["--model", str(start), "--data", str(options.data)]
        clusters = ["--clusters", str(chosen.clusters), "--output", str(labels)]
        if status := child([sys.executable, "-m", "memo_jax", "cluster", *of_network, *clusters]):
            raise ValueError(f"clustering ended with {status}")
    return [f"init={start}", f"supervised.labels={labels}"]


def run_one(options, row: str, seed: int, tests: dict, followed: Path, folder: Path) -> str | None:
    """Trains and tests a run, or continues it, and writes its result; returns what went wrong, or None."""
    overrides = overrides_of(options, row, seed, tests, followed)
    if ablation.ROWS[row].start:
        try:
            overrides += stage_two_overrides(options, row, seed, folder)
        except ValueError as error:
            return str(error)
    print(f"\n{row}, seed {seed}, equal {options.budget}: {folder}", file=sys.stderr, flush=True)
    command = [*shlex.split(options.train_command), "--config", str(options.config), "--workdir", str(folder)]
    status = child(command + [f"--config.{text}" for text in overrides])
    if status not in (0, STOPPED):
        return f"training ended with {status}"
    measured = {}
    if status == 0:
        for name, (dataset, trials) in tests.items():
            for branch in load_config(options.config, [f"--config.{text}" for text in overrides]).model.branches:
                where = folder / "test" / name / branch
                done = where / "results.json"
                if not done.exists():
                    status = child(
                        [
                            sys.executable,
                            "-m",
                            "memo_jax",
                            "eval",
                            "--workdir",
                            str(folder),
                            "--data",
                            str(dataset),
                            "--trials",
                            str(trials),
                            "--branch",
                            branch,
                            "--output",
                            str(where),
                            "--replicates",
                            str(options.replicates),
                        ]
                    )
                    if status:
                        return f"testing on {name} ended with {status}"
                measured.setdefault(name, {})[branch] = test_result(json.loads(done.read_text(encoding="utf-8")))
    result = run_result(options, row, seed, folder, "collapsed" if status == STOPPED else "finished", measured)
    write_text(folder / study_results.RESULT_FILE, as_json(result) + "\n")
    return None


def test_result(results: dict) -> dict:
    """Returns what the study keeps from an evaluation: rates and counts, no paths."""
    kept = (
        "eer",
        "eer_interval",
        "min_dcf_0.01",
        "min_dcf_0.05",
        "trials",
        "targets",
        "recordings",
        "log_mel_statistics",
        "network",
        "fingerprint",
    )
    return {name: results[name] for name in kept}


def run_result(options, row: str, seed: int, folder: Path, status: str, tests: dict) -> dict:
    """Returns the result of a run: its config, course, cost, error rates, and the versions and machine it ran with."""
    rows, record = read_metrics(folder), read_run(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    steps, each = rows[-1]["step"] if rows else 0, cpu_seconds_a_step(rows)
    return {
        "row": row,
        "title": ablation.ROWS[row].title,
        "against": list(ablation.ROWS[row].against),
        "seed": seed,
        "budget": options.budget,
        "overrides": [*ablation.ROWS[row].overrides, *options.overrides],  # of a key, the last counts
        "status": status,
        "total_steps": max(config["total_steps"], steps),
        "steps": steps,
        "cpu_seconds_a_step": each,
        "cpu_seconds": each and each * steps,
        "cpu_seconds_with_compilation_and_evaluation": sum(s.get("cpu_seconds", 0) for s in record["starts"]),
        "branches": config["model"]["branches"]["__tuple__"],
        "gate": {
            "rule": config["gate"]["rule"],
            "closed_at": closing_step(rows),
            "min_alignment": config["gate"]["min_alignment"],
        },
        "tests": tests,
        "curves": {
            name: [[one["step"], one[name]] for one in rows if one.get(name) is not None]
            for name in sorted(
                {
                    name
                    for one in rows
                    for name in one
                    if name.startswith(("eer/", "alignment/", "gate/alignment", "gate/loss", "loss/", "kl/"))
                }
            )
        },
        "data": {
            "fingerprint": record["data"]["fingerprint"],
            "utterances": record["data"]["utterances"],
            "banks": record["data"]["banks"],
        },
        **{key: record["starts"][-1][key] for key in ("commit", "versions", "hardware")},
    }


def closing_step(rows: list[dict]) -> int | None:
    """Returns the first step without the contrastive term, None where the gate stayed open or never was."""
    closed = [int(row["gate/closed_at"]) for row in rows if row.get("gate/closed_at", -1) >= 0]
    return closed[-1] if closed else None


def cpu_seconds_a_step(rows: list[dict]) -> float | None:
    """Returns the median over the logged intervals, which leaves out compilation, evaluations and restarts.

    None where fewer than two rows were logged.
    """
    logged = [row for row in rows if row.get("cpu_seconds") is not None]
    each = [
        (b["cpu_seconds"] - a["cpu_seconds"]) / (b["step"] - a["step"])
        for a, b in zip(logged, logged[1:])
        if b["cpu_seconds"] > a["cpu_seconds"] and b["step"] > a["step"]
    ]
    return statistics.median(each) if each else None


def child(command: list[str]) -> int:
    """Runs a command and returns its exit status. The command ends when this process does."""
    path = os.pathsep.join(filter(None, (str(Path(memo_jax.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, preexec_fn=end_with_parent)
    try:
        return process.wait()
    except BaseException:
        process.terminate()  # training then saves where it is
        process.wait()
        raise


def end_with_parent() -> None:
    """In a child on Linux: asks the kernel to kill it with this process, whose run another process then takes over."""
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    sys.exit(main())
