"""The training-step benchmark, in miniature: both sides compute the same losses."""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny  # noqa: E402

SIZES = (
    "--ecapa-channels",
    16,
    16,
    16,
    16,
    48,
    "--resnet-base-channels",
    2,
    "--embedding-dim",
    8,
    "--head-hidden",
    16,
    "--head-bottleneck",
    8,
    "--prototypes",
    32,
    "--global-seconds",
    0.4,
    "--local-seconds",
    0.3,
    "--batch",
    2,
)


def test_both_compute_the_same_losses():
    done = subprocess.run(
        [
            sys.executable,
            tiny.ROOT / "experiments" / "benchmarks" / "train_step.py",
            "--threads=1",
            "--steps=1",
            "--json",
            *map(str, SIZES),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=tiny.environment(),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["max_relative_loss_difference"] < 1e-4
    for key, of in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds"), ("memory_ratio", "peak_gigabytes")):
        assert results[key] == results["theirs"][of] / results["ours"][of] > 0
    assert 0 < results["fraction_of_peak"] < 1
