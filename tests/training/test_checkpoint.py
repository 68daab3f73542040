"""Checkpoints: what is saved is restored exactly, whatever happens to the process, the disk or the files."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import struct

import tiny
from memo_jax.training import processes, saved_checkpoint
from memo_jax.training.checkpoint import Checkpointer, load_extra, load_state
from memo_jax.training.saved_checkpoint import CheckpointError, saved_steps

ROOT = Path(__file__).parents[2]

# orbax leaves futures of a failed operation behind, which complain of a closed event loop when they end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@struct.dataclass
class State:
    step: jax.Array
    teacher: dict
    opt_state: tuple
    gate: dict


def state_of(step, width=6):
    kernel = jax.random.normal(jax.random.key(step), (width, 5))
    params = {
        "ecapa": {
            "params": {"kernel": kernel, "bias": jnp.arange(5, dtype=jnp.bfloat16)},
            "batch_stats": {"mean": kernel[0] + 1},
        }
    }
    return State(
        jnp.int32(step),
        params,
        optax.sgd(0.1, momentum=0.9).init(params),
        {"open": jnp.bool_(True), "history": jnp.zeros(3)},
    )


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def save_steps(workdir, steps, **options):
    with Checkpointer(workdir, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, state_of(step), extra={"step": step})


def largest_file(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_state_and_extra_come_back_exactly(tmp_path):
    extra = {"config": {"lr": 0.1, "name": "ä"}, "fingerprint": "abc", "none": None}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(3, state_of(3), extra)
        extra["fingerprint"] = "changed after save"
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 3
        assert_equal(checkpointer.restore(abstract(state_of(0))), state_of(3))
    assert load_extra(tmp_path) == extra | {"fingerprint": "abc"}


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    """save returns before the files are written; a step that overwrites the buffers meanwhile must not affect them."""
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {str(i): jnp.full(200_000, 7.0) for i in range(10)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        for _ in range(10):
            state = overwrite(state)
        restored = checkpointer.restore(state)
    for array in restored.values():
        np.testing.assert_array_equal(array, 7.0)


def test_latest_and_every_kth_are_kept(tmp_path):
    save_steps(tmp_path, range(1, 8), keep=2, keep_every=3)
    assert saved_steps(tmp_path) == [3, 6, 7]
    assert int(load_state(tmp_path, step=3)["step"]) == 3
    assert saved_checkpoint.saved_checkpoint(tmp_path, 3).manifest["extra"] == {"step": 3}


def test_an_old_checkpoint_that_cannot_be_emptied_does_not_stop_the_run(tmp_path, monkeypatch):
    """As on NFS while another process reads it: a file that is open stays, and so does its folder."""

    def rmdir(*_, **__):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", rmdir)
        save_steps(tmp_path, [1, 2, 3], keep=1)
    assert saved_steps(tmp_path) == [3] and len(os.listdir(tmp_path / "checkpoints")) == 3
    save_steps(tmp_path, [4], keep=1)
    assert os.listdir(tmp_path / "checkpoints") == ["4"]


def test_no_checkpoint_is_named(tmp_path):
    for read in (load_state, load_extra, lambda workdir: Checkpointer(workdir).restore(abstract(state_of(0)))):
        with pytest.raises(FileNotFoundError, match="checkpoints"):
            read(tmp_path)
    assert saved_steps(tmp_path / "missing") == []
    save_steps(tmp_path, [4])
    with pytest.raises(FileNotFoundError, match="9.*steps 4"):
        load_state(tmp_path, step=9)


def test_load_state_needs_no_model(tmp_path):
    save_steps(tmp_path, [4, 8])
    raw = load_state(tmp_path)
    assert load_extra(tmp_path) == {"step": 8}
    assert isinstance(raw["teacher"]["ecapa"]["params"]["kernel"], np.ndarray)
    assert int(raw["step"]) == 8
    part = load_state(tmp_path, step=4, only=["teacher"])
    assert part.keys() == {"teacher"}
    assert_equal(part["teacher"], jax.tree.map(np.asarray, state_of(4).teacher))
    more = load_state(tmp_path, step=4, only=["teacher", "opt_state"])
    assert_equal(more["teacher"], part["teacher"])
    assert_equal(more["opt_state"], load_state(tmp_path, step=4)["opt_state"])
    momentum = state_of(4).opt_state[0].trace["ecapa"]["params"]["kernel"]
    np.testing.assert_array_equal(more["opt_state"]["0"]["trace"]["ecapa"]["params"]["kernel"], momentum)
    with pytest.raises(ValueError, match="no field 'taecher'"):
        load_state(tmp_path, only=["taecher"])


@pytest.mark.parametrize(
    "change, leaf",
    [
        (
            lambda state: state_of(1, width=8),
            "teacher/ecapa/params/kernel is float32[6, 5] in the checkpoint and float32[8, 5] here",
        ),
        (
            lambda state: state.replace(gate={"open": state.gate["open"]}),
            "gate/history is float32[3] in the checkpoint and absent here",
        ),
        (
            lambda state: state.replace(gate=state.gate | {"new": jnp.zeros(2)}),
            "gate/new is absent in the checkpoint and float32[2] here",
        ),
        (lambda state: state.replace(step=jnp.float32(1)), "step is int32[] in the checkpoint and float32[] here"),
    ],
)
def test_checkpoint_of_another_model_names_the_first_difference(tmp_path, change, leaf):
    save_steps(tmp_path, [1])
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError) as raised:
        checkpointer.restore(abstract(change(state_of(1))))
    assert leaf in str(raised.value) and str(tmp_path / "checkpoints" / "1") in str(raised.value)


@pytest.mark.parametrize("value", [np.ones(2), float("nan")])
def test_extra_must_be_json(tmp_path, value):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="must be JSON"):
        checkpointer.save(1, state_of(1), extra={"value": value})


def damage_by_halving(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def damage_by_cutting_the_largest_file(folder):
    os.truncate(largest_file(folder), largest_file(folder).stat().st_size - 10)


def damage_by_losing_the_arrays(folder):
    shutil.rmtree(folder / "d")


def damage_by_losing_everything(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def damage_by_losing_the_manifest(folder):
    (folder / "manifest.json").unlink()


def damage_by_another_version(folder):
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    saved_checkpoint.write_manifest(epath.Path(folder), manifest | {"format": 1})


@pytest.mark.parametrize(
    ("text", "blamed"),
    [
        ("UNAVAILABLE: a peer went away", False),
        ("INTERNAL: writing chunk: No space left on device", True),
        ("RESOURCE_EXHAUSTED: out of memory", True),
    ],
)
def test_a_save_that_another_process_cut_short_does_not_blame_the_disk(text, blamed, tmp_path, monkeypatch):
    def save(*_, **__):
        raise RuntimeError(text)

    with Checkpointer(tmp_path) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(checkpointer._orbax, "save", save)
            patch.setattr(processes.jax, "process_count", lambda: 2)
            with pytest.raises(Exception, match="cannot save the checkpoint" if blamed else text) as raised:
                checkpointer.save(1, state_of(0))
        assert isinstance(raised.value, OSError) == blamed
        checkpointer.save(1, state_of(0))


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_halving,
        damage_by_cutting_the_largest_file,
        damage_by_losing_the_arrays,
        damage_by_losing_everything,
        damage_by_losing_the_manifest,
    ],
)
def test_damaged_checkpoint_is_named_with_the_way_out(tmp_path, damage):
    save_steps(tmp_path, [1, 2])
    folder = tmp_path / "checkpoints" / "2"
    damage(folder)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError) as raised:
            checkpointer.restore(abstract(state_of(0)))
        assert f"{folder}: " in str(raised.value) and "delete this folder" in str(raised.value)
        assert str(tmp_path / "checkpoints" / "1") in str(raised.value)
    with pytest.raises(CheckpointError, match="delete this folder"):
        load_state(tmp_path)
    shutil.rmtree(folder)
    with Checkpointer(tmp_path) as checkpointer:
        assert_equal(checkpointer.restore(abstract(state_of(0))), state_of(1))
        checkpointer.save(2, state_of(2))
    with Checkpointer(tmp_path) as checkpointer:
        assert_equal(checkpointer.restore(abstract(state_of(0))), state_of(2))


def test_a_checkpoint_of_another_version_says_so(tmp_path):
    save_steps(tmp_path, [1])
    damage_by_another_version(tmp_path / "checkpoints" / "1")
    with pytest.raises(CheckpointError, match="another version of memo-jax"):
        load_state(tmp_path)


def test_any_change_to_any_file_is_noticed_and_the_file_named(tmp_path):
    """Each file in turn is removed, cut short by a byte, made longer by one, and has single bits flipped: its first,
    its last, some between. All readers of a checkpoint name the file. (The content of orbax's mark is irrelevant.)"""
    save_steps(tmp_path, [1])
    folder, random_ = tmp_path / "checkpoints" / "1", random.Random(0)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "commit_success.txt"]
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        bits = [0, 8 * len(content) - 1, *(random_.randrange(8 * len(content)) for _ in range(20))]
        changed = [content[:-1], content + b"\n", None]
        for bit in bits:
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            changed.append(bytes(flipped))
        for damaged in changed:
            file.unlink() if damaged is None else file.write_bytes(damaged)
            for read in (load_state, lambda workdir: load_state(workdir, 1, ["step"])):
                with pytest.raises(CheckpointError, match=f"{folder}: .*{file.relative_to(folder)}"):
                    read(tmp_path)
            file.write_bytes(content)
    assert int(load_state(tmp_path)["step"]) == 1


