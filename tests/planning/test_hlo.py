"""The collectives and the time of a compiled program are read correctly from its text."""

import pytest

from memo_jax.planning.chips import CHIPS
from memo_jax.planning.hlo import collective_seconds, collectives, estimated_seconds

H100, V5E = CHIPS["h100"], CHIPS["v5e"]

PROGRAM = """HloModule jit_step

%condition (state: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %index = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %compare = pred[]{:T(512)} compare(%index, %limit), direction=LT
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %part = f32[8]{0} get-tuple-element(%state), index=1
  %summed = f32[8]{0} all-reduce(%part), channel_id=3, replica_groups={{0,1}}, to_apply=%add
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
    """A collective that appears twice counts once, a loop as often as it runs, and of branches the slowest."""
    assert collectives(PROGRAM) == {"all-reduce": (1 + 5, 8 * 4 + 4 * 16 * 2 + 5 * 8 * 4), "all-gather": (1, 16 * 4)}
    of_shard_map = PROGRAM.replace("channel_id=2", "channel_id=1")
    assert collectives(of_shard_map) == collectives(PROGRAM)
    assert estimated_seconds(PROGRAM, V5E) == pytest.approx((7000 + 5 * 10 + 300) / 1.5e9)
    assert collective_seconds(PROGRAM, V5E, 4) == pytest.approx((2 * (160 + 5 * 32) + 64) * 3 / 4 / 200e9)


def test_a_loop_runs_as_often_as_the_compiler_says():
    """Its condition may be a fusion, which hides the comparison."""
    loop = "condition=%condition, body=%body"
    known = PROGRAM.replace(loop, loop + ', backend_config={"known_trip_count":{"n":"7"}}')
    assert collectives(known)["all-reduce"] == (1 + 7, 8 * 4 + 4 * 16 * 2 + 7 * 8 * 4)
    assert estimated_seconds(known, V5E) == pytest.approx((7000 + 7 * 10 + 300) / 1.5e9)


def gpu_program(*lines):
    return "\n".join(["ENTRY %main (x: bf16[128,401,512]) -> f32[8] {", *(f"  {line}" for line in lines), "}"])


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [
        # XLA's estimate (of several, the one that considers tiles); operations that do no work do not count.
        (
            [
                "%x = f32[8]{0} parameter(0)",
                '%y = f32[8]{0} fusion(%x), kind=kCustom, backend_config={"reification_cost":'
                '[{"exec_time_us":4000.5,"name":""},{"exec_time_us":2.5,"name":"indexing-cost-model"}]}',
            ],
            2.5e-6,
        ),
        # No estimate: bytes read and written, divided by the bandwidth.
        (["%x = f32[1000,1000]{1,0} parameter(0)", "%y = f32[1000,1000]{0,1} copy(%x)"], 8e6 / 3.352e12),
        # A convolution and its two gradients have the same FLOPs: 128 × 401 outputs of 512 channels, 5 × 512 products
        # each.
        (
            [
                "%x = bf16[128,401,512]{2,1,0} parameter(0)",
                "%k = bf16[512,5,512]{2,1,0} parameter(1)",
                "%y = (bf16[128,401,512]{2,1,0}, u8[0]{0}) custom-call(%x, %k), window={size=5 pad=2_2}, "
                'dim_labels=b0f_o0i->b0f, custom_call_target="__cudnn$convForward"',
            ],
            2 * 128 * 401 * 512 * 512 * 5 / 989e12,
        ),
        (
            [
                "%g = bf16[128,401,512]{2,1,0} parameter(0)",
                "%k = bf16[512,5,512]{2,1,0} parameter(1)",
                "%x = (bf16[128,401,512]{2,1,0}, u8[0]{0}) custom-call(%g, %k), window={size=5 pad=2_2}, "
                'dim_labels=b0f_o0i->b0f, custom_call_target="__cudnn$convBackwardInput"',
            ],
            2 * 128 * 401 * 512 * 512 * 5 / 989e12,
        ),
        (
            [
                "%x = bf16[128,401,512]{2,1,0} parameter(0)",
                "%g = bf16[128,401,512]{2,1,0} parameter(1)",
                "%k = (bf16[512,5,512]{2,1,0}, u8[0]{0}) custom-call(%x, %g), window={size=5 pad=2_2}, "
                'dim_labels=b0f_o0i->b0f, custom_call_target="__cudnn$convBackwardFilter"',
            ],
            2 * 128 * 401 * 512 * 512 * 5 / 989e12,
        ),
        # A product in TensorFloat-32 has half the peak.
        (
            [
                "%a = f32[4096,2048]{1,0} parameter(0)",
                "%b = f32[2048,4096]{1,0} parameter(1)",
                "%c = (f32[4096,4096]{1,0}, s8[4194304]{0}) custom-call(%a, %b), "
                'custom_call_target="__cublas$lt$matmul", '
                'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}',
            ],
            2 * 4096 * 4096 * 2048 / (989e12 / 2),
        ),
    ],
)
def test_seconds_of_a_program_for_a_gpu(lines, seconds):
    assert estimated_seconds(gpu_program(*lines), H100) == pytest.approx(seconds)


def test_collectives_of_a_program_for_a_gpu():
    """They take as long as XLA estimates, else their bytes over the links; none is counted as computation."""
    program = gpu_program(
        "%x = f32[8]{0} parameter(0)",
        '%r = f32[8]{0} all-reduce-start(%x), channel_id=1, backend_config={"reification_cost":[{"exec_time_us":26.5,'
        '"name":"sol"}]}',
        "%s = ((f32[16]{0}, f32[32]{0}), (f32[2]{0}, f32[4]{0})) reduce-scatter-start(%x, %x), channel_id=2",
        '%d = f32[8]{0} all-reduce-done(%r), backend_config={"reification_cost":[]}',
    )
    assert collectives(program) == {"all-reduce": (1, 32), "reduce-scatter": (1, 24)}
    assert collective_seconds(program, H100, 8) == pytest.approx(26.5e-6 + 24 * 7 / 450e9)
    assert estimated_seconds(program, H100) == 0
