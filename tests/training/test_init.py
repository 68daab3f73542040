"""A run that starts from the network of a model file."""

import functools

import jax
import numpy as np
import pytest

import tiny
from memo_jax.inference.model_file import write_model
from memo_jax.inference.workdir import starting_parts, workdir_model
from memo_jax.training.program import create_state
from memo_jax.training.recipe import build_recipe
from memo_jax.training.state import backbone_variables
from memo_jax.xla import sharding

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture
def model_file(tmp_path):
    """The teacher of a tiny run's ResNet as a file, and its model."""
    model = workdir_model(tiny.whole_run())
    return write_model(tmp_path / "resnet.safetensors", model), model


def test_a_run_starts_from_the_network_of_a_model_file(model_file, tmp_path):
    """Student and teacher of its branch start from it; heads and the other branch start as they would without it."""
    path, model = model_file
    status, text = tiny.train_here(tmp_path / "run", f"--init={path}", "--stop-at-step=2")
    assert status == 0, text
    config = tiny.tiny_config(f"init={path}", "model.branches=ecapa,resnet")
    recipe, mesh = build_recipe(config, tiny.STEPS_PER_EPOCH), sharding.data_mesh()
    plain, begun = (create_state(config, recipe, mesh, start) for start in (None, starting_parts(config)))
    equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    for old, new in ((plain.student, begun.student), (plain.teacher, begun.teacher)):
        equal(backbone_variables(new["resnet"]), dict(model.variables))
        equal(old["ecapa"], new["ecapa"])
        equal(old["resnet"]["params"]["self_head"], new["resnet"]["params"]["self_head"])
    assert workdir_model(tmp_path / "run", "resnet", step=0).fingerprint == model.fingerprint
    trained = [workdir_model(tmp_path / "run", "resnet", "student", step) for step in (0, 2)]
    moved = [np.abs(a - b).max() for a, b in zip(*(jax.tree.leaves(m.variables["params"]) for m in trained))]
    assert 0 < max(moved) < 0.1, "the run took its first steps from there"
    path.unlink()  # a run that resumes has all in its checkpoint
    status, text = tiny.train_here(tmp_path / "run", f"--init={path}", "--stop-at-step=3")
    assert status == 0 and "resumed after step 2" in text, text


def test_a_model_file_of_another_network_is_refused(model_file, tmp_path):
    for setting, said in (
        ("model.embedding_dim=8", "'embedding_dim': 8"),
        ("model.branches=ecapa", "(ecapa {"),
        ("features.front_end=kaldi_fbank", "takes log_mel, but features.front_end is kaldi_fbank"),
    ):
        status, text = tiny.train_here(tmp_path / "run", f"init={model_file[0]}", setting)
        assert status == 2 and f"init: {model_file[0]} " in text and said in text
    assert not (tmp_path / "run").exists()
