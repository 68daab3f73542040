"""Every benchmark of the loader and of embedding runs, at a size that measures nothing, and prints what it says it prints."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

FOLDER = Path(__file__).parents[1] / "experiments" / "benchmarks"


def run(name, *arguments, environment=None):
    return subprocess.run([sys.executable, FOLDER / name, *map(str, arguments)], capture_output=True, text=True,
                          env=environment or tiny.environment(), timeout=300)


def printed_json(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_records():
    results = printed_json(run("records.py", "--utterances=4", "--long-seconds=6", "--json"))
    formats = {(row["content"], row["options"]): row for row in results["formats"]}
    plain = formats["PCM", "group_size:1,uncompressed"]
    # 115.2 MB an hour of 16-bit samples at 16 kHz; with few utterances, the file's padding to 64 kB counts
    assert 115.2 < plain["megabytes_per_hour"] < 140
    assert formats["FLAC", "group_size:1,uncompressed"]["megabytes_per_hour"] < plain["megabytes_per_hour"]
    rows = [*results["formats"], *(row for rows in results["segments"].values() for row in rows)]
    assert all(value > 0 for row in rows for value in row.values() if not isinstance(value, str))
    assert len(results["segments"]) == 2


def test_dataset_size():
    done = run("dataset_size.py", "--utterances", 70, 200, "--shards=2", "--json")
    rows = printed_json(done)["sizes"]
    assert [row["utterances"] for row in rows] == [70, 200]
    assert rows[1]["index_megabytes"] - rows[0]["index_megabytes"] == pytest.approx(130 * 16 / 1e6)
    assert all(row["open_seconds"] > 0 and row["all_shards_megabytes"] >= 0 for row in rows)


LOAD = ("--utterances=12", "--seconds=3", "--batch-size=4", "--measure-seconds=0.1")


def test_load_ours_only():
    results = printed_json(run("load.py", "--ours-only", "--json", *LOAD))
    assert results["utterances_per_second_per_core"] > 0 and "ratio" not in results
    assert [(row["loader"], row["workers"]) for row in results["rows"]] == [("ours", 0), ("ours", 1)]


def test_load_says_what_to_install_where_torch_is_missing(tmp_path):
    """A finder of modules that hides PyTorch stands in for an environment without it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'torch' else find(name, package)\n")
    environment = tiny.environment()
    environment["PYTHONPATH"] = os.pathsep.join((str(tmp_path), environment["PYTHONPATH"]))
    done = run("load.py", "--json", *LOAD, environment=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert "memo-jax[torch]" in done.stderr and "--ours-only" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch: pip install '.[torch]'")
def test_load_compares_with_pytorch():
    results = printed_json(run("load.py", "--json", *LOAD))
    assert results["ratio"] == pytest.approx(
        results["utterances_per_second_per_core"] / results["theirs_per_second_per_core"])
    assert {row["loader"] for row in results["rows"]} == {"ours", "theirs", "theirs, crops only"}
    assert all(row["per_second_per_core"] > 0 for row in results["rows"])
    table = run("load.py", "--workers=0", *LOAD)
    assert table.returncode == 0 and "ours / theirs, per core" in table.stdout


EMBED = ("--width=16", "--utterances=3", "--seconds=1", "--runs=2", "--json")


def test_embed_ours_only():
    results = printed_json(run("embed.py", "--ours-only", *EMBED))
    assert results["recordings"] == 3 and len(results["seconds"]["ours"]) == 2
    assert results["audio_seconds_per_second"]["ours"] > 0 and 0 < results["fraction_of_peak"] < 1
    assert "ratio" not in results


def test_embed_says_what_to_install_where_the_networks_are_missing():
    if importlib.util.find_spec("speakerlab"):
        pytest.skip("they are there")
    done = run("embed.py", *EMBED)
    assert done.returncode == 2 and done.stdout == ""
    assert "speakerlab-slim" in done.stderr and "--ours-only" in done.stderr
