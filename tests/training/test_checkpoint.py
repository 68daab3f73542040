"""Checkpoints: what is saved comes back exactly, whatever happens to the process, the disk or the files."""

import itertools
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
from flax import struct

import tiny
from memo_jax.training.checkpoint import Checkpointer, CheckpointError, load_extra, load_raw, saved_steps

ROOT = Path(__file__).parents[2]

# orbax leaves futures of a failed operation behind, which complain of a closed event loop when they end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@struct.dataclass
class State:
    step: jax.Array
    teacher: dict
    opt_state: tuple
    gate: dict


class Counter:
    """A data iterator: its state is how far it has counted."""

    def __init__(self, as_bytes=False):
        self.n, self.as_bytes = 0, as_bytes

    def get_state(self):
        return str(self.n).encode() if self.as_bytes else {"n": self.n, "inner": [None, {"a": 1.5}]}

    def set_state(self, state):
        self.n = int(state.decode() if self.as_bytes else state["n"])


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


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_state_data_position_and_extra_come_back_exactly(tmp_path, asynchronous, as_bytes):
    iterator = Counter(as_bytes)
    iterator.n = 17
    extra = {"config": {"lr": 0.1, "name": "ä"}, "fingerprint": "abc", "none": None}
    with Checkpointer(tmp_path, asynchronous=asynchronous) as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(3, state_of(3), iterator, extra)
        iterator.n = 99
        extra["fingerprint"] = "changed after save"
    fresh = Counter(as_bytes)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 3
        state, restored_extra = checkpointer.restore(abstract(state_of(0)), fresh)
    assert_equal(state, state_of(3))
    assert fresh.n == 17
    assert restored_extra == extra | {"fingerprint": "abc"}


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    """save returns before the files are written; a step that overwrites the buffers meanwhile must not show in them."""
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {str(i): jnp.full(200_000, 7.0) for i in range(10)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        for _ in range(10):
            state = overwrite(state)
        restored, _ = checkpointer.restore(state)
    for array in restored.values():
        np.testing.assert_array_equal(array, 7.0)


def test_grain_iterator_continues_where_it_was(tmp_path):
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.range(40).shuffle(seed=3).repeat().to_iter_dataset().batch(4)
    iterator, expected = iter(dataset), iter(dataset)
    consumed = [next(iterator) for _ in range(7)]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, {"x": jnp.ones(2)}, iterator)
        resumed = iter(dataset)
        checkpointer.restore({"x": jnp.ones(2)}, resumed)
    np.testing.assert_array_equal(consumed, list(itertools.islice(expected, 7)))
    for _ in range(20):
        np.testing.assert_array_equal(next(resumed), next(expected))


def test_latest_and_every_kth_are_kept(tmp_path):
    save_steps(tmp_path, range(1, 8), keep=2, keep_every=3)
    assert saved_steps(tmp_path) == [3, 6, 7]
    with Checkpointer(tmp_path) as checkpointer:
        state, extra = checkpointer.restore(abstract(state_of(0)), step=3)
    assert_equal(state, state_of(3))
    assert extra == {"step": 3}


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpointer(tmp_path, keep=0)


def test_no_checkpoint_is_named(tmp_path):
    for read in (load_raw, load_extra, lambda workdir: Checkpointer(workdir).restore(abstract(state_of(0)))):
        with pytest.raises(FileNotFoundError, match="checkpoints"):
            read(tmp_path)
    assert saved_steps(tmp_path / "missing") == []
    save_steps(tmp_path, [4])
    with pytest.raises(FileNotFoundError, match="9.*steps 4"):
        load_raw(tmp_path, step=9)


def test_load_raw_needs_no_model(tmp_path):
    save_steps(tmp_path, [4, 8])
    raw, extra = load_raw(tmp_path)
    assert extra == {"step": 8} == load_extra(tmp_path)
    assert isinstance(raw["teacher"]["ecapa"]["params"]["kernel"], np.ndarray)
    assert int(raw["step"]) == 8
    part, _ = load_raw(tmp_path, step=4, only=["teacher"])
    assert part.keys() == {"teacher"}
    assert_equal(part["teacher"], jax.tree.map(np.asarray, state_of(4).teacher))
    more, _ = load_raw(tmp_path, step=4, only=["teacher", "opt_state"])  # the one is nested dicts, the other is not
    assert_equal(more["teacher"], part["teacher"])
    assert_equal(more["opt_state"], load_raw(tmp_path, step=4)[0]["opt_state"])
    with pytest.raises(ValueError, match="no field 'taecher'"):
        load_raw(tmp_path, only=["taecher"])


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
        checkpointer.restore(abstract(change(state_of(1))), fallback=True)
    assert leaf in str(raised.value) and str(tmp_path / "checkpoints" / "1") in str(raised.value)


def test_extra_must_be_json(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="must be JSON"):
        checkpointer.save(1, state_of(1), extra={"array": np.ones(2)})


def test_missing_data_position_is_refused(tmp_path):
    save_steps(tmp_path, [1])
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="no data position"):
        checkpointer.restore(abstract(state_of(1)), Counter())


