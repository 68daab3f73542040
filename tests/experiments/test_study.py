"""The study's runner: runs, claims, resumption, equal time, and the table and plots made from results."""

import json
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

import tiny

sys.path.insert(0, str(tiny.ROOT / "experiments"))
import ablation  # noqa: E402
import claims  # noqa: E402
import compare_rows  # noqa: E402
import run as study  # noqa: E402
import study_figures  # noqa: E402
import study_results  # noqa: E402
from memo_jax.config import load_config  # noqa: E402
from memo_jax.log import read_metrics  # noqa: E402
from memo_jax.scoring.metrics import eer  # noqa: E402
from memo_jax.scoring.trials import read_trials  # noqa: E402
from memo_jax.training.run_record import RunRecord  # noqa: E402
from memo_jax.training.saved_checkpoint import saved_steps  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_once")
SMALL_ROWS = {
    "dino-resnet": ablation.Row("plain", ("model.branches=resnet", "gate.rule=never"), ()),
    ablation.REFERENCE: ablation.Row("contrastive", ("model.branches=resnet",), ("dino-resnet",), True),
}


def arguments(output, *more):
    data = tiny.material()
    return [
        "--data",
        str(data.dataset),
        "--test",
        f"tiny={data.dataset}:{data.trials}",
        "--output",
        str(output),
        "--results",
        str(output / "collected"),
        "--config",
        str(data.config),
        "--seeds",
        "0",
        "--replicates",
        "20",
        "--followed-recordings",
        "6",
        *more,
        "--config.data.local_crops=0",
        "--config.total_steps=6",
        "--config.checkpoint.every_steps=2",
        "--config.gate.stop_steps=3",
    ]


@pytest.fixture
def here(monkeypatch):
    """Runs the runner's commands in this process, and records them; with `stop` set, the next one stops at step 3."""
    monkeypatch.setattr(ablation, "ROWS", SMALL_ROWS)
    state = types.SimpleNamespace(ran=[], stop=False)

    def child(command):
        words = command[command.index("memo_jax") + 1 :]
        state.ran.append(words)
        stopped, state.stop = state.stop, False
        status, text = tiny.here(*words, *(["--stop-at-step=3"] if stopped else []))
        assert status == 0, text
        return 75 if stopped else 0

    monkeypatch.setattr(study, "child", child)
    return state


def test_two_rows_are_run_resumed_tested_and_collected(here, tmp_path, capsys):
    """The first training is stopped: its run is free again; the same command finishes everything, then has no work."""
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
    assert result["overrides"][-1] == "gate.stop_steps=3", "the command's own overrides, too"
    target, scores = read_trials(tiny.material().trials).target, folder / "test" / "tiny" / "resnet" / "scores.txt"
    printed = [float(line.split("\t")[0]) for line in scores.read_text().splitlines()]
    assert result["tests"]["tiny"]["resnet"]["eer"] == pytest.approx(100 * eer(printed, target))
    other = json.loads((output / "steps" / ablation.REFERENCE / "seed-0" / "result.json").read_text())
    assert other["gate"]["closed_at"] == 3 and {len(v) for k, v in other["curves"].items() if "alignment/" in k} == {3}
    assert str(tmp_path) not in (folder / "result.json").read_text(), "results are for others to read"

    assert "| contrastive | 1 | 6 | " in text and text.rstrip().endswith(f"commits: {result['commit']}.")
    collected = output / "collected"
    assert (collected / "steps-dino-resnet-seed-0.json").exists() and (collected / "results.md").read_text() in text
    followed = read_trials(output / "trials" / "tiny-followed-6.txt")
    assert len(followed.recordings) == 6 and 0 < len(followed) < len(target)

    assert study.main(arguments(output)) == 0 and len(here.ran) == 5
    (output / "trials" / "tiny.txt").write_text("1 a b\n")
    assert study.main(arguments(output)) == 2 and "is not the list that" in capsys.readouterr().err


def test_wrong_input_is_named(tmp_path, capsys):
    data = tiny.material()
    good = arguments(tmp_path / "study")
    for wrong, said in (
        (["--rows", "memo"], "no row memo: choose from dino-ecapa"),
        (["--test", "a"], "--test a: expected NAME=DATASET"),
        (["--test", f"a={data.dataset}:nowhere.txt"], "nowhere.txt is not a file"),
        (["--test", f"a=nowhere:{data.trials}"], "nowhere is not a folder"),
        (["--seeds", "a"], "invalid literal"),
        (["--budget", "time"], "no result at equal steps of dino-ecapa, memo-plateau"),
    ):
        assert study.main(good + wrong) == 2 and said in capsys.readouterr().err
    assert study.main(["--output", str(tmp_path)]) == 2 and "give --data and at least one --test" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        study.main([*good, "--rowz=a"])


