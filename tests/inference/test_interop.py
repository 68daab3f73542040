"""Weights to and from PyTorch's names: nothing is lost, nothing is guessed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memo_jax import features
from memo_jax.inference import interop
from memo_jax.models import Branch, build_backbone
from memo_jax.models.heads import DINOHead

BACKBONES = {
    "ecapa": {"channels": (16, 16, 16, 16, 48), "embedding_dim": 16},
    "resnet": {"base_channels": 2, "blocks": (2, 1, 1, 1), "embedding_dim": 16},
}


def branch_and_variables(name, **changes):
    """A branch and variables with its shapes, every number different."""
    branch = Branch(build_backbone(name, **BACKBONES[name] | changes), DINOHead(24, 16, 8))
    shapes = jax.eval_shape(lambda: branch.init(jax.random.key(0), jnp.zeros((2, 32, 80)), train=True))
    random = np.random.default_rng(0)
    return branch, jax.tree.map(lambda x: random.uniform(0.1, 2, x.shape).astype(np.float32), dict(shapes))


@pytest.mark.parametrize("name", ["ecapa", "resnet"])
def test_round_trip_returns_every_number(name):
    _, variables = branch_and_variables(name)
    tensors = interop.branch_to_torch(variables, name)
    back = interop.branch_from_torch(tensors, variables, name)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    # As many numbers there as here, and one gain per prototype: no tensor has been written twice.
    ours = sum(x.size for x in jax.tree.leaves(variables))
    assert sum(x.size for x in tensors.values()) == ours + 2 * 24
    np.testing.assert_array_equal(tensors["self_head.last_layer.weight_g"], np.ones((24, 1)))


@pytest.mark.parametrize("name, tensor", [("ecapa", "backbone.fc.conv.weight"), ("resnet", "backbone.bn1.running_var")])
def test_missing_tensor_is_named(name, tensor):
    _, variables = branch_and_variables(name)
    tensors = interop.branch_to_torch(variables, name)
    del tensors[tensor]
    with pytest.raises(ValueError, match=tensor):
        interop.branch_from_torch(tensors, variables, name)


def test_tensor_of_wrong_shape_is_named_with_both_shapes():
    _, variables = branch_and_variables("resnet")
    tensors = interop.branch_to_torch(variables, "resnet")
    tensors["cross_head.mlp.6.weight"] = np.zeros((8, 15), np.float32)
    with pytest.raises(ValueError, match=r"cross_head\.mlp\.6\.weight.*\[8, 15\].*\[8, 16\]"):
        interop.branch_from_torch(tensors, variables, "resnet")


def test_a_gain_other_than_one_is_refused():
    """Ours are fixed at one, as in the authors' recipe; silently dropping another value would change the head."""
    _, variables = branch_and_variables("resnet")
    tensors = interop.branch_to_torch(variables, "resnet")
    tensors["self_head.last_layer.weight_g"][3] = 2
    with pytest.raises(ValueError, match="weight_g.*gains"):
        interop.branch_from_torch(tensors, variables, "resnet")


@pytest.mark.parametrize("name", ["ecapa", "resnet"])
def test_reference_weights_give_the_reference_embeddings(name, reference):
    """Every tensor of the reference finds its place, none is left over, and the network computes what theirs does."""
    prefix = f"init/student/{name}/"
    tensors = {key.removeprefix(prefix): x for key, x in reference.items() if key.startswith(prefix)}
    sizes = {"ecapa": {"channels": (32, 32, 32, 32, 96)}, "resnet": {"base_channels": 4, "blocks": (3, 4, 6, 3)}}
    branch = Branch(build_backbone(name, embedding_dim=24, **sizes[name]), DINOHead(256, 48, 16))
    like = jax.eval_shape(lambda: branch.init(jax.random.key(0), jnp.zeros((2, 32, 80)), train=True))
    variables = interop.branch_from_torch(tensors, like, name)
    written = interop.branch_to_torch(variables, name)
    assert set(written) == {key for key in tensors if not key.endswith("num_batches_tracked")}
    for key, x in written.items():
        np.testing.assert_array_equal(x, tensors[key], err_msg=key)
    mel = features.normalized_log_mel(jnp.asarray(reference["eval/mel"]).swapaxes(1, 2))
    embedding = jax.jit(lambda v, x: branch.apply(v, x, method="embed"))(variables, mel)
    np.testing.assert_allclose(embedding, reference[f"eval/embedding/{name}"], atol=1e-5)
