"""Every backbone against the actual PyTorch networks: forward and gradient, evaluation and training, and statistics.

In float64, where rounding never moves a ReLU's input to the other side of zero, so that both must agree on the
gradient. Deviations are relative to the largest number of a tensor; where a true gradient is zero, like that
of a bias before a batch norm, to a thousandth of the largest gradient in the network.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if any(name.startswith("memo_jax.models") for name in sys.modules):
    raise pytest.UsageError(f"{__file__} computes in float64 and needs a process of its own: make parity")
jax.config.update("jax_enable_x64", True)
jnp.float32 = jnp.float64  # the layers ask for float32 by name, their defaults as soon as they are imported

import torch  # noqa: E402
from references import CASES, embedding_of, scramble, tensors_of  # noqa: E402

from memo_jax.inference import interop  # noqa: E402

TOLERANCE = 1e-6
BATCH, FRAMES = 4, 230  # two segments of CAM++, the second one incomplete


def check(ours, theirs, what: str, floor: float = 0.0):
    scale = max(np.abs(theirs).max(), floor)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * scale, err_msg=what)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_forward_gradient_and_statistics(name, train):
    case = CASES[name]
    network = case.build(**case.small)
    scramble(network)
    module, variables = interop.backbone_from_torch(tensors_of(network), case.kind, case.backbone)
    network, variables = network.double(), jax.tree.map(jnp.float64, variables)

    x = np.random.default_rng(1).normal(0, 1, (BATCH, FRAMES, 80))
    torch_x = torch.from_numpy(x).requires_grad_()
    network.train(train)
    theirs = embedding_of(network(torch_x.clone()))  # some change their input in place
    after = tensors_of(network)  # before the backward pass, in which CAM++ recomputes its layers and updates them again
    # A fixed direction for every embedding: a plain sum would vanish behind a batch norm.
    direction = np.random.default_rng(2).normal(0, 1, theirs.shape)
    (theirs * torch.from_numpy(direction)).sum().backward()

    def weighted(params, x):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        out, updated = module.apply(given, x, train=train, mutable=["batch_stats"])
        return jnp.vdot(out, direction), (out, updated)

    (_, (ours, updated)), (gradients, input_gradient) = jax.jit(
        jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)
    )(variables["params"], x)

    form = getattr(module, "form", "speechbrain")
    named = interop.backbone_to_torch({"params": gradients}, case.kind, case.backbone, form)
    their_gradients = {parameter: x.grad.numpy() for parameter, x in network.named_parameters()}
    assert named.keys() == their_gradients.keys()
    check(ours, theirs.detach().numpy(), "embeddings")
    check(input_gradient, torch_x.grad.numpy(), "gradient of the input")
    largest = max(np.abs(gradient).max() for gradient in their_gradients.values())
    for parameter, gradient in their_gradients.items():
        check(named[parameter], gradient, f"gradient of {parameter}", 1e-3 * largest)

    statistics = interop.backbone_to_torch({"batch_stats": updated["batch_stats"]}, case.kind, case.backbone, form)
    assert statistics.keys() == {name for name in after if name.endswith(("running_mean", "running_var"))}
    for statistic, value in statistics.items():
        check(value, after[statistic], statistic)
