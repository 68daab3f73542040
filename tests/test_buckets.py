"""A workdir at gs://: trained, killed, resumed and used like one in the file system, against a bucket in memory."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import fake_bucket
import tiny
import tiny_processes
from memo_jax import files
from memo_jax.config import save_config
from memo_jax.inference.model_file import read_model
from memo_jax.log import MetricsLog, read_metrics
from memo_jax.training.checkpoint import Checkpointer, load_state
from memo_jax.training.monitor import TIMES
from memo_jax.training.program import create_state
from memo_jax.training.recipe import build_recipe
from memo_jax.training.saved_checkpoint import saved_steps
from memo_jax.xla import sharding

RUN = "gs://bucket/runs/one"

pytestmark = [
    pytest.mark.usefixtures("compiled_once"),
    # orbax leaves futures of a failed operation behind, which complain of a closed event loop when they end.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def bucket():
    """The bucket of this process: its clients remember its address."""
    pytest.importorskip("gcsfs", reason="needs the extra `gcs`")
    with fake_bucket.running("bucket") as (server, variables), pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def refusing(bucket):
    """The bucket, whose `refuses` may be set."""
    refuses = bucket.refuses
    yield bucket
    bucket.refuses = refuses


@pytest.fixture(scope="module")
def runs(bucket, tmp_path_factory):
    """A run in the file system, and the same in the bucket: killed while or after its second checkpoint was written,
    which then lacks its mark, and resumed. The network has one layer."""
    local = tmp_path_factory.mktemp("buckets") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_processes.patch_for_tests(patch.setattr)
        status, text = tiny.here(*tiny_processes.command(local))
    assert status == 0, text
    (killed,) = tiny_processes.start(1, tiny_processes.command(RUN), signals=[(9, 0, 10)])
    assert killed.status == -9, killed
    found = saved_steps(RUN), [row["step"] for row in read_metrics(RUN)]
    second = "runs/one/checkpoints/8/"
    bucket.objects.pop(second + "commit_success.txt", None)
    bucket.objects[second + "d/left"] = 1, b"of a save that was cut short"
    bucket.objects["runs/one/checkpoints/6/d/left"] = 1, b"of a save on SIGTERM that was cut short"
    unmarked = saved_steps(RUN)
    with pytest.MonkeyPatch.context() as patch:
        tiny_processes.patch_for_tests(patch.setattr)
        status, text = tiny.here(*tiny_processes.command(RUN))
    assert status == 0, text
    return SimpleNamespace(local=local, found=found, unmarked=unmarked, text=text)


def rows_without_times(workdir):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(workdir)]


def test_a_killed_run_resumes_bit_for_bit(runs, bucket, tmp_path):
    """A half-written checkpoint is not chosen, nor in the way; every step is logged once. A copy of it outside the
    bucket is the same run."""
    steps, logged = runs.found
    assert steps[0] == 4 and set(steps) <= {4, 8} and logged[:8] == list(range(1, 9))
    assert runs.unmarked == [4]
    assert "resumed after step 4" in runs.text
    assert saved_steps(RUN) == [8, 12] and not any("/d/left" in name for name in bucket.objects)
    whole, resumed = load_state(runs.local), load_state(RUN)
    assert len(jax.tree.leaves(whole)) > 20
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other, strict=True), whole, resumed)
    assert rows_without_times(RUN) == rows_without_times(runs.local)
    starts = json.loads(bucket.objects["runs/one/run.json"][1])["starts"]
    assert [start["first_step"] for start in starts] == [1, 5] and "last_step" not in starts[0]
    assert {name.partition("/checkpoints/")[0] for name in bucket.objects if "tfevents" not in name} == {
        "runs/one",
        "runs/one/config.json",
        "runs/one/metrics.jsonl",
        "runs/one/run.json",
    }
    assert sum("tensorboard/events" in name for name in bucket.objects) == 2, "one file a start"
    for name, (_, content) in bucket.objects.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert saved_steps(tmp_path / "runs" / "one") == [8, 12]
    copied = load_state(tmp_path / "runs" / "one")
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other, strict=True), whole, copied)


def test_its_networks_are_those_of_the_same_run_in_the_file_system(bucket, tmp_path):
    """For eval, which keeps a threshold in the bucket, and embed, verify, export and report; also a run that was copied
    there."""
    local, remote = tmp_path / "trained", "gs://bucket/trained"
    config = tiny.tiny_config(f"data.train={tiny.material().dataset}", "model.branches=resnet")
    state = create_state(config, build_recipe(config, tiny.STEPS_PER_EPOCH), sharding.data_mesh())
    save_config(local, config)
    with Checkpointer(local) as checkpoints, MetricsLog(local) as log:
        checkpoints.save(6, state)
        for step in range(1, 7):
            log.write(step, {"loss": 1 / step})
    for file in local.rglob("*"):
        if file.is_file():
            bucket.objects[f"trained/{file.relative_to(local)}"] = 1, file.read_bytes()
    trials = [f"--data={tiny.material().dataset}", f"--trials={tiny.material().trials}", "--replicates=0"]
    corpus, said = tiny.material().corpus, {}
    for name, workdir in (("local", local), ("bucket", remote)):
        network, results = ["--model", workdir], tmp_path / name
        status, text = tiny.here("eval", *network, "--output", results, *trials, "--save-threshold")
        assert status == 0, text
        assert tiny.here("embed", corpus / "s0", *network, "--output", results / "e.npz")[0] == 0
        assert tiny.here("export", *network, "--output", results / "m.safetensors")[0] == 0
        said[name] = tiny.here("verify", corpus / "s0" / "0.wav", corpus / "s0" / "1.wav", *network)
    assert said["local"] == said["bucket"] and "eer of" in said["local"][1]
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in said)
    assert one.pop("model") == str(local) and other.pop("model") == remote and one == other
    one, other = (np.load(tmp_path / name / "e.npz")["embeddings"] for name in said)
    np.testing.assert_array_equal(one, other, strict=True)
    assert list(json.loads(bucket.objects["trained/decisions.json"][1])) == [
        read_model(tmp_path / "bucket" / "m.safetensors").fingerprint
    ]
    status, text = tiny.here("report", remote)
    assert status == 0 and text.strip().endswith(f"{remote}/report.html")
    assert b"<html" in bucket.objects["trained/report.html"][1]


def test_a_run_that_is_done_or_of_another_config_is_known_there(runs, monkeypatch):
    tiny_processes.patch_for_tests(monkeypatch.setattr)
    status, text = tiny.here(*tiny_processes.command(RUN))
    assert status == 0 and f"nothing to do: {RUN} has been trained for 12 steps already" in text
    status, text = tiny.here(*tiny_processes.command(RUN, "seed=5"))
    assert status == 2 and f"{RUN} was made with another config (seed: 0 → 5)" in text


@pytest.mark.parametrize("arguments", [["train"], ["eval", "--output=o", "--data=d", "--trials=t"], ["report"]])
def test_a_bucket_that_is_not_there_is_named(bucket, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    workdir = ["gs://nobodys/run"] if command == "report" else ["--workdir", "gs://nobodys/run"]
    rest = tiny.train_arguments("gs://nobodys/run")[1:] if command == "train" else [*rest, *workdir]
    status, text = tiny.here(command, *rest)
    assert status == 2 and "gs://nobodys/run: the bucket cannot be used: 404" in text and "roles" in text
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_may_not_be_read_or_written_is_named(refusing):
    refusing.refuses = lambda method, name: True
    status, text = tiny.train_here("gs://bucket/refused")
    assert status == 2 and "gs://bucket/refused: the bucket cannot be used: 403" in text
    refusing.refuses = lambda method, name: method != "GET"
    status, text = tiny.train_here("gs://bucket/refused")
    assert status == 2 and "memo-jax: error: gs://bucket/refused: cannot lock it: Forbidden" in text
    assert not any(name.startswith("refused") for name in refusing.objects)


def test_a_save_that_fails_leaves_the_checkpoint_before_and_is_repeated(refusing):
    state = {"weights": jax.numpy.arange(3.0)}
    with pytest.raises(
        OSError,
        match=r"gs://bucket/failing/checkpoints/2: cannot save .*; the checkpoint of step 1 is "
        "intact. Make sure that the bucket can be written",
    ):
        with Checkpointer("gs://bucket/failing") as checkpoints:
            checkpoints.save(1, state)
            checkpoints.wait()
            refusing.refuses = lambda method, name: method == "POST" and "/checkpoints/2/d" in name
            checkpoints.save(2, state)
    assert saved_steps("gs://bucket/failing") == [1]
    refusing.refuses = lambda method, name: False
    with Checkpointer("gs://bucket/failing") as checkpoints:
        checkpoints.save(2, {"weights": state["weights"] + 1})
    np.testing.assert_array_equal(load_state("gs://bucket/failing")["weights"], [1, 2, 3])


def test_the_log_is_uploaded_in_between_and_appended_to(bucket, monkeypatch):
    monkeypatch.setattr(files, "SECONDS_BETWEEN_UPLOADS", 0.0)
    monkeypatch.setattr(files, "UPLOADING_SHARE", 1e9)
    with MetricsLog("gs://bucket/logged") as log:
        log.write(1, {"loss": 1.0})
        assert [row["step"] for row in read_metrics("gs://bucket/logged")] == [1]
        log.write(2, {"loss": 2.0})
        monkeypatch.setattr(files.time, "monotonic", lambda: 0.0)  # nothing is due
        log.write(3, {"loss": 3.0})
        assert [row["step"] for row in read_metrics("gs://bucket/logged/metrics.jsonl")] == [1, 2]
    monkeypatch.undo()
    with MetricsLog("gs://bucket/logged") as log:
        log.truncate_after(2)
        log.write(3, {"loss": 4.0})
    assert [row["loss"] for row in read_metrics("gs://bucket/logged")] == [1, 2, 4]


COMPILED = """
import jax
from memo_jax.xla.program_cache import keep_compiled_programs
keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
def twice(x): return 2 * x
def thrice(x): return 3 * x
print(jax.jit(twice)(2.0), jax.jit(thrice)(2.0))
"""


def test_compiled_programs_may_be_kept_in_a_bucket(bucket):
    """The first process leaves two programs there. The next one finds the first, and replaces the second, which has
    been cut short."""
    variables = {"JAX_COMPILATION_CACHE_DIR": "gs://bucket/xla", "JAX_LOGGING_LEVEL": "DEBUG"}

    def said():
        done = subprocess.run(
            [sys.executable, "-c", COMPILED], env=tiny.environment() | variables, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout == "4.0 6.0\n", done.stderr
        return done.stderr

    assert "cache hit" not in said()
    whole = {name: content for name, (_, content) in bucket.objects.items() if re.match(r"xla/jit_.*-cache$", name)}
    ((cut, content),) = ((name, content) for name, content in whole.items() if "thrice" in name)
    bucket.objects[cut] = 1, content[: len(content) // 2]
    text = said()
    assert "cache hit for 'jit_twice'" in text
    assert "the compiled program jit_thrice in gs://bucket/xla was damaged: it is recompiled and cached again" in text
    assert {name for name in bucket.objects if re.match(r"xla/jit_.*-cache$", name)} == whole.keys()
    assert len(bucket.objects[cut][1]) > 0.9 * len(content)


def test_what_must_be_in_the_file_system_says_so(tmp_path):
    material = tiny.material()
    status, text = tiny.train_here(tmp_path / "run", "data.train=gs://bucket/data")
    assert status == 2 and "gs://bucket/data is not in the file system, where this must be: copy it" in text
    for arguments in (
        [
            "eval",
            "--workdir",
            RUN,
            "--data",
            material.dataset,
            "--trials",
            material.trials,
            "--output",
            "gs://bucket/o",
        ],
        ["embed", "gs://bucket/o", "--model", RUN, "--output", tmp_path / "e.npz"],
        ["reproduce", "gs://bucket/o"],
        ["prepare", "--input", "gs://bucket/o", "--output", tmp_path / "data"],
    ):
        status, text = tiny.here(*arguments)
        assert status == 2 and "error: gs://bucket/o is not in the file system" in text
    assert not list(tmp_path.iterdir())


def test_other_urls_and_a_missing_extra_are_named(monkeypatch):
    status, text = tiny.train_here("s3://bucket/run")
    assert status == 2 and "s3://bucket/run: give a path of the file system, or gs://BUCKET/FOLDER" in text
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    status, text = tiny.train_here("gs://bucket/run")
    assert status == 2 and "gs://bucket/run: gs:// needs pip install 'memo-jax[gcs]'" in text
