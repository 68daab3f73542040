"""--device: the chosen device computes; a missing one is an error that names those available."""

import re
import subprocess
import sys

import pytest

import tiny
from memo_jax.inference.embedder import Embedder

CODE = """if True:
    import sys
    import numpy as np
    from memo_jax.inference.embedder import Embedder
    from memo_jax.training.run_record import hardware
    from memo_jax.xla.devices import chosen_devices, device_names, on_device
    from memo_jax.xla.sharding import data_mesh
    with on_device("cpu:1"):
        embedder = Embedder.load(sys.argv[1], runtime="jax")
        rows = embedder.apply(np.ones((1, 16000), np.int16), np.array([16000]))
        print(device_names(), embedder.device, sorted(d.id for d in rows.devices()))
        print(len(chosen_devices()), data_mesh().devices, hardware()["devices"])
    print(embedder.device, len(chosen_devices()), data_mesh().size)
"""


def test_a_chosen_device_is_the_one_that_computes():
    command = [sys.executable, "-c", CODE, str(tiny.model_file())]
    done = subprocess.run(command, env=tiny.environment(devices=2), capture_output=True, text=True)
    assert done.stdout.splitlines() == ["['cpu:0', 'cpu:1'] cpu:1 [1]", "1 [CpuDevice(id=1)] 1", "cpu:0 2 2"], (
        done.stderr
    )


def test_a_missing_device_is_reported_with_those_available():
    recording = tiny.material().corpus / "s0" / "0.wav"
    command = ["verify", recording, recording, "--model", tiny.model_file(), "--device"]
    for name in ("gpu", "tpu", "cuda:1", "cpu:7"):
        status, text = tiny.here(*command, name)
        assert status == 2 and f"there is no device {name} here; choose one of cpu:0" in text, text
    status, text = tiny.here(*command, "cpu", "--runtime", "jax")
    assert status == 0 and "same speaker" in text, text
    status, text = tiny.here(*command, "nvidia")
    assert status == 2 and "device 'nvidia': expected cpu, gpu, cuda, rocm, tpu, perhaps with a number" in text
    status, text = tiny.here(*command, "gpu", "--runtime", "onnx")
    assert status == 2 and "--runtime onnx computes on the CPU: leave it out, or --device gpu" in text
    status, text = tiny.train_here(tiny.temporary_folder() / "none", "--device=cpu", "--distributed")
    assert status == 2 and "--device is for a single process" in text


def test_the_cpu_is_chosen_without_importing_jax():
    code = """if True:
        import os, sys
        from memo_jax.xla.devices import on_device
        with on_device("cpu"):
            print("jax" in sys.modules, os.environ["JAX_PLATFORMS"])
    """
    done = subprocess.run([sys.executable, "-c", code], env=tiny.environment(), capture_output=True, text=True)
    assert done.stdout == "False cpu\n", done.stderr


@pytest.mark.parametrize("runtime", ["jax", "auto"])
def test_an_embedder_says_what_it_is(runtime):
    embedder = Embedder.load(tiny.model_file(), runtime=runtime)
    said = repr(embedder)
    for part in (
        "network",
        embedder.fingerprint[:8],
        "front end log_mel",
        "resnet",
        "8 dimensions",
        embedder.runtime,
        "cpu:0",
    ):
        assert part in said
    assert re.search(r"resnet teacher, step \d+ ", repr(Embedder.load()))