@pytest.mark.parametrize("rows, steps", [('{"step": 2, "loss": 1.0, "gate/closed_at": -1.0}\n', 2), ("", 0)])
def test_a_collapse_is_a_result_and_a_failure_is_reported_and_left_to_others(
    rows, steps, tmp_path, monkeypatch, capsys
):
    """Training that ends with 3 is recorded; with another status the run stays free and the queue continues."""
    monkeypatch.setattr(ablation, "ROWS", SMALL_ROWS)
    statuses = [3, 9]

    def child(command):
        folder = Path(command[command.index("--workdir") + 1])
        (folder / "config.json").write_text(
            json.dumps(
                {
                    "total_steps": 6,
                    "gate": {"rule": "never", "min_alignment": 0.0},
                    "model": {"branches": {"__tuple__": ["resnet"]}},
                }
            )
        )
        (folder / "metrics.jsonl").write_text(rows)
        RunRecord(folder, seed=0, data={"fingerprint": "f", "utterances": 20, "banks": {}}, begin=0, total=6)
        return statuses.pop(0)

    monkeypatch.setattr(study, "child", child)
    assert study.main(arguments(tmp_path)) == 1
    said = capsys.readouterr()
    assert "memo-plateau, seed 0, equal steps: training ended with 9" in said.err
    assert f"| `dino-resnet` | plain | 1 | {steps} | – | – |" in said.out, "collapsed, so there is no rate"
    assert claims.take(tmp_path / "steps" / ablation.REFERENCE / "seed-0") is not None


def test_a_row_of_stage_two_clusters_with_the_network_of_the_row_it_starts_from(tmp_path, monkeypatch, capsys):
    """With the network of the same seed, and only once it is trained; clusters are made once."""
    rows = SMALL_ROWS | {"second": ablation.Row("second", ("supervised.weight=1",), (), start="first", clusters=3)}
    monkeypatch.setattr(ablation, "ROWS", {"first": rows["dino-resnet"]} | rows)
    ran = []

    def child(command):
        ran.append(command[command.index("memo_jax") + 1 :])
        if ran[-1][0] == "cluster":
            Path(command[-1]).write_text("a\t0\n")
        return 0 if ran[-1][0] == "cluster" else 9

    monkeypatch.setattr(study, "child", child)
    command = arguments(tmp_path, "--rows", "second", "--seeds", "1")
    assert study.main(command) == 2 and not ran, "nothing to collect"
    assert (
        "second, seed 1, equal steps: it starts from first, seed 1, which has no result yet" in capsys.readouterr().err
    )
    first, second = (tmp_path / "steps" / name / "seed-1" for name in ("first", "second"))
    first.mkdir(parents=True)
    (first / "result.json").write_text("{}")
    for _ in range(2):
        study.main(command)
    assert [words[0] for words in ran] == ["cluster", "train", "train"]
    labels = str(second / "clusters.tsv")
    assert ran[0][1:] == ["--model", str(first), "--data", command[1], "--clusters", "3", "--output", labels]
    assert {f"--config.init={first}", f"--config.supervised.labels={labels}"} < set(ran[1])


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
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(200)"
    command = [sys.executable, "-c", code, str(tiny.ROOT / "experiments"), sleeper]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=tiny.environment())
    runner.stdout.readline()
    runner.kill()
    runner.wait()
    began = time.monotonic()
    assert runner.stdout.read() == "" and time.monotonic() - began < 60, "the pipe ends with the last that holds it"


# -------------------------------------------------------------------------------------- table and plots


SEEDS = {name: (0, 1, 2) if row.main else (0,) for name, row in ablation.ROWS.items()}


