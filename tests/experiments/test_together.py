"""Networks together and apart: which runs are made, that they resume, and that the table says what the scores say."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny
from memo_jax.scoring import metrics
from memo_jax.scoring.score import write_scores
from memo_jax.scoring.trials import read_trials

sys.path.insert(0, str(tiny.ROOT / "experiments"))
import together  # noqa: E402

NOISE = {"together": 0.3, "self": 0.6, "alone": 1.0}  # of made-up scores


@pytest.fixture
def commands(monkeypatch):
    """The commands that were run; `eval` writes made-up scores, better or worse by the kind of run."""
    taken, steps, trials = [], [5], read_trials(tiny.material().trials)

    def run(command, check):
        taken.append(command[3:])
        if command[3] == "eval":
            output = Path(command[command.index("--output") + 1])
            kind, seed = output.parents[1].name.split("-")[0], int(output.parents[2].name.split("-")[1])
            rng = np.random.default_rng([seed, len(command), sum(map(ord, str(output)))])
            output.mkdir(parents=True)
            write_scores(output / "scores.txt", trials, trials.target + rng.normal(0, NOISE[kind], len(trials)))
            (output / "results.json").write_text('{"step": 5}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(together.subprocess, "run", run)
    monkeypatch.setattr(together, "saved_steps", lambda workdir: steps)
    return taken


def arguments(output, *more):
    test = f"list={tiny.material().dataset}:{tiny.material().trials}"
    given = ["--config", str(tiny.ROOT / "configs" / "small.py"), "--test", test, "--output", str(output)]
    return [*given, "--replicates", "50", *more]


def test_every_kind_is_trained_tested_and_compared(commands, tmp_path, capsys):
    assert together.main(arguments(tmp_path, "--seeds", "0,1", "--config.total_steps=5")) == 0
    trained = [command for command in commands if command[0] == "train"]
    names = [str(Path(command[command.index("--workdir") + 1]).relative_to(tmp_path)) for command in trained]
    kinds = ("together", "self-ecapa", "self-resnet", "alone-ecapa", "alone-resnet")
    assert names == [f"seed-{seed}/{kind}" for seed in (0, 1) for kind in kinds]
    assert all("--config.total_steps=5" in command for command in trained)
    assert "--config.model.branches=ecapa,resnet," in trained[0] and "--config.loss.cross=0" not in trained[0]
    assert {"--config.model.branches=resnet,", "--config.loss.cross=0", "--config.seed=1"} <= set(trained[-1])
    assert "--config.loss.self=0" in trained[-1] and "--config.loss.self=0" not in trained[1]
    for command in trained:  # each config is one that training takes
        config = together.load_config(command[2], [text for text in command if text.startswith("--config.")])
        assert config.loss.contrastive > 0 and config.gate.rule == "always"
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[:2] for row in table[2:]] == [
        [network, f"`{kind}`"] for network in ("ecapa", "resnet", "mean") for kind in NOISE
    ]
    trials = read_trials(tiny.material().trials)
    means = []
    for runs in (("together", "together"), ("alone-ecapa", "alone-resnet")):
        rates = []
        for seed in (0, 1):
            folders = [tmp_path / f"seed-{seed}" / run / "list" / name for run, name in zip(runs, ("ecapa", "resnet"))]
            scores = [together.read_scores(folder / "scores.txt", trials) for folder in folders]
            rates.append(100 * metrics.eer(np.mean(scores, axis=0), trials.target))
        means.append(np.mean(rates))
    rows = {tuple(row[:2]): row for row in table}
    assert rows["mean", "`together`"][2].startswith(f"{means[0]:.2f} ± ")
    assert rows["mean", "`alone`"][2].startswith(f"{means[1]:.2f} ± ")
    assert rows["mean", "`alone`"][5].startswith(f"{means[0] - means[1]:+.2f} (")


def test_what_is_done_is_not_tested_again_and_a_failure_is_named(commands, tmp_path, monkeypatch, capsys):
    given = arguments(tmp_path, "--seeds", "0", "--kinds", "alone")
    assert together.main(given) == 0
    commands.clear()
    assert together.main(given) == 0
    assert {command[0] for command in commands} == {"train"}, "training finds out by itself"
    monkeypatch.setattr(together.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 3))
    assert together.main(given) == 2 and "memo-jax train ended with status 3" in capsys.readouterr().err
    commands.clear()
    nameless = tmp_path / "nameless.txt"
    nameless.write_text("1 a b\n0 a c\n")
    assert together.main(arguments(tmp_path, "--test", f"other={tiny.material().dataset}:{nameless}")) == 2
    assert "speaker" in capsys.readouterr().err and not commands, "before the training"
    for more, said in ((["--kinds", "apart"], "no kind apart"), (["--test", "x"], "give NAME=DATASET:TRIALS")):
        assert together.main(arguments(tmp_path, *more)) == 2 and said in capsys.readouterr().err
