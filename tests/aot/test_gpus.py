"""GPU nodes by name, what their kernels cost, and a train step compiled for GPUs not here."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from engram_jax.aot import gpu_kernels, gpus
from engram_jax.aot.hlo_cost import Rates, cost, kernels, launches
from engram_jax.aot.hlo_text import parse
from engram_jax.aot.topology import abstract_devices, topology
from engram_jax.commands.plan import main
from engram_jax.errors import ConfigError

needs_compiler = pytest.mark.skipif(
  not (
    importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")
  ),
  reason="needs the GPU compiler: the extra `gpu-aot`",
)


@pytest.mark.parametrize(
  ("name", "devices"), [("h100:8", 8), ("h100:2x8", 16), ("l4:1", 1), ("b200:16x8", 128)]
)
def test_a_name_says_how_many(name, devices):
  found = topology(name)
  assert (found.devices, found.is_gpu) == (devices, True)
  assert found.generation == gpus.GPUS[name.partition(":")[0]]
  assert not topology("v5p:2x2x1").is_gpu


@pytest.mark.parametrize("name", ["h100", "h100:", "h100:0", "h100:2x2x8", "h900:8", "h100:8x"])
def test_an_unknown_name_lists_the_known_ones(name):
  with pytest.raises(ConfigError, match=r"\{a100,l4,h100,h200,b200\}:GPUS or :HOSTSxGPUS"):
    topology(name)


@pytest.mark.parametrize("option", [("--no-code",), ("--effort", "O1")])
def test_options_of_the_tpu_compiler_are_refused(option):
  with pytest.raises(ConfigError, match="the TPU compiler's: h100:8 has none"):
    main(["--topology", "h100:8", "--compile", *option])


def test_a_state_is_divided_over_gpus_without_a_compiler(capsys):
  assert main(["--config", "configs/engram_27b.yaml", "--topology", "h100:8x8", "--json"]) == 0
  plan = json.loads(capsys.readouterr().out)
  assert (plan["devices"], plan["hbm_bytes"]) == (64, 84942979072)
  assert plan["mesh"]["fsdp"] == 64


def test_without_the_compiler_the_message_says_what_to_install(monkeypatch):
  def missing(**_):
    raise NotImplementedError("cuda")

  monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
  with pytest.raises(ConfigError, match=r"pip install 'engram_jax\[gpu-aot\]'"):
    abstract_devices(topology("h100:8"))


# As XLA's GPU compiler writes them, cut.
KERNELS = """
HloModule step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %neg = f32[8]{0} negate(%p)
}

ENTRY %main (s: s32[247], x: bf16[24576,2560]) -> f32[8] {
  %s = s32[247]{0} parameter(0)
  %x = bf16[24576,2560]{1,0} parameter(1)
  %w = bf16[55,2560,1536]{2,1,0} parameter(2)
  %q = bf16[1,4096,32,192]{3,2,1,0} parameter(3)
  %m = bf16[1,1,4096,4096]{3,2,1,0} parameter(4)
  %v = f32[8]{0} parameter(5)
  %y = bf16[24576,1536]{1,0} custom-call(%s, %s, %s, %x, %w), \
custom_call_target="__gpu$xla.gpu.triton", backend_config={grid_x = 12 : i32, \
name = "grouped_product", num_warps = 8 : i32}
  %dw = bf16[55,2560,1536]{2,1,0} custom-call(%s, %s, %x, %y), \
custom_call_target="__gpu$xla.gpu.triton", backend_config={name = "grouped_product_gradient"}
  %other = f32[8]{0} custom-call(%v), custom_call_target="__gpu$xla.gpu.triton", \
backend_config={name = "another"}
  %a = (bf16[1,32,4096,192]{3,1,2,0}, f32[1,32,4096]{2,1,0}, u8[0]{0}) \
custom-call(%q, %q, %q, %m), custom_call_target="__cudnn$fmhaScaleBiasSoftmax", \
operand_layout_constraints={bf16[1,4096,32,192]{3,2,1,0}, bf16[1,4096,32,192]{3,2,1,0}}, \
backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": \
"BF16", "dimensions": ["1", "32", "4096", "4096"]}, "mask_type": "CAUSAL"}}
  ROOT %f = f32[8]{0} fusion(%v), kind=kLoop, calls=%fused
}
"""


def test_kernels_of_gpus_are_counted_by_their_shapes():
  product = 2 * 24576 * 2560 * 1536
  attention = 2 * 2 * 32 * 4096 * 4096 * 192 // 2  # scores and values, the causal half
  program = parse(KERNELS)
  found = {
    gpu_kernels.name(made): gpu_kernels.kernel_flops(computation, made)
    for computation, made in program.instructions()
    if gpu_kernels.target(made)
  }
  assert found == {
    "grouped_product": product,
    "grouped_product_gradient": product,
    "another": 0,
    "cudnn$fmhaScaleBiasSoftmax": attention,
  }
  spent = cost(KERNELS, Rates(1e15, 1e12))
  assert spent.flops == 2 * product + attention
  assert spent.uncounted == ("another",)
  assert kernels(KERNELS) == dict.fromkeys(sorted(found), 1)
  assert launches(KERNELS) == 5  # four kernels and a fusion


SMALL = {
  "model.layers": 2,
  "model.width": 128,
  "model.moe.expert_width": 128,
  "model.attention.kernel": "flash",
  "model.residual.branches": 1,
  "mesh.fsdp": 2,
}
# The compiler ends the process where a check of its own fails: a process of its own.
COMPILE = f"""
import json
from engram_jax.aot.report import compile_report, lower_train_step
from engram_jax.aot.topology import topology
from engram_jax.config import load_config
cfg = load_config("configs/tiny.yaml", {SMALL!r})
print(json.dumps(compile_report(lower_train_step, cfg, topology("h100:2"))))
"""


@needs_compiler
@pytest.mark.slow  # a compilation of a minute
def test_the_train_step_for_two_h100():
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.strip().split("\n")[-1])
  assert found["uncounted_kernels"] == []
  calls = found["kernels"]
  layers = 2  # of them one is dense: three products, forward, and again backward
  assert calls["cudnn$fmhaScaleBiasSoftmaxBackward"] == layers
  assert calls["grouped_product_gradient"] == calls["grouped_product_transposed"] == 3
  assert calls["grouped_product"] >= 3
  assert found["bytes_per_device"]["donated"] > 0.99 * found["bytes_per_device"]["output"]
  assert found["launches"] < 2000
  assert {line["kind"] for line in found["collectives"]} >= {"all-gather"}
