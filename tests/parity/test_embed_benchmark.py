"""The embedding benchmark, in miniature: it compares with the actual network, and both yield the same embeddings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_it_prints_its_numbers_and_the_same_embeddings():
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "experiments" / "benchmarks" / "embed.py",
            "--width=16",
            "--utterances=6",
            "--seconds=1",
            "--runs=2",
            "--batch-size=4",
            "--against=pytorch",
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    alone, batched = results["pytorch"], results["pytorch_batched"]
    assert alone["min_cosine"] > 0.99999 and alone["max_relative_difference"] < 1e-4
    assert 0.9 < batched["min_cosine"] < 0.99999  # padding reaches into the convolutions there
    for side in (alone, batched):
        low, high = side["spread"]
        assert 0 < low <= side["ratio"] <= high
    assert results["audio_seconds_per_second"]["ours"] == pytest.approx(
        results["audio_seconds"] / (sum(results["seconds"]["ours"]) / 2)
    )