def damage_by_halving(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def damage_by_cutting_the_largest_file(folder):
    os.truncate(largest_file(folder), largest_file(folder).stat().st_size - 10)


def damage_by_losing_the_arrays(folder):
    shutil.rmtree(folder / "state")


def damage_by_losing_everything(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    "damage",
    [damage_by_halving, damage_by_cutting_the_largest_file, damage_by_losing_the_arrays, damage_by_losing_everything],
)
def test_damaged_checkpoint_is_named_with_the_way_out(tmp_path, damage):
    save_steps(tmp_path, [1, 2])
    folder = tmp_path / "checkpoints" / "2"
    damage(folder)
    iterator = Counter()
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError) as raised:
            checkpointer.restore(abstract(state_of(0)))
        assert f"{folder}: " in str(raised.value) and "delete this folder" in str(raised.value)
        assert str(tmp_path / "checkpoints" / "1") in str(raised.value)
        with pytest.warns(UserWarning, match="Falling back"):
            state, extra = checkpointer.restore(abstract(state_of(0)), fallback=True)
        assert_equal(state, state_of(1))
        checkpointer.save(2, state_of(2), iterator)  # the run goes on and replaces the damaged one
    with Checkpointer(tmp_path) as checkpointer:
        assert_equal(checkpointer.restore(abstract(state_of(0)))[0], state_of(2))


def test_every_way_of_cutting_a_checkpoint_short_is_noticed_or_harmless(tmp_path):
    """Each file of a checkpoint in turn is removed and cut in half: reading either raises or gives exactly what was
    saved, never other numbers."""
    save_steps(tmp_path / "whole", [1])
    whole = tmp_path / "whole" / "checkpoints" / "1"
    noticed = 0
    for file in sorted(file.relative_to(whole) for file in whole.rglob("*") if file.is_file()):
        for cut in (lambda path: path.unlink(), lambda path: os.truncate(path, path.stat().st_size // 2)):
            shutil.rmtree(tmp_path / "cut", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "cut")
            cut(tmp_path / "cut" / "checkpoints" / "1" / file)
            with Checkpointer(tmp_path / "cut") as checkpointer:
                try:
                    assert_equal(checkpointer.restore(abstract(state_of(0)))[0], state_of(1))
                except CheckpointError:
                    noticed += 1
    assert noticed >= 6


def test_rewinding_removes_the_later_checkpoints(tmp_path):
    save_steps(tmp_path, [10, 20, 30], keep=5)
    with Checkpointer(tmp_path, keep=5) as checkpointer:
        checkpointer.restore(abstract(state_of(0)), step=10)
        assert checkpointer.all_steps() == [10, 20, 30]
        checkpointer.save(10, state_of(99))  # the restored one stays as it is
        checkpointer.save(15, state_of(15))
        checkpointer.wait()
        assert checkpointer.all_steps() == [10, 15]
        assert_equal(checkpointer.restore(abstract(state_of(0)), step=10)[0], state_of(10))


def test_a_new_run_does_not_remove_the_checkpoints_of_another(tmp_path):
    save_steps(tmp_path, [10])
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="holds a checkpoint of step 10"):
        checkpointer.save(5, state_of(5))
    assert saved_steps(tmp_path) == [10]


KILLED_RUN = """
import sys, jax.numpy as jnp
from memo_jax.training.checkpoint import Checkpointer

def state_of(step):
    return {"step": jnp.int32(step), "a": jnp.full(60_000, step, jnp.float32), "b": {"c": jnp.arange(5000) + step}}

checkpointer = Checkpointer(sys.argv[1], keep=1)
step = 0
if checkpointer.latest_step() is not None:
    state, extra = checkpointer.restore(state_of(0))
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
    """A process that does nothing but save is killed at random moments, so mostly within a save, with a single
    checkpoint kept. The next process always finds one, whole, and none older than the one before the save under way."""
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
from memo_jax.training.checkpoint import Checkpointer, load_raw

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
        state, _ = checkpointer.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
        sharding=x.sharding), target))
    for name in state:
        assert state[name].sharding == target[name].sharding, (name, state[name].sharding)
        assert (np.asarray(state[name]) == np.asarray(target[name])).all()
np.testing.assert_array_equal(load_raw(sys.argv[1])[0]["split"], np.arange(16.0).reshape(8, 2))
"""


def test_restored_arrays_take_the_shardings_asked_for(tmp_path):
    process = run_python(SHARDED, tmp_path, **tiny.environment(devices=4))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_positions_that_differ_between_processes_need_their_number(tmp_path, monkeypatch):
    """Two processes whose iterators had each a position of their own: one process cannot go on from either."""
    from memo_jax.training import checkpoint

    with Checkpointer(tmp_path, asynchronous=False) as checkpointer:
        monkeypatch.setattr(
            checkpoint, "_gathered_data_state", lambda _: {"states": [{"json": {"n": n}} for n in (1, 2)]}
        )
        checkpointer.save(1, state_of(1), Counter())
        with pytest.raises(ValueError, match="each of 2 processes .* 1 now: resume with 2"):
            checkpointer.restore(state_of(1), Counter())


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


@pytest.mark.parametrize("asynchronous", [True, False])
def test_full_disk_is_an_error_and_leaves_the_previous_checkpoint(small_disk, asynchronous):
    state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=200_000).astype(np.float32)), "step": jnp.int32(1)}
    with Checkpointer(small_disk / "run", asynchronous=asynchronous) as checkpointer:
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
        restored, _ = checkpointer.restore(state)
        assert_equal(restored, state)
        checkpointer.save(2, state)
    assert saved_steps(small_disk / "run") == [1, 2]


def test_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file/checkpoints"):
        Checkpointer(tmp_path / "file")


def test_saving_prints_nothing(tmp_path, capfd):
    save_steps(tmp_path, [1, 2, 3])
    load_raw(tmp_path)
    output, errors = capfd.readouterr()
    assert output == errors == ""
