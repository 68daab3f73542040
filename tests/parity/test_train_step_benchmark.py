"""The training-step benchmark in miniature, as experiments/accelerator.py runs it: both sides have the same losses."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny  # noqa: E402

sys.path[:0] = [str(tiny.ROOT / "experiments"), str(tiny.ROOT / "experiments" / "benchmarks")]
import accelerator  # noqa: E402
import torch_steps  # noqa: E402
import train_step  # noqa: E402

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


def small_training():
    """PyTorch's side in miniature, and mel power for it."""
    sizes = "--batch=2 --global-seconds=0.4 --local-seconds=0.3 --resnet-base-channels=2 --embedding-dim=8"
    sizes += " --head-hidden=16 --head-bottleneck=8 --prototypes=32"
    numbers = ["--ecapa-channels", *"16 16 16 16 48".split(), "--resnet-blocks", *"1 1 1 1".split()]
    options = train_step.build_parser().parse_args([*sizes.split(), *numbers])
    torch.manual_seed(0)
    config = train_step.reference_config(options)
    return torch_steps.Training(config, torch_steps.build_students(config)), train_step.mel_power(options)


def test_all_that_is_compiled_runs_compiled(monkeypatch):
    """For the shapes that there are, beyond PyTorch's limit of 8 for blocks of a class. Graphs are made, not built."""
    graphs = []

    def backend(graph, examples):
        graphs.append([x for x in examples if isinstance(x, (int, torch.SymInt))])
        return graph.forward

    plain, mels = small_training()
    compiled, _ = small_training()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    compiled.compile()
    for step in range(2):
        assert np.allclose(compiled.take_step(step, *mels), plain.take_step(step, *mels), rtol=1e-4)
    assert len(graphs) > 8 and not any(graphs), "a size would be a symbol"


def test_mel_power_on_the_device_is_taken_as_it_is():
    (by_array, mels), (by_tensor, _) = small_training(), small_training()
    for step in range(2):
        assert by_array.take_step(step, *mels) == by_tensor.take_step(step, *map(torch.from_numpy, mels))
