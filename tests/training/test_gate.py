"""The gate: each rule closes when it should, says when, and never opens again."""

import functools

import jax
import numpy as np
import pytest

from memo_jax.training.gate import RULES, GateRule, initial_gate, updated_gate


@functools.partial(jax.jit, static_argnames="rule")
def scan(rule, gate, steps, loss, alignment):
    def body(gate, inputs):
        after = updated_gate(gate, *inputs, rule)
        return after, (gate.closed, after)

    return jax.lax.scan(body, gate, (steps, loss, alignment))


def run(rule, loss, alignment=0.0, gate=None, first=0):
    """Returns whether each step ran without the contrastive term, and the gates after each step."""
    loss = np.asarray(loss, np.float32)
    steps = np.arange(first, first + len(loss), dtype=np.int32)
    alignment = np.broadcast_to(np.float32(alignment), loss.shape)
    _, (closed, after) = scan(rule, initial_gate(rule) if gate is None else gate, steps, loss, alignment)
    return np.asarray(closed), jax.tree.map(np.asarray, after)


def first_closed(closed) -> int:
    """The first step without the term, −1 if there is none."""
    return int(np.argmax(closed)) if closed.any() else -1


def test_plateau_closes_at_the_end_of_the_first_window_without_enough_improvement():
    """Without smoothing, the loss at the ends of windows of 4 is 8, 7, 6.5, 6.4: improvements 12 %, 7 %, 1.5 %."""
    rule = GateRule("plateau", smoothing=0.0, window=4, min_steps=0, min_improvement=0.05)
    loss = np.repeat([8.0, 7.0, 6.5, 6.4, 1.0, 1.0], 4)
    closed, after = run(rule, loss)
    assert first_closed(closed) == 16
    assert int(after.closed_at[-1]) == 16 and int(after.closed_at[14]) == -1


def test_plateau_waits_for_its_minimum_of_steps():
    rule = GateRule("plateau", smoothing=0.0, window=4, min_steps=18, min_improvement=0.05)
    assert first_closed(run(rule, np.full(30, 8.0))[0]) == 20


def test_plateau_stays_open_while_the_loss_falls_and_closes_on_a_rise():
    rule = GateRule("plateau", smoothing=0.5, window=5, min_steps=0, min_improvement=0.01)
    falling = 8 * 0.99 ** np.arange(60)
    assert not run(rule, falling)[0].any()
    rising = np.concatenate([falling, 8 * np.ones(20)])
    assert 60 < first_closed(run(rule, rising)[0]) <= 66


def test_plateau_judges_the_smoothed_loss():
    """The loss falls by 22 % per window, but the last step of one window happens to be far above the previous one's."""
    loss = 10 * 0.995 ** np.arange(400)
    loss[199] *= 1.5
    smooth = GateRule("plateau", smoothing=0.98, window=50, min_steps=0, min_improvement=0.02)
    assert not run(smooth, loss)[0].any()
    assert first_closed(run(smooth._replace(smoothing=0.0), loss)[0]) == 200


def test_conflict_closes_after_a_whole_window_below_the_threshold():
    rule = GateRule("conflict", smoothing=0.0, window=5, min_steps=0, min_alignment=0.1)
    alignment = np.full(40, 0.5)
    alignment[10:14] = 0.0  # four steps: one short of a window
    alignment[20:30] = 0.0
    closed, after = run(rule, np.ones(40), alignment)
    assert first_closed(closed) == 25 and int(after.closed_at[-1]) == 25
    assert not run(rule, np.ones(40), 0.1)[0].any()  # at the threshold is not below it


