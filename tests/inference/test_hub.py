"""Models on a hub that runs on this machine: pushed as a user would, and loaded by name."""

import json
import subprocess
import sys

import jax
import pytest

import tiny
from fake_hub import fake_hub
from memo_jax.inference.hub import parse_hub_name
from memo_jax.inference.model_file import read_model, write_model

huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs the extra hub")

LOAD = """
import sys
from memo_jax import Embedder
for name in sys.argv[1:]:
    print(Embedder.load(name).fingerprint)
"""


@pytest.fixture
def hub():
    with fake_hub() as running:
        yield running


def run(hub, folder, *command, token="hf_test"):
    """Runs Python in a process of its own with the library's variables, which it reads when it is imported."""
    environment = tiny.environment() | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hub-cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    environment |= {"HF_TOKEN": token} if token else {}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


def test_a_pushed_model_is_loaded_by_name_and_by_revision(hub, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(
        json.dumps(
            {"eer": 3.21, "min_dcf_0.01": 0.3, "min_dcf_0.05": 0.2, "trials": 45, "trial_list": "lists/test.txt"}
            | {"eer_interval": [3.0, 3.4], "min_dcf_0.01_interval": [0.2, 0.4], "min_dcf_0.05_interval": None}
        )
    )
    done = run(
        hub, tmp_path, "-m", "memo_jax", "push", tiny.model_file(), "org/voices", "--results", results,
        "--license", "cc-by-4.0", "--dataset", "some/speech", "--no-onnx",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/org/voices/commit/{hub.commit(1)}"
    files = hub.repositories["org/voices"][-1]
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    fingerprint = tiny.untrained_model().fingerprint
    assert json.loads(files["config.json"])["fingerprint"] == fingerprint

    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.library_name == "memo_jax" and card.data.license == "cc-by-4.0"
    assert card.data.datasets == ["some/speech"] and "speaker-verification" in card.data.tags
    assert {(row.metric_type, row.metric_value) for row in card.data.eval_results} == {
        ("eer", 3.21), ("min_dcf", 0.3), ("min_dcf", 0.2)
    }  # fmt: skip
    assert {row.dataset_name for row in card.data.eval_results} == {"test.txt"}
    assert 'Embedder.load("hf:org/voices")' in card.text

    hub.repositories["org/voices"][-1]["model.onnx"] = b"of weights before"
    done = run(hub, tmp_path, "-m", "memo_jax", "push", tiny.model_file(), "org/voices", "--no-onnx")
    assert done.returncode == 0 and "model.onnx" not in hub.repositories["org/voices"].pop(), done.stderr
    del hub.repositories["org/voices"][-1]["model.onnx"]
    results.write_text(json.dumps({"eer": 3.21, "trial_list": "test.txt", "fingerprint": "of another"}))
    done = run(hub, tmp_path, "-m", "memo_jax", "push", tiny.model_file(), "org/voices", "--results", results)
    assert done.returncode == 2 and "these results belong to another network (of another, not" in done.stderr, (
        done.stderr
    )

    other = tiny.untrained_model()
    changed = tmp_path / "changed.safetensors"
    write_model(
        changed,
        type(other)(other.backbone, other.arguments, jax.tree.map(lambda x: 2 * x, other.variables), other.front_end),
    )
    hub.repositories["org/voices"].append(files | {"model.safetensors": changed.read_bytes(), "x.pkl": b"\x80cposix"})
    names = ["hf:org/voices", f"hf:org/voices@{hub.commit(1)}"]
    done = run(hub, tmp_path, "-c", LOAD, *names, token=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [read_model(changed).fingerprint, fingerprint]
    assert {path.split("/")[-1] for method, path in hub.requests if method == "GET" and "/resolve/" in path} == {
        "model.safetensors"
    }


def test_a_download_that_breaks_off_is_not_used(hub, tmp_path):
    hub.repositories["org/voices"] = [{"model.safetensors": tiny.model_file().read_bytes()}]
    hub.cut_downloads = True
    command = ["-m", "memo_jax", "export", "--model", "hf:org/voices", "--output", tmp_path / "a.safetensors"]
    done = run(hub, tmp_path, *command)
    assert done.returncode == 2 and not (tmp_path / "a.safetensors").exists()
    assert "memo-jax: error: hf:org/voices: cannot be downloaded" in done.stderr
    hub.cut_downloads = False
    done = run(hub, tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert read_model(tmp_path / "a.safetensors").fingerprint == tiny.untrained_model().fingerprint


def test_what_is_missing_or_refused_is_one_line(hub, tmp_path):
    hub.repositories["org/voices"] = [{"README.md": b""}]
    for command, words in (
        (["verify", "a.wav", "b.wav", "--model", "hf:org/nothing"], "hf:org/nothing: cannot be downloaded"),
        (["verify", "a.wav", "b.wav", "--model", "hf:org/voices"], "hf:org/voices: cannot be downloaded"),
        (["verify", "a.wav", "b.wav", "--model", "hf:org/voices@old"], "hf:org/voices@old: cannot be downloaded"),
        (["push", tiny.model_file(), "org/voices", "--no-onnx"], "org/voices: cannot be uploaded"),
    ):
        done = run(hub, tmp_path, "-m", "memo_jax", *command, token="hf_other")
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    for name in ("hf:", "hf:voices", "hf:org/voices@", "hf:org/voices/more", "hf:../voices/x", "hf:org/voices@a b"):
        with pytest.raises(ValueError, match="give a repository as hf:org/name"):
            parse_hub_name(name)
    assert parse_hub_name("hf:org/voices@v1.0") == ("org/voices", "v1.0")
