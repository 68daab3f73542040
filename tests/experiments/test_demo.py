"""The whole demo at smoke size: speech, datasets, training, evaluations, pictures and the table at the end."""

import functools
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import demo  # noqa: E402
import demo_speech  # noqa: E402
from memo_jax.config import load_config  # noqa: E402
from memo_jax.data.batches import Utterances  # noqa: E402
from memo_jax.log import read_metrics  # noqa: E402
from memo_jax.scoring.metrics import eer  # noqa: E402
from memo_jax.scoring.trials import read_trials  # noqa: E402

PICTURES = ("learning_curve.png", "det.png")
SMOKE = """
import tiny


def get_config():
    config = tiny.get_config()
    config.model.branches = ("resnet",)  # compiles in a quarter of the time of an ECAPA-TDNN
    config.data.local_crops = 0
    return config
"""


@pytest.fixture
def smoke_size(monkeypatch, tmp_path):
    """The demo with few voices and the tests' tiny networks."""
    corpus = functools.partial(
        demo_speech.make_corpus, speakers=4, utterances=3, test_speakers=3, test_utterances=2, processes=2
    )
    monkeypatch.setattr(demo_speech, "make_corpus", corpus)
    shutil.copy(tiny.ROOT / "configs" / "base.py", tmp_path)
    (tmp_path / "tiny.py").write_text(tiny.CONFIG)
    (tmp_path / "smoke.py").write_text(SMOKE)
    monkeypatch.setattr(demo, "CONFIG", tmp_path / "smoke.py")
    monkeypatch.setattr(demo, "BRANCH", "resnet")


def printed_rates(text):
    """{name: percent} of the table."""
    return {
        name: float(rate) for name, rate in re.findall(r"^    (\S.*?)\s+([\d.]+) %(?: +[\d.]+){2}$", text, re.MULTILINE)
    }


def test_the_demo_from_nothing_to_the_table_and_once_more_without_training_again(smoke_size, tmp_path, capsys):
    pytest.importorskip("espeakng_loader", reason="the extra `demo` (speech synthesis) is not installed")
    output = tmp_path / "a demo"
    success = demo.run(None, output, None, 0)
    first = capsys.readouterr().out
    rates = printed_rates(first)
    assert list(rates) == ["log-mel mean and deviation", "network, untrained", "network, trained without labels"]
    assert all(0 <= rate <= 100 for rate in rates.values())
    assert ("NOT A SUCCESS" in first) is not success
    for picture in PICTURES:
        assert (output / picture).read_bytes().startswith(b"\x89PNG") and str(output / picture) in first

    # The table, the metrics and the scores on disk agree.
    rows = read_metrics(output / "run")
    assert rows[-1]["step"] == 12 and rows[-1]["gate/open"] == 0
    by_step = {row["step"]: row["eer/resnet"] for row in rows if "eer/resnet" in row}
    assert rates["network, untrained"] == pytest.approx(by_step[0], abs=0.006)
    assert rates["network, trained without labels"] == pytest.approx(by_step[12], abs=0.006)
    target = read_trials(output / "trials.txt").target
    scores = np.loadtxt(output / "trained" / "log_mel_statistics.txt", usecols=0, delimiter="\t")
    assert rates["log-mel mean and deviation"] == pytest.approx(100 * eer(scores, target), abs=0.006)

    demo.run(None, output, None, 0)
    again = capsys.readouterr().out
    assert printed_rates(again) == rates
    assert "already in" in again and "already prepared" in again
    assert len(read_metrics(output / "run")) == len(rows)


def test_ones_own_recordings_are_divided_by_speaker_and_keep_their_names(tmp_path, capsys):
    mine = tiny.write_corpus(tmp_path / "my speech", speakers=10, utterances=2)
    folder = demo.own_speech(mine, tmp_path / "speech", seed=0)
    names = {}
    for split in ("train", "test"):
        dataset = demo.prepared(folder / split, tmp_path / split)
        names[split] = Utterances(dataset).names
    assert sorted(names["train"] + names["test"]) == sorted(str(f.relative_to(mine)) for f in mine.rglob("*.wav"))
    assert len(names["test"]) == 4 and not {n.split("/")[0] for n in names["test"]} & {
        n.split("/")[0] for n in names["train"]
    }
    assert len(list((folder / "noise").iterdir())) > 10 and len(list((folder / "rirs").iterdir())) > 10
    demo.own_speech(mine, folder, seed=0)
    assert "already divided" in capsys.readouterr().out


def test_minutes_change_the_length_of_the_run_and_the_step_at_which_the_gate_closes_with_it(tmp_path):
    def config(minutes):
        return demo.demo_config({"train": "a", "test": "b"}, "trials.txt", tmp_path, minutes, seed=3)

    whole, half = config(None), config(demo.CONFIG_MINUTES / 2)
    assert half.total_steps == round(whole.total_steps / 2) and half.gate.stop_steps == round(whole.gate.stop_steps / 2)
    assert whole == config(demo.CONFIG_MINUTES)
    assert config(1e-6).total_steps == 1
    assert (whole.seed, whole.data.train, whole.evaluation.trials) == (3, "a", "trials.txt")


def test_the_demos_gate_closes_before_the_run_ends_and_an_evaluation_shows_it():
    config = load_config(demo.CONFIG)
    assert config.gate.rule == "step"
    assert config.gate.stop_steps + config.evaluation.every_steps <= config.total_steps


def test_the_demo_reports_a_wrong_folder_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path / "out"), "--speech", str(tmp_path / "gone")])
    with pytest.raises(SystemExit, match="^demo: error: .*gone"):
        demo.main()


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "ten"])
def test_an_invalid_length_is_refused(minutes, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--minutes", minutes])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == 2 and "--minutes" in capsys.readouterr().err
