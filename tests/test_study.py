"""The study's runner: runs, claims, resumption, equal time, and the table and plots made of results."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny

sys.path.insert(0, str(tiny.ROOT / "experiments"))
import ablation  # noqa: E402
import claims  # noqa: E402
import run as study  # noqa: E402
import study_figures  # noqa: E402
import study_results  # noqa: E402

from memo_jax.checkpoint import saved_steps  # noqa: E402
from memo_jax.log import read_metrics  # noqa: E402
from memo_jax.scoring import eer  # noqa: E402
from memo_jax.trials import read_trials  # noqa: E402

SMALL_ROWS = {
    "dino-resnet": ablation.Row("plain", ("model.branches=resnet", "gate.rule=never"), ()),
    ablation.REFERENCE: ablation.Row("contrastive", ("model.branches=resnet",), ("dino-resnet",), True),
}


def arguments(output, *more):
    data = tiny.material()
    return [
        "--data", str(data.dataset), "--test", f"tiny={data.dataset}:{data.trials}", "--output", str(output),
        "--results", str(output / "collected"), "--config", str(data.config), "--seeds", "0", "--replicates", "20",
        "--followed-recordings", "6", *more, "--config.total_steps=6", "--config.checkpoint.every_steps=2",
        "--config.gate.stop_steps=3",
    ]


@pytest.fixture
def here(monkeypatch):
    """Runs the runner's commands in this process, and keeps them; with `stop` set, the next one stops at step 3."""
    monkeypatch.setattr(ablation, "ROWS", SMALL_ROWS)
    state = types.SimpleNamespace(ran=[], stop=False)

    def child(command):
        words = command[command.index("memo_jax") + 1:]
        state.ran.append(words)
        stopped, state.stop = state.stop, False
        status, text = tiny.here(*words, *(["--stop-at-step=3"] if stopped else []))
        assert status == 0, text
        return 75 if stopped else 0

    monkeypatch.setattr(study, "child", child)
    return state


def test_two_rows_are_run_resumed_tested_and_collected(here, tmp_path, capsys):
    """The first training is stopped: its run is free again, and the same command finishes all and then has no work."""
    output = tmp_path / "study"
    here.stop = True
    command = arguments(output, "--rows", "dino-resnet")
    assert study.main(command) == 2 and "holds no result yet" in capsys.readouterr().err
    folder = output / "steps" / "dino-resnet" / "seed-0"
    assert saved_steps(folder)[-1] == 3 and not (folder / "result.json").exists()

    assert study.main(arguments(output)) == 0
    text = capsys.readouterr().out
    assert [words[0] for words in here.ran] == ["train", "train", "eval", "train", "eval"]
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2, 3, 4, 5, 6], "trained once, through the stop"
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 6 and result["gate"]["closed_at"] is None and result["status"] == "finished"
    assert [step for step, _ in result["curves"]["eer/resnet"]] == [0, 3, 6]
    assert result["cpu_seconds_a_step"] > 0 and len(result["data"]["banks"]) == 0
    target, scores = read_trials(tiny.material().trials).target, folder / "test" / "tiny" / "resnet" / "scores.txt"
    printed = [float(line.split("\t")[0]) for line in scores.read_text().splitlines()]
    assert result["tests"]["tiny"]["resnet"]["eer"] == pytest.approx(100 * eer(printed, target))
    other = json.loads((output / "steps" / ablation.REFERENCE / "seed-0" / "result.json").read_text())
    assert other["gate"]["closed_at"] == 3 and {len(v) for k, v in other["curves"].items() if "alignment/" in k} == {3}
    assert str(tmp_path) not in (folder / "result.json").read_text(), "results are for others to read"

    assert f"| contrastive | 1 | 6 | " in text and text.rstrip().endswith(f"commits: {result['commit']}.")
    collected = output / "collected"
    assert (collected / "steps-dino-resnet-seed-0.json").exists() and (collected / "results.md").read_text() in text
    followed = read_trials(output / "trials" / "tiny-followed-6.txt")
    assert len(followed.recordings) == 6 and 0 < len(followed) < len(target)

    assert study.main(arguments(output)) == 0 and len(here.ran) == 5
    assert study.main(arguments(output, "--rows", "dino-resnet", "--budget", "time")) == 0
    longer = json.loads((output / "time" / "dino-resnet" / "seed-0" / "result.json").read_text())
    wanted = round(6 * other["cpu_seconds_a_step"] / result["cpu_seconds_a_step"])
    assert longer["steps"] == longer["total_steps"] == wanted
    table = capsys.readouterr().out
    assert table.index("### Equal number of steps") < table.index("### Equal time") < table.rindex("| contrastive |")


# ------------------------------------------------------------------------------------------------- claims