def test_a_file_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])

    def failing(file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saved_checkpoint, "crc32", failing)
    with pytest.raises(OSError, match="checkpoints/1/.*: cannot be read: Input/output error"):
        load_state(tmp_path)


def test_what_is_removed_while_it_is_read_is_not_called_damaged(tmp_path, monkeypatch):
    """As by the run that trains there, which keeps only its latest checkpoints."""
    save_steps(tmp_path, [1])
    monkeypatch.setattr(saved_checkpoint, "crc32", lambda file: shutil.rmtree(tmp_path / "checkpoints" / "1") or 0)
    with pytest.raises(FileNotFoundError, match="removed while it was being read"):
        load_state(tmp_path)


def test_steps_must_ascend(tmp_path):
    save_steps(tmp_path, [10])
    for step in (5, 10):
        with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="holds a checkpoint of step 10"):
            checkpointer.save(step, state_of(step))
    assert saved_steps(tmp_path) == [10]


KILLED_RUN = """
import sys, jax.numpy as jnp
from memo_jax.training.checkpoint import Checkpointer, load_extra

def state_of(step):
    return {"step": jnp.int32(step), "a": jnp.full(60_000, step, jnp.float32), "b": {"c": jnp.arange(5000) + step}}

checkpointer = Checkpointer(sys.argv[1], keep=1)
step = 0
if checkpointer.latest_step() is not None:
    state, extra = checkpointer.restore(state_of(0)), load_extra(sys.argv[1])
    step = int(state["step"])
    assert (state["a"] == step).all() and (state["b"]["c"] == jnp.arange(5000) + step).all(), "torn"
    assert extra == {"step": step}
    assert checkpointer.latest_step() == step
print("from", step, flush=True)
while step < int(sys.argv[2]):
    step += 1
    checkpointer.save(step, state_of(step), extra={"step": step})
    print("saved", step, flush=True)
checkpointer.close()
"""


