"""Schedules and optimiser against closed forms, the reference and a torch-like SGD written out in NumPy."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memo_jax.training import optim

LR, DECAY, MOMENTUM, CLIP = 0.1, 0.05, 0.9, 1.5


def values(schedule, steps):
    return np.array([float(schedule(jnp.int32(step))) for step in range(steps)])


def constant_schedules(prototypes_from=0, learning_rate=None):
    rate = learning_rate or optax.constant_schedule(LR)
    return optim.Schedules(rate, optax.constant_schedule(0.9), optax.constant_schedule(0.05), prototypes_from)


def test_learning_rate_warms_up_from_zero_to_the_peak_and_ends_on_a_cosine():
    rates = values(optim.cosine_learning_rate(0.4, 1e-3, 5, 25), 27)
    np.testing.assert_allclose(rates[:5], [0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    progress = np.arange(20) / 20
    np.testing.assert_allclose(rates[5:25], 1e-3 + 0.5 * (0.4 - 1e-3) * (1 + np.cos(np.pi * progress)), rtol=1e-5)
    np.testing.assert_allclose(rates[25:], 1e-3, rtol=1e-6)


def test_learning_rate_scales_its_peak_but_not_its_end():
    peak = optim.scaled_learning_rate(0.2, 512)
    assert peak == pytest.approx(0.4)
    assert float(optim.cosine_learning_rate(peak, 1e-5, 2, 10)(10)) == pytest.approx(1e-5)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="learning rate"):
            optim.scaled_learning_rate(wrong, 256)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="11 warm-up steps do not fit into 10"):
        optim.cosine_learning_rate(0.1, 0.0, 11, 10)
    assert np.all(np.isfinite(values(optim.cosine_learning_rate(0.1, 0.0, 10, 10), 11)))
    assert np.all(np.isfinite(values(optim.cosine_learning_rate(0.1, 0.0, 0, 1), 2)))


def test_teacher_momentum_is_a_cosine_over_all_steps():
    momenta = values(optim.cosine_momentum(0.996, 1.0, 50), 51)
    np.testing.assert_allclose(momenta, 1 - 0.004 * (1 + np.cos(np.pi * np.arange(51) / 50)) / 2, rtol=1e-6)


@pytest.mark.parametrize("epochs", [0, 1, 2, 4])
def test_teacher_temperature_has_one_value_an_epoch_both_ends_included(epochs):
    temperatures = values(optim.epoch_teacher_temp(0.04, 0.07, epochs, 3), 18)
    expected = np.concatenate([np.linspace(0.04, 0.07, epochs), np.full(6 - epochs, 0.07)])
    np.testing.assert_allclose(temperatures, np.repeat(expected, 3), rtol=1e-6)


def test_schedules_are_those_of_the_reference(reference):
    config = json.loads(str(reference["config"]))
    per_epoch = config["steps_per_epoch"]
    total, steps = config["epochs"] * per_epoch, len(reference["schedule/lr"])
    rate = optim.cosine_learning_rate(
        config["base_lr_already_scaled"], config["min_lr"], config["warmup_epochs"] * per_epoch, total
    )
    momentum = optim.cosine_momentum(config["teacher_momentum"], 1.0, total)
    np.testing.assert_allclose(values(rate, steps), reference["schedule/lr"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(values(momentum, steps), reference["schedule/momentum"], rtol=1e-6)


def tensors(seed, scale=1.0):
    """Parameters (or gradients) of a small network, some tensors with a norm below and some above the clip."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: (scale * random.normal(0, 1, shape)).astype(np.float32)  # noqa: E731
    return {
        "ecapa": {
            "linear": {"kernel": draw(4, 3), "bias": draw(3) / 10},
            "norm": {"scale": draw(20)},
            "self_head": {"prototypes": draw(3, 5)},
        }
    }


def torch_like_sgd(params, gradients, rates, frozen_steps=0):
    """Returns the parameters after each step of what a torch training loop does, in float64.

    Each tensor's gradient is scaled by clip/(norm + 1e-6) if that is below one; the decay of tensors with more than
    one axis is added; buffer ← momentum·buffer + gradient (the gradient itself at first); parameter −= rate·buffer. A
    frozen tensor has no gradient: its loop body is skipped.
    """
    params = {path: np.asarray(p, np.float64) for path, p in jax.tree_util.tree_leaves_with_path(params)}
    buffers, history = {}, []
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True)):
        for path, g in jax.tree_util.tree_leaves_with_path(gradient):
            if step < frozen_steps and path[-1].key == "prototypes":
                continue
            g = np.asarray(g, np.float64)
            g = g * min(1.0, CLIP / (math.sqrt((g**2).sum()) + 1e-6))
            if g.ndim > 1:
                g = g + DECAY * params[path]
            buffers[path] = MOMENTUM * buffers[path] + g if path in buffers else g
            params[path] = params[path] - rate * buffers[path]
        history.append(dict(params))
    return history


