"""The study's runner: runs, claims, resumption, equal time, and the table and plots made of results."""

import json
import re
import subprocess
import sys
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
    "dino-resnet": ablation.Row("plain", ("model.branches=resnet", "gate.rule=never"), None),
    ablation.REFERENCE: ablation.Row("contrastive", ("model.branches=resnet",), "dino-resnet", True),
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
    """Runs the runner's commands in this process, which has compiled them; counts them; may interrupt the first."""
    ran = []
    monkeypatch.setattr(ablation, "ROWS", SMALL_ROWS)

    def child(command):
        words = command[command.index("memo_jax") + 1:]
        ran.append(words)
        status, text = tiny.here(*words, *(["--stop-at-step", "3"] if here_state["stops"] else []))
        here_state["said"] = text
        if here_state.pop("stops", None):
            return 75
        return status

    here_state = {"stops": False, "said": "", "ran": ran}
    here_state = _Default(here_state)
    monkeypatch.setattr(study, "child", child)
    return here_state


class _Default(dict):
    def __missing__(self, key):
        return None


def test_two_rows_are_run_resumed_tested_and_collected(here, tmp_path, capsys):
    """The first training is stopped: its run is free again, and the same command finishes all and then has no work."""
    output = tmp_path / "study"
    here["stops"] = True
    command = arguments(output, "--rows", "dino-resnet")
    assert study.main(command) == 2 and "holds no result yet" in capsys.readouterr().err
    folder = output / "steps" / "dino-resnet" / "seed-0"
    assert saved_steps(folder)[-1] == 3 and not (folder / "result.json").exists()

    assert study.main(arguments(output)) == 0
    text = capsys.readouterr().out
    assert [words[0] for words in here["ran"]] == ["train", "train", "eval", "train", "eval"]
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

    assert study.main(arguments(output)) == 0 and len(here["ran"]) == 5
    assert study.main(arguments(output, "--rows", "dino-resnet", "--budget", "time")) == 0
    longer = json.loads((output / "time" / "dino-resnet" / "seed-0" / "result.json").read_text())
    wanted = round(6 * other["cpu_seconds_a_step"] / result["cpu_seconds_a_step"])
    assert longer["steps"] == longer["total_steps"] == wanted
    table = capsys.readouterr().out
    assert table.index("### Equal number of steps") < table.index("### Equal time") < table.rindex("| contrastive |")
