"""Planning for a pod: what a compiled program tells is read right, and the command compiles the train step for one."""

import importlib.util
import json

import jax
import pytest
import test_processes
import tiny

from memo_jax import pod_plan, recipe

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: .[tpu-plan]")

PROGRAM = """HloModule jit_step

%condition (state: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %index = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %compare = pred[]{:T(512)} compare(%index, %limit), direction=LT
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %fusion.1 = (s32[], f32[8]) fusion(%state), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"10"}
}

%inner (x: f32[8]) -> f32[8] {
  ROOT %negate = f32[8]{0} negate(%x), backend_config={"estimated_cycles":"1000"}
}

%dear (x: f32[8]) -> f32[8] {
  ROOT %fusion.2 = f32[8]{0} fusion(%x), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"300"}
}

%cheap (x: f32[8]) -> f32[8] {
  ROOT %copy.1 = f32[8]{0} copy(%x), backend_config={"estimated_cycles":"3"}
}

ENTRY %main (x: f32[8], y: bf16[4,16]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %fusion.3 = f32[8]{0} fusion(%x), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"7000"}
  %while.1 = (s32[], f32[8]) while(%tuple), condition=%condition, body=%body
  %conditional.1 = f32[8]{0} conditional(%p, %x, %x), branch_computations={%dear, %cheap}
  %reduced = (f32[8]{0}, bf16[4,16]{1,0}) all-reduce(%x, %y), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %gathered = (f32[8]{0}, f32[16]{0}) all-gather-start(%x), channel_id=2, dimensions={0}
  %again = f32[16]{0} all-gather(%x), channel_id=2, dimensions={0}
  ROOT %result = f32[8]{0} add(%x, %fusion.3)
}
"""


def test_collectives_and_cycles_of_a_program():
    """A collective that appears twice is one; a loop counts by its trips, of branches the dearest, no inside of fusions."""
    assert pod_plan.collectives(PROGRAM) == {"all-reduce": (1, 8 * 4 + 4 * 16 * 2), "all-gather": (1, 16 * 4)}
    assert pod_plan.estimated_cycles(PROGRAM) == 7000 + 5 * 10 + 300


def arguments(*settings):
    settings = ("model.branches=resnet", "data.local_crops=0", *settings)
    return ["plan", f"--config={tiny.material().config}", *(f"--config.{text}" for text in settings)]


@needs_libtpu
@pytest.mark.parametrize("topology", ["v4:2x2x4", "v5e:4x4", "v5p:2x2x4", "v6e:4x4"])
def test_a_chip_is_one_device(topology):
    assert len(pod_plan.compile_only_devices(topology)[1]) == 16


@needs_libtpu
def test_the_train_step_is_compiled_for_a_topology(monkeypatch):
    """Twice the batch doubles what a chip computes, nearly, without NT-Xent's comparison of all with all, which it
    quadruples; a bank is memory that every chip holds whole."""
    def with_bank(key, batch, banks):
        (views,) = test_processes.front_end(key, batch, banks)
        return (views + (banks["noise"][0, 0] / 32768 if banks else 0),)

    test_processes.patch_for_tests(monkeypatch.setattr)
    monkeypatch.setattr(recipe, "build_front_end", lambda config: with_bank)
    plans = []
    bank = ("augment.noise=musan", "augment.bank_megabytes=50")
    for settings in (("data.batch_size=64",), ("data.batch_size=128", *bank)):
        command = arguments("gate.rule=never", *settings)
        status, text = tiny.here(*command, "--topology=v5e:4x4", "--utterances=1280", "--json")
        plans.append(json.loads(text[text.index("{"):]))
        assert status == 0
    one, two = plans
    for key in ("hbm_bytes", "flops", "collective_bytes", "seconds_per_step", "utilisation", "utterances_per_second",
                "compile_seconds"):
        assert one[key] > 0, key
    assert one["fits"] is True and one["chips"] == 16 and one["steps"] == 12
    assert one["utterances_per_second"] == pytest.approx(64 / one["seconds_per_step"])
    assert one["utilisation"] == pytest.approx(one["flops"] / 197e12 / one["seconds_per_step"])
    assert 1.5 < two["flops"] / one["flops"] < 2.1
    assert 50e6 < two["argument_bytes"] - one["argument_bytes"] < 55e6
    assert one["argument_bytes"] + one["temporary_bytes"] <= one["hbm_bytes"] < one["hbm_limit_bytes"]
    assert pod_plan.summary(one).startswith("v5e:4x4: 16 chips, 64 utterances a step (4 a chip), float32\n")


@needs_libtpu
def test_what_does_not_fit_is_said_with_what_to_change(monkeypatch):
    test_processes.patch_for_tests(monkeypatch.setattr)
    monkeypatch.setitem(pod_plan.CHIPS, "v5e", pod_plan.CHIPS["v5e"]._replace(memory=2e6))
    status, text = tiny.here(*arguments("data.batch_size=64"), "--topology=v5e:2x2")
    assert status == 1 and "DOES NOT FIT" in text and "try --config.data.batch_size=" in text


def test_a_program_that_the_compiler_refuses_for_its_memory_is_a_plan_too(monkeypatch):
    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
                "23.50G of 15.75G hbm. Exceeded hbm capacity by 7.75G.")

    monkeypatch.setattr(pod_plan, "compile_only_devices", lambda topology: (pod_plan.CHIPS["v5e"], jax.devices()))
    monkeypatch.setattr(pod_plan, "lowered_step", lambda *_: Refused())
    status, text = tiny.here(*arguments("data.batch_size=30"), "--topology=v5e:1x1", "--json")
    result = json.loads(text[text.index("{"):])
    assert status == 1 and result["fits"] is False and result["hbm_bytes"] == int(23.5 * 2**30)
    assert result["flops"] is None and "try --config.data.batch_size=20 (20 utterances a chip)" in result["advice"][0]


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:2", "4x4"])
def test_a_topology_that_is_none_is_refused(topology):
    status, text = tiny.here(*arguments(), f"--topology={topology}")
    assert status == 2 and "memo-jax: error: topology" in text and "v5e:4x4" in text


@needs_libtpu
def test_a_topology_that_no_pod_has_and_a_batch_that_its_chips_cannot_share_are_refused():
    status, text = tiny.here(*arguments("data.batch_size=6"), "--topology=v5e:2x2")
    assert status == 2 and "data.batch_size 6 is not a multiple of the 4 chips of v5e:2x2" in text
    status, text = tiny.here(*arguments(), "--topology=v5e:3x5")
    assert status == 2 and "memo-jax: error: topology 'v5e:3x5': " in text


def test_without_the_compiler_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(pod_plan.importlib.util, "find_spec", lambda name: None)
    status, text = tiny.here(*arguments(), "--topology=v5e:2x2")
    assert status == 2 and "pip install 'memo-jax[tpu-plan]'" in text
