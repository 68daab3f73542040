"""Planning for a pod: what a compiled program tells is read right, and the command compiles the train step for one."""

import importlib.metadata
import importlib.util
import json

import jax
import pytest
import test_processes
import tiny

from memo_jax import chips, pod_plan, recipe
from memo_jax.compiled_program import collective_seconds, collectives, estimated_seconds

H100 = chips.CHIPS["h100"]
has_cuda = any(plugin.name.startswith("xla_cuda") for plugin in importlib.metadata.entry_points(group="jax_plugins"))
needs_cuda = pytest.mark.skipif(not has_cuda, reason="needs JAX's part for CUDA: .[cuda]")
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
    v5e = chips.CHIPS["v5e"]
    assert collectives(PROGRAM) == {"all-reduce": (1, 8 * 4 + 4 * 16 * 2), "all-gather": (1, 16 * 4)}
    assert estimated_seconds(PROGRAM, v5e) == pytest.approx((7000 + 5 * 10 + 300) / 1.5e9)
    assert collective_seconds(PROGRAM, v5e, 4) == pytest.approx((2 * 160 + 64) * 3 / 4 / 200e9)


def gpu_program(*lines):
    return "\n".join(["ENTRY %main (x: bf16[128,401,512]) -> f32[8] {", *(f"  {line}" for line in lines), "}"])


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [
        # XLA's estimate, of several the one that knows of tiles; nothing of what is no work.
        (['%x = f32[8]{0} parameter(0)', '%y = f32[8]{0} fusion(%x), kind=kCustom, backend_config={"reification_cost":'
          '[{"exec_time_us":4000.5,"name":""},{"exec_time_us":2.5,"name":"indexing-cost-model"}]}'], 2.5e-6),
        # No estimate: bytes read and written over the bandwidth.
        (['%x = f32[1000,1000]{1,0} parameter(0)', '%y = f32[1000,1000]{0,1} copy(%x)'], 8e6 / 3.352e12),
        # A convolution and its two gradients have the same FLOPs: 128 × 401 outputs of 512 channels, 5 × 512 products each.
        (['%x = bf16[128,401,512]{2,1,0} parameter(0)', '%k = bf16[512,5,512]{2,1,0} parameter(1)',
          '%y = (bf16[128,401,512]{2,1,0}, u8[0]{0}) custom-call(%x, %k), window={size=5 pad=2_2}, '
          'dim_labels=b0f_o0i->b0f, custom_call_target="__cudnn$convForward"'], 2 * 128 * 401 * 512 * 512 * 5 / 989e12),
        (['%g = bf16[128,401,512]{2,1,0} parameter(0)', '%k = bf16[512,5,512]{2,1,0} parameter(1)',
          '%x = (bf16[128,401,512]{2,1,0}, u8[0]{0}) custom-call(%g, %k), window={size=5 pad=2_2}, '
          'dim_labels=b0f_o0i->b0f, custom_call_target="__cudnn$convBackwardInput"'],
         2 * 128 * 401 * 512 * 512 * 5 / 989e12),
        (['%x = bf16[128,401,512]{2,1,0} parameter(0)', '%g = bf16[128,401,512]{2,1,0} parameter(1)',
          '%k = (bf16[512,5,512]{2,1,0}, u8[0]{0}) custom-call(%x, %g), window={size=5 pad=2_2}, '
          'dim_labels=b0f_o0i->b0f, custom_call_target="__cudnn$convBackwardFilter"'],
         2 * 128 * 401 * 512 * 512 * 5 / 989e12),
        # A product in TensorFloat-32 has half the peak.
        (['%a = f32[4096,2048]{1,0} parameter(0)', '%b = f32[2048,4096]{1,0} parameter(1)',
          '%c = (f32[4096,4096]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", '
          'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}'],
         2 * 4096 * 4096 * 2048 / (989e12 / 2)),
    ],
)
def test_seconds_of_a_program_for_a_gpu(lines, seconds):
    assert estimated_seconds(gpu_program(*lines), H100) == pytest.approx(seconds)


