"""`plan --topology NAME --compile`: the real train step, compiled for a TPU slice or GPU nodes.

The report is of one device: memory, communication, FLOPs, the compiler's estimate of the time.
"""

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.aot.buffers import compile_to_buffer_assignment
from engram_jax.aot.collectives import Collective, collectives, compile_with_text
from engram_jax.aot.hlo_cost import Rates, cost, kernels, launches
from engram_jax.aot.topology import Topology, abstract_devices
from engram_jax.config import Config
from engram_jax.core.mesh import BATCH_AXES, make_mesh
from engram_jax.errors import ConfigError
from engram_jax.model.counts import table_layout
from engram_jax.training.state import make_setup, state_shapes
from engram_jax.training.step import make_train_step

Lower = Callable[[Config, jax.sharding.Mesh], jax.stages.Lowered]

# Compile a program that does not fit all the same, where the compiler can: not past some sizes.
OVERSIZED = {"xla_tpu_no_crash_on_oom": True}


def compile_report(
  lower: Lower,
  cfg: Config,
  target: Topology,
  effort: str = "O2",
  code: bool = True,
) -> dict[str, Any]:
  """Compiles `lower(cfg, mesh)` for the topology and returns the report, JSON values.

  effort: XLA's optimization level, "O0" to "O3"; O2 is its default, which a training run compiles
  with. Lower ones leave out passes over the program: it computes the same, in other buffers and in
  another order, so memory and time are those of that program.

  All numbers are of one device and one step. `flops` and the seconds count the trips of loops.
  `optimal_seconds` is XLA's: each instruction as slow as its FLOPs or its memory traffic, one after
  the other; the interconnect is not in it, and a gather is as slow as reading its whole table.
  `modelled_seconds` is the same with gathers as slow as their rows. `collectives` sums, by kind,
  executions and bytes (`aot.collectives.Collective`); `uncertain` of them stand in a loop whose
  trip count depends on data (counted once) or in a branch. `uncounted_kernels` are in no FLOPs.

  code: False ends the compiler once the program is optimised and laid out in memory, before its
  machine code, which takes most of the time: then `optimal_seconds` is null and the program's own
  bytes are in no total. `lower` must then be a function of a module.

  On GPUs, whose compiler has no such options and no estimate, `effort` is null, code is always made
  and `optimal_seconds` is null; `launches` counts what a step launches on one.

  Of a program that does not fit and that the compiler gives up on, `bytes_per_device` has only the
  `total` that it would need, and the rest is null.

  Raises ConfigError for a mesh or batch that does not divide, before anything is lowered.
  """
  sizes = cfg.mesh_sizes(target.devices)
  begin = time.perf_counter()
  options = {} if target.is_gpu else {"xla_optimization_level": f"EFFORT_{effort}"}
  make_report = compiled_report if code else layout_report
  found = make_report(lower, cfg, target, options)
  hbm = target.generation.hbm_bytes
  return {
    "topology": target.name,
    "devices": target.devices,
    "mesh": sizes,
    "hbm_bytes": hbm,
    "fits": found["bytes_per_device"]["total"] <= hbm,
    **found,
    "peak_flops_per_second": target.generation.peak_flops,
    "effort": None if target.is_gpu else effort,
    "code": code,
    "compile_seconds": time.perf_counter() - begin,
  }


def compiled_report(
  lower: Lower, cfg: Config, target: Topology, options: Mapping[str, Any]
) -> dict[str, Any]:
  """The report of a complete compilation."""
  lowered, rates = lower_on(lower, cfg, target), target.generation.rates
  if target.is_gpu:
    compiled = lowered.compile()
    text = compiled.as_text() or ""
    sizes = {"bytes_per_device": bytes_per_device(compiled)}
    return sizes | text_report(text, rates) | {"launches": launches(text)}
  try:
    return program_report(*compile_with_text(lowered, options), rates)
  except jax.errors.JaxRuntimeError as error:
    return oversized_report(lowered, error, options, rates)


def layout_report(
  lower: Lower, cfg: Config, target: Topology, options: Mapping[str, Any]
) -> dict[str, Any]:
  """The report of a compilation that stops before machine code."""
  text, sizes = compile_to_buffer_assignment(
    lower_on, (lower, cfg, target), {**options, **OVERSIZED}
  )
  total = sum(sizes.values()) - 2 * sizes["donated"]
  return {
    "bytes_per_device": sizes | {"total": total},
    **text_report(text, target.generation.rates),
  }