def write_result(output, row, seed, quality, budget="steps", cost=1.0, trials=None):
    """Makes up the result of a run whose error falls to about `quality` percent, and its scores; returns the scores."""
    rng = np.random.default_rng([seed, list(ablation.ROWS).index(row)])
    overrides = dict(text.split("=") for text in ablation.ROWS[row].overrides)
    branches = overrides.get("model.branches", "ecapa,resnet").split(",")
    rule = overrides.get("gate.rule", "plateau")
    closed = {
        "step": round(100 * ablation.ROWS[row].gate_factor),
        "plateau": 125 + 25 * seed,
        "conflict": 70 + 4 * seed,
    }
    folder = output / budget / row / f"seed-{seed}"
    scores = np.where(trials.target, 0.3 - quality / 100, 0.0) + 0.1 * rng.standard_normal(len(trials))
    scores = np.round(scores, 6)
    steps, each = np.arange(0, 201, 40), np.arange(10, 201, 10)
    curves = {
        f"eer/{branch}": (26 - (26 - quality) * (1 - np.exp(-steps / 60)) + rng.normal(0, 0.2, len(steps)))
        for branch in branches
    }
    if rule == "always" and len(branches) == 2:
        for branch in branches:
            curves[f"alignment/{branch}"] = 0.3 * np.exp(-each / 90) + 0.1 + rng.normal(0, 0.02, len(each))
            curves[f"loss/contrastive/{branch}"] = 60 * np.exp(-each / 150) + rng.normal(0, 2, len(each))
    rates = {
        "eer": 100 * eer(scores, trials.target),
        "eer_interval": None,
        "min_dcf_0.05": 0.5 + quality / 100,
        "log_mel_statistics": {"eer": 14.65, "min_dcf_0.05": 0.548},
    }
    result = {
        "row": row,
        "seed": seed,
        "budget": budget,
        "status": "finished",
        "total_steps": 200,
        "steps": 200,
        "cpu_seconds_a_step": cost,
        "cpu_seconds": 200 * cost,
        "branches": branches,
        "commit": "abc",
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
    """Results of every row, main rows with three seeds; returns {(budget, row, seed): scores} and the trials."""
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
        ("steps", row, seed): write_result(
            output, row, seed, quality[row], trials=trials, cost=0.5 if "ecapa" in row else 1.25
        )
        for row, seeds in SEEDS.items()
        for seed in seeds
    }
    found["time", "dino-ecapa", 0] = write_result(output, "dino-ecapa", 0, 18, "time", 0.5, trials)
    return found, trials


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """(folder, scores, trials, table) of a study whose results are made up, collected."""
    output = tmp_path_factory.mktemp("made") / "study"
    found, trials = made_up_study(output)
    return output, found, trials, study_results.collect(output, output / "collected", replicates=40)


def row_of(table, row):
    """The cells of a row of the first table of a budget."""
    (line,) = re.findall(rf"^\| `{row}` \| \D.*$", table, re.MULTILINE)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_means_over_seeds_intervals_comparisons_and_costs(made_up):
    _, scores, trials, text = made_up
    equal_steps, equal_time = text.split("### Equal time")
    rates = {
        row: [100 * eer(scores["steps", row, seed], trials.target) for seed in seeds] for row, seeds in SEEDS.items()
    }
    for row, of_row in rates.items():
        name, title, seeds, steps, minutes, closes, one, against, *_ = row_of(equal_steps, row)
        assert title == ablation.ROWS[row].title and int(seeds) == len(of_row) and steps == "200"
        spread = f" ± {np.std(of_row, ddof=1):.2f}" if len(of_row) > 1 else ""
        mean, low, high = re.fullmatch(rf"([\d.]+){spread} \(([\d.]+)–([\d.]+)\)", one).groups()
        assert mean == f"{np.mean(of_row):.2f}" and float(low) < np.mean(of_row) < float(high)
        compared = re.findall(r"`([\w-]+)` ([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\), p ([\d.]+)", against)
        assert [found[0] for found in compared] == list(ablation.ROWS[row].against)
        for other, difference, low, high, p in compared:
            both = min(len(of_row), len(rates[other]))
            wanted = np.mean(of_row[:both]) - np.mean(rates[other][:both])
            assert float(difference) == pytest.approx(wanted, abs=0.006)
            assert float(low) <= float(difference) <= float(high) and 0 < float(p) <= 1
    assert row_of(equal_steps, "dino-ecapa")[4] == "1.7" and row_of(equal_steps, "memo-step")[4] == "4.2"
    assert row_of(equal_steps, ablation.REFERENCE)[5] == "125, 150, 175" and row_of(equal_steps, "multi-head")[5] == "–"
    assert row_of(equal_time, "dino-ecapa")[7].startswith(f"`{ablation.REFERENCE}` +"), "compared with MeMo, and worse"
    assert row_of(equal_time, ablation.REFERENCE)[6] == row_of(equal_steps, ablation.REFERENCE)[6], "the same runs"
    assert "Log-mel statistics on one: 14.65 % EER, minDCF 0.548." in text


def test_the_table_says_how_many_seeds_of_a_row_collapsed(made_up, tmp_path):
    output = shutil.copytree(made_up[0], tmp_path / "study")
    result = output / "steps" / "multi-head" / "seed-1" / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"status": "collapsed", "tests": {}}))
    rate = row_of(study_results.collect(output, tmp_path / "collected", replicates=2), "multi-head")[6]
    rates = [100 * eer(made_up[1]["steps", "multi-head", seed], made_up[2].target) for seed in (0, 2)]
    assert rate.startswith(f"{np.mean(rates):.2f} ") and rate.endswith("), 1 of 3 collapsed")