def trained(optimizer, params, gradients):
    """Returns the parameters and optimiser states after each step."""
    state, history = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    return history


@pytest.mark.parametrize("frozen_steps", [0, 3])
def test_sgd_is_that_of_torch_with_clip_per_tensor_masked_decay_and_frozen_prototypes(frozen_steps):
    rate = optim.cosine_learning_rate(LR, 1e-3, 2, 8)
    params, gradients = tensors(0), [tensors(step + 1, scale=0.5 + step % 3) for step in range(6)]
    norms = [np.linalg.norm(g) for tree in gradients for g in jax.tree.leaves(tree)]
    assert min(norms) < CLIP < max(norms)
    optimizer = optim.build_optimizer(
        "sgd", constant_schedules(frozen_steps, rate), weight_decay=DECAY, clip_norm=CLIP, sgd_momentum=MOMENTUM
    )
    expected = torch_like_sgd(params, gradients, values(rate, 6), frozen_steps)
    for (ours, _), theirs in zip(trained(optimizer, params, gradients), expected, strict=True):
        for path, p in jax.tree_util.tree_leaves_with_path(ours):
            np.testing.assert_allclose(p, theirs[path], atol=2e-6, err_msg=str(path))


def prototype_leaves(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [np.asarray(leaf) for path, leaf in leaves if optim.is_prototypes(path)]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_frozen_prototypes_and_all_that_is_kept_for_them_stay_as_they_were(name):
    """Neither gradient nor decay nor momentum touches them; everything else moves from the first step."""
    optimizer = optim.build_optimizer(name, constant_schedules(3), weight_decay=DECAY, clip_norm=CLIP)
    params, gradients = tensors(0), [tensors(step + 1) for step in range(4)]
    start = prototype_leaves(params) + prototype_leaves(optimizer.init(params))
    assert len(start) == {"sgd": 2, "adamw": 3}[name]
    history = trained(optimizer, params, gradients)
    for ours, state in history[:3]:
        for now, before in zip(prototype_leaves(ours) + prototype_leaves(state), start, strict=True):
            np.testing.assert_array_equal(now, before)
        assert not np.array_equal(ours["ecapa"]["linear"]["kernel"], params["ecapa"]["linear"]["kernel"])
    after = prototype_leaves(history[3][0]) + prototype_leaves(history[3][1])
    assert not any(np.array_equal(now, before) for now, before in zip(after, start, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_prototypes_start_as_if_the_frozen_steps_had_not_been(name):
    """Training them from step 3 equals training them from step 0 on the later gradients alone (constant rate)."""
    build = lambda until: optim.build_optimizer(  # noqa: E731
        name, constant_schedules(until), weight_decay=DECAY, clip_norm=CLIP
    )
    params, gradients = tensors(0), [tensors(step + 1) for step in range(7)]
    late = trained(build(3), params, gradients)[-1][0]
    fresh = trained(build(0), params, gradients[3:])[-1][0]
    np.testing.assert_allclose(prototype_leaves(late), prototype_leaves(fresh), rtol=1e-6)


def test_zero_gradients_still_decay_matrices_alone():
    optimizer = optim.build_optimizer("sgd", constant_schedules(), weight_decay=DECAY, clip_norm=CLIP)
    params = tensors(0)
    after = trained(optimizer, params, [jax.tree.map(np.zeros_like, params)])[0][0]
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        now = after["ecapa"][path[1].key][path[2].key]
        np.testing.assert_allclose(now, p * (1 - LR * DECAY) if p.ndim > 1 else p, rtol=1e-6)


def test_clip_of_zero_does_not_clip():
    optimizer = optim.build_optimizer("sgd", constant_schedules(), weight_decay=0.0, clip_norm=0.0)
    params, gradient = tensors(0), tensors(1, scale=100.0)
    after = trained(optimizer, params, [gradient])[0][0]
    expected = jax.tree.map(lambda p, g: p - LR * g, params, gradient)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5), after, expected)


def test_adamw_decays_beside_the_adaptive_step():
    """With gradients of one sign the first Adam step is the sign; decay comes on top, on matrices alone."""
    optimizer = optim.build_optimizer("adamw", constant_schedules(), weight_decay=DECAY, clip_norm=0.0)
    params, gradient = tensors(0), tensors(1)
    after = trained(optimizer, params, [gradient])[0][0]

    def check(a, p, g):
        np.testing.assert_allclose(a, p - LR * (np.sign(g) + (DECAY * p if p.ndim > 1 else 0)), atol=1e-4)

    jax.tree.map(check, after, params, gradient)


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="'lion'.*sgd or adamw"):
        optim.build_optimizer("lion", constant_schedules(), weight_decay=0.0, clip_norm=0.0)
