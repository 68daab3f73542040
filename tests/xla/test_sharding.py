"""Four devices do what one does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny

ROOT = Path(__file__).parents[2]
STEPS = 3

# Runs in a process of its own, since the number of virtual devices is fixed when JAX starts.
SCRIPT = """
import gc, json, sys
gc.set_threshold(50_000)  # as in conftest.py
import jax, numpy as np
from memo_jax import config as configs
from memo_jax.training import program
from memo_jax.training import recipe as recipes
from memo_jax.xla import sharding
from memo_jax.planning.hlo import collectives
from memo_jax.models.ecapa import ECAPATDNN
from memo_jax.models.resnet import ResNet34

steps, out = int(sys.argv[1]), sys.argv[2]
config = configs.load_config("configs/base.py", [
    "--config.data.batch_size=8", "--config.model.head_hidden=32", "--config.model.head_bottleneck=16",
    "--config.model.prototypes=64",
    "--config.optimizer.warmup_epochs=0", "--config.optimizer.freeze_prototypes_epochs=0", "--config.augment.clean=0",
    "--config.gate.window_epochs=-1", "--config.gate.window_steps=2", "--config.teacher.momentum=0.9",
    "--config.split_above_megabytes=0.002",
])
# Shallow, for the sake of compile time; every kind of layer is there.
backbones = {
    "ecapa": ECAPATDNN((16, 16, 32), 16, kernel_sizes=(5, 3), dilations=(1, 2), scale=2),
    "resnet": ResNet34(4, 16, blocks=(0, 1)),
}
# One of the seeds (0, 2, 3) for which rounding does not put a ReLU's input on the other side of zero, as it does for 1.
random = np.random.default_rng(2)
pcm = lambda *shape: (3000 * random.standard_normal(shape)).astype(np.int16)
envelope = np.exp(-np.arange(400) / 80)
banks = {"noise": pcm(3, 6000), "rir": (random.standard_normal((2, 400)) * envelope).astype(np.float32)}
batches = [{"global": pcm(8, 2, 5120), "local": pcm(8, 4, 3520)} for _ in range(steps)]
report = {"devices": jax.device_count()}
arrays = {}
for count in (4, 1):
    mesh = sharding.data_mesh(jax.devices()[:count])
    recipe = recipes.build_recipe(config, epoch_steps=2)
    recipe = recipe._replace(branches={n: b.clone(backbone=backbones[n]) for n, b in recipe.branches.items()})
    state = program.create_state(config, recipe, mesh)
    step = program.jitted_step(config, recipe, mesh, state)
    key = sharding.replicate(mesh, jax.random.key_data(jax.random.key(1)))
    held = sharding.replicate(mesh, banks)
    losses = []
    for batch in batches:
        rows = sharding.global_batch(mesh, batch)
        if count == 4:
            report["rows"] = sorted([s.index[0].start or 0, s.data.shape[0]] for s in rows["global"].addressable_shards)
        state, metrics = step(state, rows, held, key)
        losses.append({name: float(x) for name, x in metrics.items()})
    leaves = jax.tree.leaves(state)
    if count == 4:
        report["bytes"] = {
            jax.tree_util.keystr(path): [leaf.nbytes, *(shard.data.nbytes for shard in leaf.addressable_shards)]
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        }
        report["copies_equal"] = all(
            np.array_equal(leaf.addressable_shards[0].data, shard.data)
            for leaf in leaves if leaf.sharding.is_fully_replicated for shard in leaf.addressable_shards
        )
        report["state_devices"] = len(leaves[0].sharding.device_set)
        rooms_and_speech = sharding.replicate(mesh, banks | {"speech": pcm(3, 6000)})
        def lowered():
            front_end = sharding.on_mesh(mesh, recipes.build_front_end(config))
            return jax.jit(lambda *inputs: front_end(*inputs)).lower(jax.random.key(0), rows, rooms_and_speech)
        report["moved_to_augment"] = collectives(lowered().compile().as_text())
        report["programs"] = len({lowered().as_text() for _ in range(2)})
    report[f"metrics{count}"] = losses
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.student, state.teacher, state.center)):
        arrays[f"{count}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
np.savez(out, report=json.dumps(report), **arrays)
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A report and the final students, teachers and centres of the same steps on four devices and on one."""
    out = tmp_path_factory.mktemp("devices") / "both.npz"
    command = [sys.executable, "-c", SCRIPT, str(STEPS), str(out)]
    subprocess.run(command, cwd=ROOT, env=tiny.environment(devices=4), check=True)
    with np.load(out) as file:
        return json.loads(str(file["report"])), {name: file[name] for name in file.files if name != "report"}


def test_batch_large_prototypes_and_optimiser_state_of_large_parameters_are_sharded(both):
    """Everything else is replicated, identically, on each device."""
    report, _ = both
    assert report["devices"] == report["state_devices"] == 4
    assert report["rows"] == [[0, 2], [2, 2], [4, 2], [6, 2]]
    assert report["copies_equal"]
    split = {name for name, (whole, *parts) in report["bytes"].items() if parts == [whole / 4] * 4}
    assert all(parts == [whole] * 4 for name, (whole, *parts) in report["bytes"].items() if name not in split)
    large = {
        name
        for name, (whole, *_) in report["bytes"].items()
        if whole >= 2000 and (".opt_state" in name or "prototypes" in name)
    }
    assert split == large
    assert sum("prototypes" in name for name in split) == 4 * 3, "of four heads: student, teacher, momentum"
    assert any("kernel" in name for name in split)


def test_each_device_augments_its_own_crops(both):
    """With a bank of speech no crop needs the others; XLA would gather them all for Fourier transforms."""
    report, _ = both
    assert report["moved_to_augment"] == {}


def test_a_program_for_several_devices_is_the_same_when_it_is_traced_again(both):
    """Thus the cache of compiled programs has it for the next process; an address of an object would change it."""
    assert both[0]["programs"] == 1


def test_four_devices_equal_one(both):
    """Augmentation (babble is from other devices), batch norm, NT-Xent and centres are of the whole batch, and the
    state is the same however it is sharded.

    If one of them were of a device's own two utterances, statistics and losses would differ. Sums in a different order
    leave float32 noise: 1e-5 of a loss at the first step, ten times that at the third, as training amplifies it.
    """
    report, arrays = both
    for step, (four, one) in enumerate(zip(report["metrics4"], report["metrics1"], strict=True)):
        assert four.keys() == one.keys()
        for name in four:
            if name.startswith("loss"):
                assert four[name] == pytest.approx(one[name], rel=1e-5 if step == 0 else 1e-4), (step, name)
    names = [name[1:] for name in arrays if name.startswith("4")]
    assert names
    for name in names:
        np.testing.assert_allclose(arrays["4" + name], arrays["1" + name], atol=2e-5, rtol=1e-4, err_msg=name)