def test_collectives_of_a_program_for_a_gpu():
    """Those that wait as long as XLA reckons, else as their bytes over the links; none is counted as computation."""
    program = gpu_program(
        '%x = f32[8]{0} parameter(0)',
        '%r = f32[8]{0} all-reduce-start(%x), channel_id=1, backend_config={"reification_cost":[{"exec_time_us":26.5,'
        '"name":"sol"}]}',
        '%s = ((f32[16]{0}, f32[32]{0}), (f32[2]{0}, f32[4]{0})) reduce-scatter-start(%x, %x), channel_id=2',
        '%d = f32[8]{0} all-reduce-done(%r), backend_config={"reification_cost":[]}',
    )
    assert collectives(program) == {"all-reduce": (1, 32), "reduce-scatter": (1, 24)}
    assert collective_seconds(program, H100, 8) == pytest.approx(26.5e-6 + 24 * 7 / 8 / 450e9)
    assert estimated_seconds(program, H100) == 0


def arguments(*settings):
    settings = ("model.branches=resnet", "data.local_crops=0", *settings)
    return ["plan", f"--config={tiny.material().config}", *(f"--config.{text}" for text in settings)]


@needs_libtpu
@pytest.mark.parametrize("topology", ["v4:2x2x4", "v5e:4x4", "v5p:2x2x4", "v6e:4x4"])
def test_a_chip_is_one_device(topology):
    assert len(chips.compile_only_devices(topology)[1]) == 16


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
    monkeypatch.setitem(chips.CHIPS, "v5e", chips.CHIPS["v5e"]._replace(memory=2e6))
    status, text = tiny.here(*arguments("data.batch_size=64"), "--topology=v5e:2x2")
    assert status == 1 and "DOES NOT FIT" in text and "try --config.data.batch_size=" in text


def test_a_program_that_the_compiler_refuses_for_its_memory_is_a_plan_too(monkeypatch):
    class Refused:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
                "23.50G of 15.75G hbm. Exceeded hbm capacity by 7.75G.")

    monkeypatch.setattr(pod_plan, "compile_only_devices", lambda topology: (chips.CHIPS["v5e"], jax.devices()))
    monkeypatch.setattr(pod_plan, "lowered_step", lambda *_: Refused())
    status, text = tiny.here(*arguments("data.batch_size=30"), "--topology=v5e:1x1", "--json")
    result = json.loads(text[text.index("{"):])
    assert status == 1 and result["fits"] is False and result["hbm_bytes"] == int(23.5 * 2**30)
    assert result["flops"] is None and "try --config.data.batch_size=20 (20 utterances a chip)" in result["advice"][0]


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:2", "4x4", "h100", "h100:2x2x2", "h900:8"])
def test_a_topology_that_is_none_is_refused(topology):
    status, text = tiny.here(*arguments(), f"--topology={topology}")
    assert status == 2 and "memo-jax: error: topology" in text and "v5e:4x4" in text and "h100:8" in text


@needs_libtpu
def test_a_topology_that_no_pod_has_and_a_batch_that_its_chips_cannot_share_are_refused():
    status, text = tiny.here(*arguments("data.batch_size=6"), "--topology=v5e:2x2")
    assert status == 2 and "data.batch_size 6 is not a multiple of the 4 chips of v5e:2x2" in text
    status, text = tiny.here(*arguments(), "--topology=v5e:3x5")
    assert status == 2 and "memo-jax: error: topology 'v5e:3x5': " in text


@pytest.mark.parametrize(("topology", "extra"), [("v5e:2x2", "tpu-plan"), ("h100:8", "cuda")])
def test_without_the_compiler_its_extra_is_named(monkeypatch, topology, extra):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(chips.importlib.metadata, "entry_points", lambda group: [])
    status, text = tiny.here(*arguments(), f"--topology={topology}")
    assert status == 2 and f"pip install 'memo-jax[{extra}]'" in text


@needs_cuda
def test_machines_of_few_gpus_have_a_slow_network():
    for topology, count, links in (("h100:8", 8, 450e9), ("h100:4x8", 32, 400e9), ("h100:4x2", 8, 100e9)):
        gpu, devices = chips.compile_only_devices(topology)
        assert (len(devices), gpu.links) == (count, links)


@needs_cuda
@pytest.mark.parametrize("gpu", ["a100", "h100", "h200", "b200"])
def test_the_train_step_of_both_networks_is_compiled_for_gpus(gpu):
    """Of an A100, too, of which XLA has no cost model."""
    command = ["plan", f"--config={tiny.material().config}", f"--topology={gpu}:2", "--config.data.batch_size=32",
               "--utterances=320", "--json"]
    status, text = tiny.here(*command)
    result = json.loads(text[text.index("{"):])
    assert status == 0 and result["fits"] and result["chips"] == 2 and result["collectives"]["all-reduce"][0] > 0
    assert 0 < result["collective_seconds"] < result["seconds_per_step"] < 1
    assert 0 < result["utilisation"] < 1