def test_any_two_rows_are_compared_by_any_networks(made_up, capsys):
    output, scores, trials, _ = made_up
    pairs = ("multi-head:dino-ecapa", "multi-head:dino-ecapa@time", "multi-head+ecapa+resnet:multi-head+resnet")
    assert compare_rows.main([*pairs, "--output", str(output), "--replicates", "20"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {line[0]: line[1:] for line in lines}
    rates = [100 * eer(scores["steps", "multi-head", seed], trials.target) for seed in (0, 1, 2)]
    assert rows["`multi-head`"][0] == "3"
    assert rows["`multi-head`"][1].startswith(f"{np.mean(rates):.2f} ± {np.std(rates, ddof=1):.2f}, ")
    assert rows["`dino-ecapa@time`"][0] == "1"
    other = 100 * eer(scores["time", "dino-ecapa", 0], trials.target)
    seeds, found, _ = rows["`multi-head` against `dino-ecapa@time`"]
    assert seeds == "1" and found.startswith(f"{rates[0] - other:+.2f} (")
    assert rows["`multi-head+ecapa+resnet` against `multi-head+resnet`"][1].startswith("+0.00 "), "made up alike"
    for wrong, said in (
        ("multi-head", "multi-head: give SYSTEM:OTHER"),
        ("multi-head:dino", "dino: no run of that row is done"),
        ("multi-head:dino-ecapa+resnet", "no network resnet in that row"),
    ):
        assert compare_rows.main([wrong, "--output", str(output)]) == 2 and said in capsys.readouterr().err


def test_plots_are_drawn_with_bands_closings_and_agreement(made_up):
    output, *_ = made_up
    collected = output / "collected"
    for name in ("eer_steps.png", "eer_time.png", "gate.png", "alignment.png"):
        assert (collected / name).stat().st_size > 10_000
    assert len(list(collected.glob("*.json"))) == sum(map(len, SEEDS.values())) + 1
    rows = study_results.runs_by_row(study_results.read_results(output), "steps")
    rows = {row: [run.result for run in runs] for row, runs in rows.items()}
    found = study_figures.curve(rows["multi-head"])
    values = np.array([[value for _, value in one["curves"]["eer/ecapa"]] for one in rows["multi-head"]])
    assert found.steps.tolist() == [0, 40, 80, 120, 160, 200]
    np.testing.assert_allclose(found.mean, values.mean(axis=0))
    np.testing.assert_allclose(found.deviation, values.std(axis=0, ddof=1))
    (first, *_) = study_figures.eer_figure(rows).axes
    assert len(first.lines) == len(first.collections) == 7, "a line and a band a row"
    places = {name: [study_figures.closing_point(one) for one in rows[name]] for name in rows}
    assert places["multi-head"] == [0] * 3 and places["memo-always"] == [200] * 3
    assert places["memo-conflict"] == [70, 74, 78]


def test_equal_time_gives_each_row_the_steps_that_its_cost_allows(made_up):
    """As many as fit into the reference's time, the same for all seeds, whatever is measured later."""
    output, *_ = made_up
    options = study.build_parser().parse_args(["--output", str(output)])
    texts = ["total_steps=200", "evaluation.every_steps=40"]
    longer = study.time_overrides(options, "dino-ecapa", texts)
    assert longer == ["total_steps=500", "total_epochs=-1", "evaluation.every_steps=100"]
    load_config(options.config, [f"--config.{text}" for text in texts + longer])
    in_epochs = study.time_overrides(options, "dino-ecapa", ["evaluation.every_steps=-1", "evaluation.every_epochs=2"])
    assert in_epochs[-1] == "evaluation.every_epochs=5.0"
    write_result(output, "dino-ecapa", 3, 18, cost=50.0, trials=read_trials(output / "trials" / "one.txt"))
    write_result(output, "dino-ecapa", 4, 18, cost=50.0, trials=read_trials(output / "trials" / "one.txt"))
    assert study.time_overrides(options, "dino-ecapa", texts) == longer


def test_scores_of_other_trials_and_damaged_results_are_refused(made_up, tmp_path):
    output = shutil.copytree(made_up[0], tmp_path / "study")
    scores = output / "steps" / "dino-ecapa" / "seed-0" / "test" / "one" / "ecapa" / "scores.txt"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=f"{scores}: not the scores of these trials"):
        study_results.collect(output, tmp_path / "collected", replicates=2)
    damaged = output / "steps" / "dino-ecapa" / "seed-0" / "result.json"
    damaged.write_text("{")
    with pytest.raises(ValueError, match=f"{damaged}: not the result of a run"):
        study_results.collect(output, tmp_path / "collected", replicates=2)
