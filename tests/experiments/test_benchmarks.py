"""Every benchmark runs, at a size that measures nothing, and prints what it promises."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

FOLDER = Path(__file__).parents[2] / "experiments" / "benchmarks"


def run(name, *arguments, environment=None):
    return subprocess.run(
        [sys.executable, FOLDER / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment or tiny.environment(),
        timeout=300,
    )


def printed_json(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_records():
    results = printed_json(run("records.py", "--utterances=4", "--long-seconds=6", "--json"))
    formats = {(row["content"], row["options"]): row for row in results["formats"]}
    plain = formats["PCM", "group_size:1,uncompressed"]
    # 115.2 MB per hour of 16-bit samples at 16 kHz; with few utterances, the file's padding to 64 kB counts
    assert 115.2 < plain["megabytes_per_hour"] < 140
    assert formats["FLAC", "group_size:1,uncompressed"]["megabytes_per_hour"] < plain["megabytes_per_hour"]
    rows = [*results["formats"], *(row for rows in results["segments"].values() for row in rows)]
    assert all(value > 0 for row in rows for value in row.values() if not isinstance(value, str))
    assert len(results["segments"]) == 2


def test_dataset_size():
    done = run("dataset_size.py", "--utterances", 70, 200, "--shards=2", "--json")
    rows = printed_json(done)["sizes"]
    assert [row["utterances"] for row in rows] == [70, 200]
    assert rows[1]["index_megabytes"] - rows[0]["index_megabytes"] == pytest.approx(130 * 24 / 1e6)
    assert all(row["open_seconds"] > 0 and row["all_shards_megabytes"] >= 0 for row in rows)


LOAD = ("--utterances=12", "--seconds=3", "--batch-size=4", "--measure-seconds=0.1")


def test_load_ours_only():
    results = printed_json(run("load.py", "--ours-only", "--json", *LOAD))
    assert results["utterances_per_second_per_core"] > 0 and "ratio" not in results
    assert [(row["loader"], row["workers"]) for row in results["rows"]] == [("ours", 0), ("ours", 1)]


def test_load_says_what_to_install_where_torch_is_missing(tmp_path):
    """A module finder that hides PyTorch stands in for an environment without it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'torch' else find(name, package)\n"
    )
    environment = tiny.environment()
    environment["PYTHONPATH"] = os.pathsep.join((str(tmp_path), environment["PYTHONPATH"]))
    done = run("load.py", "--json", *LOAD, environment=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert "memo-jax[torch]" in done.stderr and "--ours-only" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch: pip install '.[torch]'")
def test_load_compares_with_pytorch():
    results = printed_json(run("load.py", "--json", *LOAD))
    assert results["ratio"] == pytest.approx(
        results["utterances_per_second_per_core"] / results["theirs_per_second_per_core"]
    )
    assert {row["loader"] for row in results["rows"]} == {"ours", "theirs", "theirs, crops only"}
    assert all(row["per_second_per_core"] > 0 for row in results["rows"])
    table = run("load.py", "--workers=0", *LOAD)
    assert table.returncode == 0 and "ours / theirs, per core" in table.stdout


EMBED = ("--width=16", "--utterances=3", "--seconds=1", "--runs=2", "--json")


@pytest.mark.skipif(importlib.util.find_spec("spox") is None, reason="needs the extra onnx")
def test_embed_compares_with_onnxruntime():
    results = printed_json(run("embed.py", *EMBED, "--against=onnxruntime"))
    assert results["recordings"] == 3 and len(results["seconds"]["ours"]) == 2
    assert results["audio_seconds_per_second"]["ours"] > 0 and 0 < results["fraction_of_peak"] < 1
    alone, batched = results["onnxruntime"], results["onnxruntime_batched"]
    assert alone["max_relative_difference"] < 1e-4 < batched["max_relative_difference"]  # padding changes embeddings
    assert alone["spread"][0] <= alone["ratio"] <= alone["spread"][1]
    assert "pytorch" not in results


def test_embed_says_what_to_install_where_the_networks_are_missing():
    if importlib.util.find_spec("speakerlab"):
        pytest.skip("they are there")
    done = run("embed.py", *EMBED, "--against=pytorch")
    assert done.returncode == 2 and done.stdout == ""
    assert "speakerlab-slim" in done.stderr


SMALLEST = (
    "--config.model.resnet_base_channels=2",
    "--config.model.resnet_blocks=(1,1)",
    "--config.model.embedding_dim=8",
    "--config.model.head_hidden=8",
    "--config.model.head_bottleneck=4",
    "--config.model.branches=resnet",
    "--config.loss.cross=0.0",
    "--config.model.prototypes=64",
)


def test_loss():
    results = printed_json(run("loss.py", "--batch=2", "--prototypes=512", "--runs=1", "--json"))
    assert results["max_difference"] < 1e-6
    assert results["ratio"] == results["pairwise"]["cpu_seconds"] / results["ours"]["cpu_seconds"]
    assert results["memory_ratio"] == results["pairwise"]["temporary_bytes"] / results["ours"]["temporary_bytes"] > 2


def test_step_parts():
    done = run(
        "step_parts.py",
        "--batch-size=2",
        "--runs=1",
        "--parts=resnet, forward|KoLeo|entropy|balanced|variance|teachers only|^step|the same",
        "--json",
        *SMALLEST,
        "--config.loss.targets=sinkhorn",
        "--config.loss.mean_entropy=1",
        "--config.loss.koleo=1",
        "--config.loss.variance=1",
        "--config.positives.clusters=4",
        "--config.data.global_seconds=0.4",
        "--config.data.local_crops=0",
    )
    rows = {row["part"]: row for row in printed_json(done)["parts"]}
    options = {"mean entropy", "KoLeo", "variance and covariance"}
    expected = {"resnet, forward", "resnet, forward and backward", "balanced targets"}
    expected |= {"front end of crops for teachers only", "step, from log-mel"}
    expected.add("the same by the gradient of the whole objective")
    assert set(rows) == expected | {f"{option}, forward and backward" for option in options}
    assert all(row["seconds"] > 0 and row["limit_seconds"] > 0 for row in rows.values())
    backward, forward = rows["resnet, forward and backward"], rows["resnet, forward"]
    assert 2 < backward["gigaflops"] / forward["gigaflops"] < 4


@pytest.fixture
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", FOLDER / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scaling_measures_a_point(scaling):
    point = scaling.BASE | {"batch": 4, "branches": 1, "prototypes": 64}
    found = printed_json(
        run(
            "scaling.py",
            "--point",
            json.dumps(point),
            "--steps=1",
            *SMALLEST,
            "--config.augment.clean=1.0",
            "--config.data.local_crops=0",
            "--config.gate.rule=never",
        )
    )
    assert set(found) == set(scaling.QUANTITIES) and all(value > 0 for value in found.values())


def test_scaling_reports_growth(scaling, tmp_path, monkeypatch, capsys):
    """With made-up times: proportional to the batch's square, and constant."""

    def made_up(point, *_):
        return {"step_cpu_seconds": point["batch"] ** 2, "compile_cpu_seconds": 7, "megabytes": point["prototypes"]}

    monkeypatch.setattr(scaling, "measured_apart", made_up)
    results = scaling.main(["--axes=batch,prototypes", "--points=3", "--output", str(tmp_path)])
    assert [row["batch"] for row in results["rows"]["batch"]] == [4, 8, 16]
    assert results["growth"]["batch"] == pytest.approx(
        {"step_cpu_seconds": 2, "compile_cpu_seconds": 0, "megabytes": 0}
    )
    assert results["growth"]["prototypes"]["megabytes"] == pytest.approx(1)
    assert "| 16 | 256.000 | 7.0 | 4096 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "scaling.json").read_text()) == results
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_scaling_names_an_axis_that_it_does_not_have():
    done = run("scaling.py", "--axes=batch,views")
    assert done.returncode == 1 and "no axis views: choose from batch, prototypes" in done.stderr


def test_train_step_says_what_it_needs():
    if importlib.util.find_spec("speakerlab"):
        pytest.skip("it is there")
    done = run("train_step.py", "--json")
    assert done.returncode == 2 and done.stdout == "" and "make parity" in done.stderr


def test_export_weights():
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    material = tiny.material()
    test = f"--test=tiny={material.dataset},{material.trials}"
    rows = printed_json(run("export_weights.py", "--model", tiny.model_file(), test, "--json"))
    forms = {row["form"]: row for row in rows}
    assert list(forms) == ["model file, float32", "model file, float16"] + [
        f"ONNX, {weights}" for weights in ("float32", "float16", "int8")
    ]
    assert forms["model file, float32"]["min_cosine"] == pytest.approx(1, abs=1e-6)
    assert forms["ONNX, float32"]["min_cosine"] == pytest.approx(1, abs=1e-5)
    assert all(0.9 < row["min_cosine"] <= row["mean_cosine"] < 1 + 1e-6 for row in rows)
    assert all(0 <= row["eer"] <= 100 and row["megabytes"] > 0 for row in rows)
    done = run("export_weights.py", "--test=tiny")
    assert done.returncode == 2 and "'tiny' is not NAME=DATASET,TRIALS" in done.stderr