def run_python(code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
    )


def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """A process that does nothing but save is killed at random moments, thus mostly within a save, with a single
    checkpoint kept. The next process always finds a whole one, no older than the last before the save in progress."""
    delays = random.Random(0)
    reached = 0
    for _ in range(4):
        process = run_python(KILLED_RUN, tmp_path, 10**6)
        lines = []
        for line in process.stdout:
            lines.append(line.split())
            if len(lines) == 4:
                break
        time.sleep(delays.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate()
        lines += [line.split() for line in rest.splitlines()]
        assert lines and lines[0][0] == "from", errors
        assert int(lines[0][1]) >= reached, "an older checkpoint was chosen"
        reached = int(lines[-1][1]) - 1  # the last save may not be finished, the one before is
    process = run_python(KILLED_RUN, tmp_path, reached + 3)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert int(output.split()[1]) >= reached
    assert os.listdir(tmp_path / "checkpoints") == [str(reached + 3)], "temporary folders of killed saves stay behind"


SHARDED = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from memo_jax.training.checkpoint import Checkpointer, load_state

def placed(n):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:n]), ("data",))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    rows = jnp.arange(16.0).reshape(8, 2)
    return {"split": jax.device_put(rows, split), "whole": jax.device_put(jnp.arange(3.0), whole)}

with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(1, placed(4))
for n in (4, 2, 1):
    target = placed(n)
    with Checkpointer(sys.argv[1]) as checkpointer:
        state = checkpointer.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
        sharding=x.sharding), target))
    for name in state:
        assert state[name].sharding == target[name].sharding, (name, state[name].sharding)
        assert (np.asarray(state[name]) == np.asarray(target[name])).all()
np.testing.assert_array_equal(load_state(sys.argv[1])["split"], np.arange(16.0).reshape(8, 2))
"""


def test_restored_arrays_take_the_shardings_asked_for(tmp_path):
    process = run_python(SHARDED, tmp_path, **tiny.environment(devices=4))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        shutil.which("mount")
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_an_error_and_leaves_the_previous_checkpoint(small_disk):
    state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=200_000).astype(np.float32)), "step": jnp.int32(1)}
    with Checkpointer(small_disk / "run") as checkpointer:
        checkpointer.save(1, state)
        checkpointer.wait()
        (small_disk / "filler").write_bytes(bytes(2_900_000))
        with pytest.raises(OSError) as raised:
            checkpointer.save(2, state)
            checkpointer.wait()
    assert str(small_disk / "run" / "checkpoints" / "2") in str(raised.value)
    assert "No space left on device" in str(raised.value) and "step 1" in str(raised.value)
    assert os.listdir(small_disk / "run" / "checkpoints") == ["1"]
    (small_disk / "filler").unlink()
    with Checkpointer(small_disk / "run") as checkpointer:
        assert_equal(checkpointer.restore(state), state)
        checkpointer.save(2, state)
    assert saved_steps(small_disk / "run") == [1, 2]


def test_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file/checkpoints"):
        Checkpointer(tmp_path / "file")


def test_saving_prints_nothing(tmp_path, capfd):
    save_steps(tmp_path, [1, 2, 3])
    load_state(tmp_path)
    output, errors = capfd.readouterr()
    assert output == errors == ""
