"""The training-step benchmark in miniature, as experiments/accelerator.py runs it: both sides have the same losses."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny  # noqa: E402

sys.path.insert(0, str(tiny.ROOT / "experiments"))
import accelerator  # noqa: E402

SIZES = {
    "data.global_seconds": 0.4,
    "data.local_seconds": 0.3,
    "model.ecapa_channels": "(16,16,16,16,48)",
    "model.resnet_base_channels": 2,
    "model.resnet_blocks": "(1,1,1,1)",
    "model.embedding_dim": 8,
    "model.head_hidden": 16,
    "model.head_bottleneck": 8,
    "model.prototypes": 32,
}


def test_both_compute_the_same_losses(tmp_path, monkeypatch):
    """With the settings of the authors' recipe: no crop is computed twice."""
    for name, value in tiny.environment().items():
        monkeypatch.setenv(name, value)
    machine = tmp_path / "parts" / "machine.json"
    machine.parent.mkdir()
    machine.write_text(json.dumps({"platform": "cpu"}))
    sizes = [f"--config.{key}={value}" for key, value in SIZES.items()]
    assert accelerator.main([f"--output={tmp_path}", "--batches=2", "--steps=1", "--part=torch/float32", *sizes]) == 0
    results = json.loads((tmp_path / "parts" / "torch-float32.json").read_text())
    assert results["max_relative_loss_difference"] < 1e-4 < results["tolerance"] and results["passed"]
    for key, of in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds"), ("memory_ratio", "peak_gigabytes")):
        assert results[key] == results["theirs"][of] / results["ours"][of] > 0
    assert 0 < results["fraction_of_peak"] < 1
