"""The text of compiled programs, as the TPU compiler and XLA's CPU compiler print them."""

import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_jax.aot import collectives as hlo
from engram_jax.aot.hlo_cost import Rates, cost, kernels
from engram_jax.aot.hlo_loops import executions, trip_count
from engram_jax.aot.hlo_text import Array, arrays_of, bits, parse

pytestmark = pytest.mark.usefixtures("optimized")

# Shortened from what the TPU compiler printed: no known_trip_count, tiled layouts, memory spaces,
# async pairs with context words, an all-to-all wrapped in async-start, a limit that a loop carries.
TPU = """HloModule jit_f, is_scheduled=true

%async_computation (param_0: bf16[8,128]) -> bf16[8,128] {
  %param_0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-to-all.9 = bf16[8,128]{1,0:T(8,128)(2,1)} all-to-all(%param_0), dimensions={0}
}, execution_thread="sparsecore"

%all-reduce-scatter.1 (param_0.1: f32[64,8]) -> f32[8,8] {
  %param_0.1 = f32[64,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,8]{1,0:T(8,128)} all-reduce(%param_0.1), to_apply=%add
  %constant.1 = u32[]{:T(128)} constant(0)
  ROOT %slice = f32[8,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %constant.1, %constant.1)
}

%body (state: (u32[], bf16[8,128], s32[])) -> (u32[], bf16[8,128], s32[]) {
  %two = u32[]{:T(128)} constant(2)
  %state = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %limit = s32[] get-tuple-element(%state), index=2
  %permute-start = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %permute-done = bf16[8,128]{1,0:T(8,128)(2,1)} collective-permute-done(%permute-start)
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %out = (u32[]{:T(128)}, bf16[8,128]{1,0}, s32[]) tuple(%next, %permute-done, %limit)
}

%condition (state.1: (u32[], bf16[8,128], s32[])) -> pred[] {
  %state.1 = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, s32[]) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit.1 = s32[] get-tuple-element(%state.1), index=2
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit.1), direction=LT, metadata={op_name="f/while"}
}

ENTRY %main.5_spmd (p: bf16[8,128], q: f32[64,8]) -> (bf16[8,128], f32[8,8]) {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %q = f32[64,8]{1,0:T(8,128)} parameter(1)
  %one = u32[]{:T(128)} constant(1)
  %start = u32[]{:T(128)} copy(%one)
  %seven = s32[] constant(7)
  %tuple = (u32[], bf16[8,128]{1,0:T(8,128)(2,1)}, /*index=2*/s32[]) tuple(%start, %p, %seven)
  %loop = (u32[], bf16[8,128]{1,0}, s32[]) while(%tuple), condition=%condition, body=%body
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  %kernel = bf16[8,128]{1,0} custom-call(%y), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/kernel"}
  %gather-start = ((bf16[8,128]{1,0}, f32[64,8]{1,0}), (bf16[64,128]{1,0}, f32[512,8]{1,0})) \
all-gather-start(%y, %q), dimensions={0}, metadata={op_name="jit(f)/all_gather"}
  %gather-done = (bf16[64,128]{1,0}, f32[512,8]{1,0}) all-gather-done(%gather-start)
  %wrapped = ((bf16[8,128]{1,0}), bf16[8,128]{1,0}, u32[]{:S(8)}) async-start(%y), \
calls=%async_computation
  %unwrapped = bf16[8,128]{1,0} async-done(%wrapped), calls=%async_computation
  %scattered = f32[8,8]{1,0:T(8,128)} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %result = (bf16[8,128]{1,0}, f32[8,8]{1,0}) tuple(%unwrapped, %scattered)
}
"""


def test_collectives_of_a_tpu_program():
  found = {made.kind: made for made in hlo.collectives(TPU)}
  assert len(found) == len(hlo.collectives(TPU)) == 4
  small, large = Array("bf16", (8, 128)), Array("f32", (64, 8))
  assert found["all-to-all"][1:5] == ((small,), 2048, 1, True)
  assert found["collective-permute"][1:5] == ((small,), 2048, 3, True)
  assert found["reduce-scatter"][1:5] == ((large,), 2048, 1, True)
  gathered = (Array("bf16", (64, 128)), Array("f32", (512, 8)))
  assert found["all-gather"] == (
    "all-gather",
    gathered,
    2 * 64 * 128 + 4 * 512 * 8,
    1,
    True,
    "jit(f)/all_gather",
  )


