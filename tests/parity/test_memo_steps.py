"""experiments/parity.py, as a user runs it, on recorded steps of a MeMo with a full ECAPA-TDNN and a full ResNet34."""

import json
import subprocess
import sys

import numpy as np
import pytest

import tiny


def test_the_reference_is_reproduced(shared):
    path = shared / "reference" / "memo_steps.npz"
    if not path.is_file():
        pytest.skip(f"needs {path.name}, the reference steps beside the project")
    command = [sys.executable, tiny.ROOT / "experiments" / "parity.py", path]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=tiny.as_users_compile())
    result = json.loads(done.stdout)
    assert result["passed_tolerance"] == []
    assert done.returncode == 0
    with np.load(path) as file:
        assert np.shape(result["losses"]) == file["losses"].shape
        assert set(result["state"]) == {name.split("/")[0] for name in file.files if name.startswith("after")}
    assert all(set(of_kind) == {"parameters", "statistics", "centers"} for of_kind in result["state"].values())
    # Ten times the float32 noise recorded in the file.
    for step, noise in ((0, 1e-6), (3, 2e-4), (7, 4e-3)):
        assert np.max(result["losses"][step]) < 10 * noise
    assert result["state"]["after0"]["parameters"] < 10 * 1e-7
    # This bound holds for the ECAPA-TDNNs; PyTorch's own ResNet in float32 and float64 ends 2e-3 apart.
    for role in ("student", "teacher"):
        assert result["deviations"][f"parameters/after7/{role}/ecapa"] < 10 * 5e-6
