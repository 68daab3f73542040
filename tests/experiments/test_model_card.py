"""The numbers of the model card are those of the evaluations and of the file."""

import json
import shutil
import sys

import numpy as np
import pytest

import tiny
from memo_jax.inference.model_file import read_model

sys.path.insert(0, str(tiny.ROOT / "experiments"))
import model_card  # noqa: E402


@pytest.fixture
def package(tmp_path):
    """What package_model.py writes, of a tiny network and two lists, one of which is evaluated with the run."""
    material = tiny.material()
    for name in ("default_model", "network"):
        shutil.copy(tiny.model_file(), tmp_path / f"{name}.safetensors")
    options = ["--data", material.dataset, "--trials", material.trials, "--output", tmp_path / "results" / "a-list"]
    status, text = tiny.here("eval", "--model", tmp_path / "default_model.safetensors", *options, "--replicates", "20")
    assert status == 0, text
    shutil.copytree(tmp_path / "results" / "a-list", tmp_path / "run" / "results" / "validation")
    return tmp_path


def test_the_tables_have_the_error_rates_and_what_the_calibration_gives(package, capsys):
    assert model_card.main(["--package", str(package)]) == 0
    printed = capsys.readouterr().out
    model = read_model(package / "default_model.safetensors")
    assert f"fingerprint {model.fingerprint}" in printed
    assert "threshold 0.400, calibration 20.000 · score -8.000" in printed
    result = json.loads((package / "results" / "a-list" / "results.json").read_text())
    low, high = result["eer_interval"]
    rates, given = (line for line in printed.splitlines() if line.startswith("| a-list"))
    assert f"| {result['eer']:.2f} ({low:.2f}–{high:.2f}) | {result['min_dcf_0.01']:.3f} (" in rates
    lines = [line.split("\t") for line in (package / "results" / "a-list" / "scores.txt").read_text().splitlines()]
    labels = {tuple(line.split()[1:]): line.split()[0] for line in tiny.material().trials.read_text().splitlines()}
    same = [float(score) for score, *pair in lines if labels[tuple(pair)] == "1"]
    different = [float(score) for score, *pair in lines if labels[tuple(pair)] == "0"]
    above, below = 100 * np.mean(np.array(different) > 0.4), 100 * np.mean(np.array(same) < 0.4)
    assert given.startswith(f"| a-list | {above:.0f} | {below:.0f} | ")
    fitted, calibrated = map(float, given.strip("| ").split(" | ")[3:])
    assert calibrated <= fitted
    assert sum(line.startswith("| validation | ") for line in printed.splitlines()) == 2


def test_what_is_missing_or_of_another_list_is_named(package, capsys):
    scores = package / "results" / "a-list" / "scores.txt"
    scores.write_text("\n".join(reversed(scores.read_text().splitlines())) + "\n")
    assert model_card.main(["--package", str(package)]) == 2
    assert f"{scores}: not the scores of these trials" in capsys.readouterr().err
    results = scores.with_name("results.json")
    text = results.read_text()
    for changes, said in (
        ({"fingerprint": "another"}, f"{scores.parent}: results of another network"),
        ({"eer_interval": None}, "a-list: its results have no intervals"),
    ):
        results.write_text(json.dumps(json.loads(text) | changes))
        assert model_card.main(["--package", str(package)]) == 2
        assert said in capsys.readouterr().err
    for folder in (package / "results", package / "run" / "results"):
        shutil.rmtree(folder)
    assert model_card.main(["--package", str(package)]) == 2
    assert f"{package} has no results: run package_model.py" in capsys.readouterr().err