def test_conflict_waits_for_its_minimum_of_steps_and_smooths():
    rule = GateRule("conflict", smoothing=0.0, window=5, min_steps=12)
    assert first_closed(run(rule, np.ones(30), -0.5)[0]) == 12
    # A mean over about 20 steps at +1 takes more than 5 further steps at −0.5 to fall below zero.
    slow = rule._replace(smoothing=0.95, min_steps=0)
    alignment = np.where(np.arange(80) < 30, 1.0, -0.5)
    assert first_closed(run(slow, np.ones(80), alignment)[0]) > 40


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_step_uses_the_term_for_exactly_that_many_steps(stop):
    closed, after = run(GateRule("step", stop_step=stop), np.ones(12))
    assert np.flatnonzero(~closed).tolist() == list(range(stop))
    assert int(after.closed_at[-1]) == stop


def test_always_and_never():
    loss, alignment = np.ones(50), -1.0
    assert not run(GateRule("always", window=2, min_steps=0), loss, alignment)[0].any()
    assert run(GateRule("never"), loss, alignment)[0].all()


@pytest.mark.parametrize("name", RULES)
def test_closed_gate_never_opens_and_keeps_its_step(name):
    """Whatever comes: over random losses and alignments, "closed" only ever goes from false to true, and everything in
    the state, closing step included, stays as it was at that moment."""
    rule = GateRule(name, smoothing=0.5, window=3, min_steps=5, min_improvement=0.05, stop_step=9)
    for seed in range(8):
        random = np.random.default_rng(seed)
        closed, after = run(rule, random.uniform(0.1, 9, 60), random.uniform(-1, 1, 60))
        assert np.all(np.diff(closed.astype(int)) >= 0)
        if name not in ("always", "never"):
            k = first_closed(closed)
            assert k > 0
            assert int(after.closed_at[-1]) == k
            for leaf in jax.tree.leaves(after):
                np.testing.assert_array_equal(leaf[k - 1 :], np.broadcast_to(leaf[k - 1], leaf[k - 1 :].shape))


def test_running_means_weigh_all_steps_from_the_first():
    """With decay d, step i of n counts as dⁿ⁻ⁱ, normalised: the mean is not biased towards its start at zero."""
    loss, alignment = np.random.default_rng(0).uniform(1, 2, (2, 20))
    _, after = run(GateRule("always", smoothing=0.9), loss, alignment)
    for n in (1, 2, 20):
        weights = 0.9 ** np.arange(n - 1, -1, -1)
        np.testing.assert_allclose(after.loss[n - 1], np.average(loss[:n], weights=weights), rtol=1e-5)
        np.testing.assert_allclose(after.alignment[n - 1], np.average(alignment[:n], weights=weights), rtol=1e-5)


@pytest.mark.parametrize("name", ["plateau", "conflict", "step"])
def test_gate_resumes_from_its_saved_state(name):
    """The gate's future depends on its state alone: stopped anywhere and rebuilt from arrays, it continues the same."""
    rule = GateRule(name, smoothing=0.8, window=4, min_steps=10, min_improvement=0.05, stop_step=25)
    random = np.random.default_rng(3)
    loss, alignment = random.uniform(1, 9, 40), random.uniform(-1, 0.6, 40)
    whole, after = run(rule, loss, alignment)
    assert 0 < first_closed(whole) < 40
    for stop in (3, 12, 30):
        saved = jax.tree.map(lambda leaf, i=stop: leaf[i - 1], after)
        rest, after_rest = run(rule, loss[stop:], alignment[stop:], saved, stop)
        np.testing.assert_array_equal(rest, whole[stop:])
        for ours, expected in zip(jax.tree.leaves(after_rest), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(ours[-1], expected[-1])


@pytest.mark.parametrize(
    "rule, message",
    [
        (GateRule("plato"), "'plato'.*plateau, conflict, step, always, never"),
        (GateRule("plateau", smoothing=1.0), "gate.smoothing is 1.0"),
        (GateRule("plateau", smoothing=-0.1), "gate.smoothing is -0.1"),
        (GateRule("conflict", window=0), "gate.window is 0"),
    ],
)
def test_rules_that_cannot_work_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        initial_gate(rule)
