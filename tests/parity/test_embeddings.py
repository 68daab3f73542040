"""Backbones at their published sizes against the actual PyTorch networks, and their tensors there and back."""

import jax
import numpy as np
import pytest
import torch
from references import CASES, embedding_of, scramble, tensors_of

from memo_jax.inference import interop
from memo_jax.models import parameter_count

FULL = {name: case for name, case in CASES.items() if case.full}


@pytest.mark.parametrize("name", FULL)
def test_full_size_network_embeds_alike(name):
    case = FULL[name]
    network = case.build(**case.full).eval()
    scramble(network)
    module, variables = interop.backbone_from_torch(tensors_of(network), case.kind, case.backbone)
    assert parameter_count(variables["params"]) == sum(p.numel() for p in network.parameters()) == case.parameters
    x = np.random.default_rng(1).normal(0, 1, (1, 150, 80)).astype(np.float32)
    with torch.no_grad():
        theirs = embedding_of(network(torch.from_numpy(x))).numpy()
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("name", CASES)
def test_state_dict_round_trip_is_exact_and_loads(name):
    """PyTorch → ours → PyTorch returns every tensor bit for bit, and the network loads them with strict names."""
    case = CASES[name]
    network = case.build(**case.small)
    scramble(network)
    tensors = tensors_of(network)
    module, variables = interop.backbone_from_torch(tensors, case.kind, case.backbone)
    form = getattr(module, "form", "speechbrain")
    written = interop.backbone_to_torch(variables, case.kind, case.backbone, form)
    assert written.keys() == {name for name in tensors if not name.endswith("num_batches_tracked")}
    for tensor, value in written.items():
        np.testing.assert_array_equal(value, tensors[tensor], err_msg=tensor)
    network.load_state_dict({tensor: torch.from_numpy(value) for tensor, value in written.items()})