CLAIMER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import claims
claim = claims.take(Path(sys.argv[2]))
print("mine" if claim else "another's", flush=True)
sys.stdin.read()
"""


def claimer(folder):
    """A process that wants a run and lives until its input ends."""
    command = [sys.executable, "-c", CLAIMER, str(tiny.ROOT / "experiments"), str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_of_processes_that_want_a_run_one_gets_it_and_the_next_when_it_is_killed(tmp_path):
    processes = [claimer(tmp_path) for _ in range(4)]
    said = [process.stdout.readline().strip() for process in processes]
    assert sorted(said) == ["another's"] * 3 + ["mine"]
    assert claims.take(tmp_path) is None
    owner = processes.pop(said.index("mine"))
    owner.kill()
    owner.wait()
    for process in processes:
        process.communicate()
    claim = claims.take(tmp_path)
    assert claim is not None and claims.take(tmp_path) is None
    claim.release()
    assert claims.take(tmp_path) is not None


def test_a_run_of_another_machine_is_taken_over_only_when_told(tmp_path):
    claims.take(tmp_path)
    latest = tmp_path / "claim-1"
    latest.write_text(json.dumps(json.loads(latest.read_text()) | {"machine": ["elsewhere"]}))
    assert claims.take(tmp_path) is None
    assert claims.take(tmp_path, take_over=True) is not None
    assert claims.take(tmp_path, take_over=True) is None, "its owner is this process, which lives"
    (tmp_path / "claim-3").write_text("{")
    with pytest.raises(ValueError, match="claim-3: damaged"):
        claims.take(tmp_path)


def test_training_ends_with_the_runner_that_is_killed():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import run; run.child([sys.executable, '-c', sys.argv[2]])"
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tiny.ROOT / "experiments"), sleeper]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=tiny.environment())
    pid = int(runner.stdout.readline())
    runner.kill()
    runner.wait()
    assert runner.stdout.read() == "", "the pipe ends with the last that holds it"
    assert not Path(f"/proc/{pid}").exists()


# -------------------------------------------------------------------------------------- table and plots


SEEDS = {name: (0, 1, 2) if row.main else (0,) for name, row in ablation.ROWS.items()}


def write_result(output, row, seed, quality, budget="steps", cost=1.0, trials=None):
    """Makes up the result of a run whose error falls to about `quality` percent, and its scores; returns those."""
    rng = np.random.default_rng([seed, list(ablation.ROWS).index(row)])
    overrides = dict(text.split("=") for text in ablation.ROWS[row].overrides)
    branches = overrides.get("model.branches", "ecapa,resnet").split(",")
    rule = overrides.get("gate.rule", "plateau")
    closed = {"step": int(overrides.get("gate.stop_steps", 100)), "plateau": 125 + 25 * seed, "conflict": 70 + 4 * seed}
    folder = output / budget / row / f"seed-{seed}"
    scores = np.where(trials.target, 0.3 - quality / 100, 0.0) + 0.1 * rng.standard_normal(len(trials))
    scores = np.round(scores, 6)
    steps, each = np.arange(0, 201, 40), np.arange(10, 201, 10)
    curves = {f"eer/{branch}": (26 - (26 - quality) * (1 - np.exp(-steps / 60)) + rng.normal(0, 0.2, len(steps)))
              for branch in branches}
    if rule == "always" and len(branches) == 2:
        for branch in branches:
            curves[f"alignment/{branch}"] = 0.3 * np.exp(-each / 90) + 0.1 + rng.normal(0, 0.02, len(each))
            curves[f"loss/contrastive/{branch}"] = 60 * np.exp(-each / 150) + rng.normal(0, 2, len(each))
    rates = {"eer": 100 * eer(scores, trials.target), "eer_interval": None, "min_dcf_0.05": 0.5 + quality / 100,
             "log_mel_statistics": {"eer": 14.65}}
    result = {
        "row": row, "seed": seed, "budget": budget, "status": "finished", "total_steps": 200, "steps": 200,
        "cpu_seconds_a_step": cost, "cpu_seconds": 200 * cost, "branches": branches, "commit": "abc",
        "gate": {"rule": rule, "closed_at": closed.get(rule), "min_alignment": 0.2},
        "tests": {name: dict.fromkeys(branches, rates) for name in ("one", "two")},
        "curves": {
            name: [[int(step), float(value)] for step, value in zip(steps if "eer" in name else each, values)]
            for name, values in curves.items()
        },
    }
    for name in ("one", "two"):
        for branch in branches:
            where = folder / "test" / name / branch
            where.mkdir(parents=True, exist_ok=True)
            lines = (f"{s:.6f}\t{a}\t{b}\n" for s, a, b in zip(scores, trials.enrol, trials.test))
            (where / "scores.txt").write_text("".join(lines))
    (folder / "result.json").write_text(json.dumps(result))
    return scores


def made_up_study(output):
    """The results of every row, main rows with three seeds; returns {(budget, row, seed): scores} and the trials."""
    rng = np.random.default_rng(0)
    speakers, names = 12, [f"s{speaker}/{i}" for speaker in range(12) for i in range(6)]
    pairs = [(a, b) for a in range(len(names)) for b in range(a) if a // 6 == b // 6 or rng.random() < 0.1]
    (output / "trials").mkdir(parents=True)
    text = "".join(f"{int(a // 6 == b // 6)} {names[a]} {names[b]}\n" for a, b in pairs)
    assert speakers * 6 == len(names)
    for name in ("one", "two"):
        (output / "trials" / f"{name}.txt").write_text(text)
    trials = read_trials(output / "trials" / "one.txt")
    quality = {name: 20 - number for number, name in enumerate(ablation.ROWS)}
    found = {
        ("steps", row, seed): write_result(output, row, seed, quality[row], trials=trials,
                                           cost=0.5 if "ecapa" in row else 1.25)
        for row, seeds in SEEDS.items() for seed in seeds
    }
    found["time", "dino-ecapa", 0] = write_result(output, "dino-ecapa", 0, 18, "time", 0.5, trials)
    return found, trials
