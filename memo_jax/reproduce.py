"""Repeats a run from its config and compares the numbers."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from memo_jax import config as configs
from memo_jax.files import check_local
from memo_jax.inference.evaluate import RATES, evaluate, training_evaluation
from memo_jax.inference.workdir import starting_parts
from memo_jax.log import read_metrics
from memo_jax.scoring.score import read_scores
from memo_jax.scoring.trials import read_trials
from memo_jax.training.checkpoint import load_state
from memo_jax.training.monitor import TIMES
from memo_jax.training.run_record import read_run
from memo_jax.training.saved_checkpoint import saved_steps
from memo_jax.training.train import FREE_ON_RESUME, check_same_config, train

MOVABLE = (*FREE_ON_RESUME, "init", "augment.noise:", "augment.music:", "augment.speech:", "augment.rirs:")
RATE_NAMES = tuple(f"{rate}/" for rate in RATES)  # how metrics of an evaluation while training begin


def reproduce(run: str | os.PathLike, output: str | os.PathLike, overrides: Sequence[str] = ()) -> dict:
    """Repeats a run in a new workdir up to its last logged step, repeats its evaluations, and compares.

    Args:
      run: workdir of a run; every `results.json` that `memo-jax eval` wrote below it is reproduced, too.
      output: the new workdir; results of an earlier call are reused.
      overrides: texts "--config.KEY=VALUE" that say where data, trials and banks are now.

    Returns:
      A dict: "identical" (bool); "steps" (number of rows compared); "metrics", "parameters" and "evaluations" ({name:
      largest absolute difference} of those that differ); "missing" (what only one of the runs has); "environment"
      (lines that say what has changed); "output".

    Raises:
      FileNotFoundError: `run` is not a workdir.
      ValueError: it has logged no step or was extended, `output` is `run`, or an override changes what is learned.
    """
    check_local(run)
    check_local(output)
    run, output = Path(run), Path(output)
    config = configs.workdir_config(run)
    if output.resolve() == run.resolve():
        raise ValueError(f"{output} is the run itself: give another workdir for the repetition")
    old = read_metrics(run)
    if not old or old[-1]["step"] < 1:
        raise ValueError(f"{run} has logged no step yet, so there is nothing to compare with")
    for start in (read_run(run) or {"starts": []})["starts"]:
        if "extended_from" in start:
            raise ValueError(
                f"{run} was extended from {start['extended_from']} to {start['total_steps']} steps before step "
                f"{start['first_step']}, where its schedules changed: no config can repeat such a run from the start"
            )
    again = configs.with_overrides(config, overrides)
    learnt = [line for line in configs.config_differences(config, again) if not line.startswith(MOVABLE)]
    if learnt:
        raise ValueError(
            f"{'; '.join(learnt)}: this would be a different run; only paths, logging and evaluation may be changed"
        )
    last = old[-1]["step"]
    check_same_config(output, again)
    if last not in saved_steps(output):  # an earlier call has trained it
        evaluation = training_evaluation(again)
        start = None if saved_steps(output) else starting_parts(again)  # an interrupted call has begun it
        train(again, output, evaluation=evaluation, start=start, stop_at_step=last)
    environment = environment_differences(run, output)
    new = read_metrics(output)
    if evaluations_differ(run, output):
        environment.append("evaluation: other trials or recordings; error rates while training are not compared")
        old, new = ([without_rates(row) for row in rows] for rows in (old, new))
    found = compare_metrics(old, new) | {
        "parameters": {},
        "environment": environment,
        "evaluations": {},
        "output": str(output),
    }
    if steps := set(saved_steps(run)) & set(saved_steps(output)):
        found["parameters"] = compare_parameters(run, output, max(steps))
    else:
        found["missing"].append("parameters (no checkpoint of the same step)")
    for path in sorted(run.rglob("results.json")):
        if output.resolve() not in path.resolve().parents:
            name, evaluated = str(path.parent.relative_to(run)), json.loads(path.read_text(encoding="utf-8"))
            if evaluated["step"] and evaluated["step"] not in saved_steps(output):
                found["missing"].append(f"{name}, of step {evaluated['step']}, whose checkpoint is not kept")
            else:
                found["evaluations"] |= evaluate_again(evaluated, run, output, name, again)
    found["identical"] = not (found["metrics"] or found["parameters"] or found["evaluations"] or found["missing"])
    return found


def evaluations_differ(run: Path, output: Path) -> bool:
    """Returns whether the starts of two runs measured error rates on different trials or recordings."""
    records = filter(None, (read_run(run), read_run(output)))
    found = [start.get("evaluation") for record in records for start in record["starts"]]
    return len({json.dumps(one) for one in found if one}) > 1


def without_rates(row: dict) -> dict:
    """Returns a row of metrics without error rates."""
    return {name: value for name, value in row.items() if not name.startswith(RATE_NAMES)}


def compare_metrics(old: Sequence[dict], new: Sequence[dict]) -> dict:
    """Returns "steps" compared, "metrics" {name: largest absolute difference} and "missing" steps and names.

    An interrupted run has also logged the steps at which it was interrupted, and an evaluation at what was then its
    last step. Rows and error rates that only one of the runs has are therefore ignored, except the last row, which both
    must have.
    """
    rows = [{row["step"]: row for row in run} for run in (old, new)]
    both = sorted(rows[0].keys() & rows[1].keys())
    metrics, missing = {}, []
    if old[-1]["step"] not in rows[1]:
        missing.append(f"step {old[-1]['step']}")
    for step in both:
        a, b = (run[step] for run in rows)
        for name in sorted(a.keys() | b.keys()):
            if name in TIMES:
                continue
            # A number that is not finite was logged as null.
            if (a.get(name) is None) != (b.get(name) is None):
                if not name.startswith(RATE_NAMES):
                    missing.append(f"{name} at step {step}")
            elif a.get(name) != b.get(name):
                metrics[name] = max(metrics.get(name, 0.0), abs(a[name] - b[name]))
    return {"steps": len(both), "metrics": metrics, "missing": missing}


def compare_parameters(run: Path, output: Path, step: int) -> dict[str, float]:
    """Returns {part of the state: largest absolute difference} at a checkpoint that both runs have."""
    states = [load_state(folder, step) for folder in (run, output)]
    differences = {}
    leaves = [jax.tree_util.tree_flatten_with_path(state)[0] for state in states]
    for (path, a), (_, b) in zip(*leaves, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            part = str(getattr(path[0], "key", path[0]))
            size = float(np.max(np.abs(a.astype(np.float64) - b)))
            differences[part] = max(differences.get(part, 0.0), size)
    return differences


def evaluate_again(old: dict, run: Path, output: Path, name: str, config: configs.ConfigDict) -> dict[str, float]:
    """Returns {rate of an evaluation: absolute difference} for the rates that differ on the new run.

    Of a list without labels, it is the largest difference of a score.
    """
    made = output / name / "results.json"
    if not made.exists():
        data = old["data"] if Path(old["data"]).exists() else config.evaluation.data
        evaluate(
            output,
            data,
            old["trial_list"],
            output / name,
            branch=old["branch"],
            role=old["role"],
            step=old["step"],
            crops=old["crops"],
            crop_seconds=old.get("crop_seconds", 4.0),
            enrollments=old.get("enrollments"),
            replicates=0,
        )
    new = json.loads(made.read_text(encoding="utf-8"))
    if "eer" not in old:
        trials = read_trials(old["trial_list"], old.get("enrollments"))
        one, other = (read_scores(folder / name / "scores.txt", trials) for folder in (run, output))
        return {} if np.array_equal(one, other) else {f"{name}: scores": float(np.abs(one - other).max())}
    return {f"{name}: {rate}": abs(new[rate] - old[rate]) for rate in RATES if new[rate] != old[rate]}


def environment_differences(run: Path, output: Path) -> list[str]:
    """Returns lines that say how data, versions, commit and hardware of two runs differ."""
    old, new = read_run(run), read_run(output)
    if old is None:
        return [f"{run} does not record its environment: it was made by an earlier version"]
    lines = []
    if len({json.dumps([start[key] for key in ("commit", "versions", "hardware")]) for start in old["starts"]}) > 1:
        lines.append("the run was resumed with other versions or on another machine; its last start is compared")
    then, now = old["starts"][-1], new["starts"][-1]
    pairs = [("commit", then["commit"], now["commit"])]
    pairs += [(f"data.{key}", old["data"][key], new["data"][key]) for key in ("fingerprint", "banks")]
    for group in ("versions", "hardware"):
        pairs += [(key, then[group].get(key), now[group].get(key)) for key in {**then[group], **now[group]}]
    return lines + [f"{name}: {a} → {b}" for name, a, b in pairs if a != b]


def comparison_text(run: str | os.PathLike, found: dict) -> str:
    """Returns the result of `reproduce` as text."""
    lines = [f"warning: {line}" for line in found["environment"]]
    lines.append(f"{run} repeated in {found['output']}: {found['steps']} rows of metrics compared")
    for kind in ("metrics", "parameters", "evaluations"):
        of_kind = found[kind]
        if of_kind:
            worst = max(of_kind, key=of_kind.get)
            lines.append(f"  {len(of_kind)} {kind} differ, {worst} the most, by {of_kind[worst]:.4g}")
        else:
            lines.append(f"  {kind}: no difference")
    if found["missing"]:
        lines.append(
            f"  only in one of them: {', '.join(found['missing'][:5])}"
            + (f" and {len(found['missing']) - 5} more" if len(found["missing"]) > 5 else "")
        )
    return "\n".join([*lines, "identical" if found["identical"] else "different"])