def lower_on(lower: Lower, cfg: Config, target: Topology) -> jax.stages.Lowered:
  """`lower(cfg, mesh)` on the topology's devices."""
  return lower(cfg, make_mesh(cfg.mesh_sizes(target.devices), abstract_devices(target)))


def program_report(compiled: jax.stages.Compiled, text: str, rates: Rates) -> dict[str, Any]:
  """The part of the report that a compiled program gives."""
  optimal = (compiled.cost_analysis() or {}).get("optimal_seconds", 0.0)
  return {
    "bytes_per_device": bytes_per_device(compiled),
    **text_report(text, rates),
    "optimal_seconds": optimal + cost(text, rates).missing_seconds,
  }


def text_report(text: str, rates: Rates) -> dict[str, Any]:
  """The part of the report that its text gives; `optimal_seconds`, which is not in it, is null."""
  spent = cost(text, rates)
  return {
    "collectives": sum_by_kind(collectives(text)),
    "flops": spent.flops,
    "optimal_seconds": None,
    "modelled_seconds": spent.modelled_seconds,
    "kernels": kernels(text),
    "uncounted_kernels": list(spent.uncounted),
  }


def oversized_report(
  lowered: jax.stages.Lowered,
  refusal: jax.errors.JaxRuntimeError,
  options: Mapping[str, Any],
  rates: Rates,
) -> dict[str, Any]:
  """The report of a program that was refused for its size; raises any other refusal again."""
  words = r"(?:CompileTimeHbmOom|Ran out of memory on HBM)"  # libtpu 0.0.52 and 0.0.42
  needs = re.search(words + r".* memory required .*?\(([\d.]+)([KMG])\)", str(refusal))
  if needs is None:
    raise refusal
  try:
    return program_report(*compile_with_text(lowered, {**options, **OVERSIZED}), rates)
  except jax.errors.JaxRuntimeError:
    total = int(float(needs[1]) * 1024 ** " KMG".index(needs[2]))
    rest = ("collectives", "flops", "optimal_seconds", "modelled_seconds", "kernels")
    return {"bytes_per_device": {"total": total}, **dict.fromkeys((*rest, "uncounted_kernels"))}


def bytes_per_device(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Bytes of one device by kind; donated arguments are outputs too and count once in the total."""
  memory = compiled.memory_analysis()
  assert memory is not None
  sizes = {
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "output": memory.output_size_in_bytes,
    "donated": memory.alias_size_in_bytes,
    "program": memory.generated_code_size_in_bytes,
  }
  return sizes | {"total": sum(sizes.values()) - 2 * sizes["donated"]}


def sum_by_kind(found: list[Collective]) -> list[dict[str, Any]]:
  """One line a kind, most bytes first: executions and bytes of one device in one step."""
  lines: dict[str, dict[str, Any]] = {}
  for one in found:
    line = lines.setdefault(one.kind, {"kind": one.kind, "count": 0, "bytes": 0, "uncertain": 0})
    line["count"] += one.count
    line["bytes"] += one.count * one.bytes
    line["uncertain"] += not one.is_exact
  return sorted(lines.values(), key=lambda line: -line["bytes"])


def lower_train_step(cfg: Config, mesh: Mesh) -> jax.stages.Lowered:
  """Lowers the step of `cfg` for the devices of `mesh`; no array is made."""
  if cfg.model.engram.on_host:
    raise ConfigError(
      f"model.engram.placement={cfg.model.engram.placement!r}: a step is compiled ahead only for "
      "tables on the devices; give placement=device"
    )
  layout = table_layout(cfg.model)
  setup = make_setup(cfg, layout, mesh)
  step: Any = make_train_step(setup)  # a jitted function, since the tables are on the devices
  return step.lower(state_shapes(setup), batch_shapes(cfg, mesh))


def batch_shapes(cfg: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch as the pipeline makes it, as jax.ShapeDtypeStructs sharded over the mesh."""
  B, T, engram = cfg.train.batch_size, cfg.data.sequence_length, cfg.model.engram
  sharding = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  token = lambda dtype: jax.ShapeDtypeStruct((B, T), dtype, sharding=sharding(BATCH_AXES))
  names = ("tokens", "targets", "segments", "positions", "source")
  batch = {name: token("int32") for name in names} | {"mask": token("bool")}
  if engram.layers:
    shape = (len(engram.layers), B, T, engram.hash_heads)
    batch["row_ids"] = jax.ShapeDtypeStruct(shape, "int32", sharding=sharding(None, BATCH_AXES))
  return batch