def test_arrays_of_a_tpu_program():
  assert hlo.has_array_with_rows(TPU, 512)
  assert not hlo.has_array_with_rows(TPU, 513)
  assert [made.opcode for made in hlo.makers(TPU, 64)] == ["all-reduce", "all-gather-start"] + [
    "all-gather-done"
  ]


def test_a_limit_that_changes_is_unknown_and_counted_once():
  text = TPU.replace("tuple(%next, %permute-done, %limit)", "tuple(%next, %permute-done, %i)")
  program = parse(text)
  loop = program.computations["main.5_spmd"].instructions["loop"]
  assert trip_count(program, program.computations["main.5_spmd"], loop) is None
  assert executions(program)["body"] == (1, False)


def test_a_stated_trip_count_is_believed():
  stated = 'body=%body, backend_config={"known_trip_count":{"n":"11"}}'
  assert executions(parse(TPU.replace("body=%body", stated)))["body"] == (11, True)


@given(st.integers(-9, 9), st.integers(-9, 20), st.integers(1, 4), st.sampled_from("<>"))
def test_trips_are_those_of_the_loop(start, limit, step, sign):
  direction, change = ("LT", step) if sign == "<" else ("GT", -step)
  text = TPU.replace("direction=LT", f"direction={direction}")
  for name, value in (("one", start), ("seven", limit), ("two", change)):
    text = re.sub(rf"(%{name} = .*) constant\(\d\)", rf"\1 constant({value})", text)
  expected = len(range(start, limit, change))
  assert executions(parse(text))["body"] == (expected, True)


def test_nested_scans_on_cpu():
  def inner(x, _):
    return jnp.sin(x) @ x, None

  def outer(x, _):
    return jax.lax.scan(inner, x, None, length=5)[0], None

  lowered = jax.jit(lambda x: jax.lax.scan(outer, x, None, length=3)[0]).lower(jnp.zeros((4, 4)))
  _, text = hlo.compile_with_text(lowered)
  program = parse(text)
  times = executions(program)
  holding = {c.name for c, made in program.instructions() if made.opcode in ("dot", "custom-call")}
  assert {times[name].count for name in holding if name in times} == {15}


def test_shapes_and_element_sizes():
  assert arrays_of("(s8[3]{0}, (pred[], f8e4m3fn[2,5]{1,0:T(8,128)(4,1)S(1)}), token[])") == (
    Array("s8", (3,)),
    Array("pred", ()),
    Array("f8e4m3fn", (2, 5)),
    Array("token", ()),
  )
  sizes = {"pred": 8, "bf16": 16, "f32": 32, "s64": 64, "f8e4m3fn": 8, "f8e8m0fnu": 8, "u4": 4}
  assert {dtype: bits(dtype) for dtype in sizes} == sizes
  assert Array("u4", (3,)).bytes == 2
  assert Array("token", ()).bytes == 0


def test_text_that_is_no_program():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.collectives("nothing")
  with pytest.raises(ValueError, match=r"ends inside 'main.5_spmd'"):
    hlo.collectives(TPU[:-3])


@pytest.mark.parametrize("name", ["ConcatBitcast", "PrepareAsyncCallStart", "PrepareAsyncCallDone"])
def test_what_xla_does_not_know_gets_its_second_back(name):
  text = TPU.replace('"tpu_custom_call"', f'"{name}"')
  plain, corrected = (cost(made, Rates(1e12, 1e12)) for made in (TPU, text))
  assert corrected.missing_seconds == pytest.approx(plain.missing_seconds + 1)
  assert (plain.uncounted, corrected.uncounted) == (("kernel",), ())


def test_attention_kernels_count_the_causal_half():
  B, H, T, D, E = 2, 3, 256, 192, 128
  text = TPU.replace("%kernel = bf16[8,128]{1,0} custom-call(%y)", KERNEL)
  forward = cost(text, Rates(1e12, 1e12))
  assert forward.flops == 2 * B * H * T * T * (D + E) // 2
  assert kernels(text) == {"splash_mha_fwd_segmented_residuals": 1}


KERNEL = """%block = s8[1,32,32]{2,1,0} constant({...})
  %query = bf16[2,3,256,192]{3,2,1,0} constant({...})
  %value = bf16[2,3,256,128]{3,2,1,0} constant({...})
  %splash_mha_fwd_segmented_residuals.7 = bf16[2,3,256,128]{3,2,1,0} custom-call(%block, %query, \
%query, %value)"""
