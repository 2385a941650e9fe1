"""`python -m engram_jax plan`: the cost of a config, by arithmetic.

No array is made and jax is not imported, so that a model too large for this machine takes as long
as a small one. `--topology v5p:4x4x8` or `h100:2x8` divides it over a TPU slice or GPU nodes;
`--compile` with it asks their compiler instead (aot/report.py), which needs none of them.
`--no-code` stops the TPU compiler before it makes machine code, in a fraction of the time.
"""

import argparse
import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from engram_jax.aot.topology import Topology, topology
from engram_jax.cli import parse_config
from engram_jax.config import Config
from engram_jax.errors import ConfigError
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.model.counts import Counts, count, flops_per_token, table_layout

PAD_MULTIPLE = 1024  # as in memory/table.py, which imports jax; a test compares them
EFFORTS, DEFAULT_EFFORT = ("O0", "O1", "O2", "O3"), "O2"

SUMS = {
  "total_parameters": "one vocabulary matrix (the head), all blocks, the tables: the paper's total",
  "active_parameters": "what one token uses: no vocabulary matrix, chosen experts, its rows",
  "memory_parameters": "the tables, without pad rows",
  "all_parameters": "every stored parameter: the parts above",
}
BYTES = {
  "parameters": "float32, without tables",
  "gradients": "float32, without tables",
  "optimizer": "float32: momentum of matrices (Muon), two moments of the rest (Adam)",
  "tables": "in their own type, pad rows included; of tables on the host, one step's rows: at most",
  "table_gradients": "float32, of the rows one step touches: at most",
  "table_optimizer": "adam: two float32 moments and a count a row; adagrad: a number a row; "
  "sinkhorn: one moment in the table's type",
  "total": "without activations",
}
ON_HOST = {
  "tables": "in host memory, or in sparse files that grow as rows are written",
  "table_optimizer": "beside each row",
  "total": "at most: rows that nothing has written take no room",
}


def main(argv: Sequence[str]) -> int:
  """Parameters, FLOPs and bytes of a config, without making an array."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument("--json", action="store_true")
  parser.add_argument("--topology")
  parser.add_argument("--compile", action="store_true")
  parser.add_argument("--effort")
  parser.add_argument("--no-code", action="store_true")
  args, config_argv = parser.parse_known_args(argv)
  about = (
    "What a config would cost. --json prints one object on stdout instead of tables. --topology "
    "v5p:4x4x8 or h100:2x8 divides it over a TPU slice or GPU nodes; with --compile their compiler "
    "says what one device holds, sends and computes. --no-code ends the TPU's before it makes "
    "machine code, in a fraction of the time. --effort O0 to O3 is how hard that tries: O2, the "
    "default, as in training."
  )
  cfg = parse_config("python -m engram_jax plan", about, config_argv)
  if args.compile and args.topology is None:
    raise ConfigError("--compile needs --topology, the devices to compile for: v5p:4x4x8, h100:8")
  if not args.compile and (args.effort is not None or args.no_code):
    raise ConfigError("--effort and --no-code are the compiler's: they need --compile")
  if args.effort not in (None, *EFFORTS):
    raise ConfigError(f"--effort {args.effort!r} is none of {', '.join(EFFORTS)}")
  plan = make_plan(cfg)
  if args.topology is not None:
    target = topology(args.topology)
    if target.is_gpu and (args.effort is not None or args.no_code):
      raise ConfigError(f"--effort and --no-code are the TPU compiler's: {target.name} has none")
    if args.compile:
      plan |= compiled_plan(cfg, target, args.effort or DEFAULT_EFFORT, code=not args.no_code)
    else:
      plan |= divided_plan(cfg, target, plan["bytes"])
  if args.json:
    print(json.dumps(plan, indent=2))
  else:
    show(plan)
  return 0


def make_plan(cfg: Config) -> dict[str, Any]:
  """The plan of a config on no particular devices, as JSON values; all numbers are exact.

  Raises ConfigError for tables with more rows than int32 ids.
  """
  try:
    layout = table_layout(cfg.model)
  except ValueError as error:  # primes may add up to more rows than the config's check allows
    raise ConfigError(f"model.engram: {error}") from None
  counts = count(cfg.model, layout)
  forward = flops_per_token(cfg.model, cfg.data.sequence_length)
  tokens = cfg.train.batch_size * cfg.data.sequence_length
  return {
    "name": cfg.run.name,
    "parts": counts.parts,
    **{name: getattr(counts, name) for name in SUMS},
    "rows": {str(layer): n for layer, n in layout.rows.items()} if layout else {},
    "flops_per_token": forward,
    "training_flops_per_token": 3 * forward,
    "tokens_per_step": tokens,
    "steps": cfg.train.steps,
    "training_tokens": tokens * cfg.train.steps,
    "training_flops": 3 * forward * tokens * cfg.train.steps,
    **training_bytes(cfg, counts, layout),
  }


def training_bytes(
  cfg: Config, counts: Counts, layout: HashLayout | None
) -> dict[str, dict[str, int]]:
  """Bytes of the training state and gradients, in two parts.

  "bytes" are those over all devices, with the names of `BYTES`; "host_bytes", with those of
  `ON_HOST`, are for a placement that keeps tables off the devices, and empty for others.
  """
  engram = cfg.model.engram
  width, size = engram.row_width, 2 if engram.table_dtype == "bfloat16" else 4
  rows = list(layout.rows.values()) if layout else []
  padded = sum(-(-n // PAD_MULTIPLE) * PAD_MULTIPLE for n in rows)
  looked_up = cfg.train.batch_size * cfg.data.sequence_length * engram.hash_heads
  touched = sum(min(n, looked_up) for n in rows)
  backbone = counts.all_parameters - counts.tables
  adam = 2 * 4 * width + 4
  optimizer = {"adam": adam, "adam_catch_up": adam, "adagrad": 4, "sinkhorn": size * width}
  optimizer |= {"frozen": 0}
  per_row = {"tables": size * width, "table_optimizer": optimizer[cfg.train.optimizer.table]}
  full = {name: padded * n for name, n in per_row.items()}
  on_device = {name: touched * n for name, n in per_row.items()} if engram.on_host else full
  host = full | {"total": sum(full.values())} if engram.on_host else {}
  sizes = {
    "parameters": 4 * backbone,
    "gradients": 4 * backbone,
    "optimizer": 4 * (2 * backbone - counts.matrix_parameters),
    "tables": on_device["tables"],
    "table_gradients": 4 * touched * width,
    "table_optimizer": on_device["table_optimizer"],
  }
  return {"bytes": sizes | {"total": sum(sizes.values())}, "host_bytes": host}


def divided_plan(cfg: Config, target: Topology, sizes: dict[str, int]) -> dict[str, Any]:
  """The plan's part for one device of a slice: a lower bound of the bytes of its training state.

  Tables are divided over all axes of the mesh and the rest over all but `data`, as if everything
  divided evenly; activations are not counted.

  Raises ConfigError for a mesh or batch that does not divide.
  """
  mesh = cfg.mesh_sizes(target.devices)
  table_shards, other_shards = target.devices, math.prod(mesh.values()) // mesh["data"]
  per_device = {
    name: -(-total // (table_shards if name.startswith("table") else other_shards))
    for name, total in sizes.items()
    if name != "total"
  }
  return {
    "topology": target.name,
    "devices": target.devices,
    "mesh": mesh,
    "bytes_per_device": per_device | {"total": sum(per_device.values())},
    "hbm_bytes": target.generation.hbm_bytes,
  }


def compiled_plan(cfg: Config, target: Topology, effort: str, code: bool) -> dict[str, Any]:
  """The compiler's report of the train step on one device of a topology; see `compile_report`."""
  cfg.mesh_sizes(target.devices)
  os.environ["JAX_PLATFORMS"] = "cpu"  # a device of this machine may be in use by a training run
  from engram_jax.aot.report import compile_report, lower_train_step

  return compile_report(lower_train_step, cfg, target, effort, code)


def show(plan: dict[str, Any]) -> None:
  """Prints a plan as tables."""
  total = plan["all_parameters"]
  parts = [(_spaced(k), f"{n:,}", f"{n / total:.1%}") for k, n in plan["parts"].items()]
  _print_table(f"{plan['name']}: stored parameters", ("part", "parameters", "share"), parts)
  sums = [(_spaced(k), f"{plan[k]:,}", about) for k, about in SUMS.items()]
  _print_table("Sums", ("sum", "parameters", "holds"), sums)
  if plan["rows"]:
    rows = [(layer, f"{n:,}") for layer, n in plan["rows"].items()]
    _print_table("Tables", ("block", "rows"), rows)
  compute = [
    ("FLOP a token, forward", f"{plan['flops_per_token']:.4g}"),
    ("FLOP a token, training", f"{plan['training_flops_per_token']:.4g}"),
    ("tokens a step", f"{plan['tokens_per_step']:,}"),
    ("steps", f"{plan['steps']:,}"),
    ("tokens of the run", f"{plan['training_tokens']:,}"),
    ("FLOP of the run", f"{plan['training_flops']:.4g}"),
  ]
  _print_table("Compute (matrix products)", ("", "number"), compute)
  sizes = [(_spaced(k), decimal(n), BYTES[k]) for k, n in plan["bytes"].items()]
  _print_table("Memory in training, over all devices", ("what", "size", "holds"), sizes)
  if plan["host_bytes"]:
    sizes = [(_spaced(k), decimal(n), ON_HOST[k]) for k, n in plan["host_bytes"].items()]
    _print_table("Off the devices, on their host", ("what", "size", "holds"), sizes)
  if "topology" in plan:
    _show_device(plan)


def _show_device(plan: dict[str, Any]) -> None:
  """Prints the plan's part for one device of a topology."""
  sizes = [(_spaced(name), decimal(n)) for name, n in plan["bytes_per_device"].items()]
  sizes.append(("it has", decimal(plan["hbm_bytes"])))
  if "fits" in plan:
    sizes.append(("fits", "yes" if plan["fits"] else "no"))
  mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
  device = f"one of {plan['devices']} devices of {plan['topology']} ({mesh})"
  _print_table(f"Memory of {device}", ("what", "size"), sizes)
  if plan.get("collectives") is None:
    return
  sent = [(c["kind"], f"{c['count']:,}", decimal(c["bytes"])) for c in plan["collectives"]]
  _print_table("Collectives in a step, one device", ("kind", "executions", "bytes"), sent)
  step = [("FLOP a step", f"{plan['flops']:.4g}")]
  if "launches" in plan:  # the GPU compiler estimates no time
    step.append(("seconds a step, by the GPU's peaks", f"{plan['modelled_seconds']:.4g}"))
    step.append(("launches a step", f"{plan['launches']:,}"))
  else:
    step.append(("seconds a step, compiler's estimate", _seconds(plan["optimal_seconds"])))
    modelled = f"{plan['modelled_seconds']:.4g}"
    step.append(("the same, gathers as slow as their rows", modelled))
  step += [
    (
      f"seconds to {'compile' if plan['code'] else 'lay out'}"
      + (f", effort {plan['effort']}" if plan["effort"] else ""),
      f"{plan['compile_seconds']:.1f}",
    ),
    *((name, f"{count:,} calls") for name, count in plan["kernels"].items()),
  ]
  _print_table("A step, one device", ("", "number"), step)


def _print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
  table = Table(title=title, title_justify="left")
  for i, name in enumerate(columns):
    table.add_column(name, justify="right" if i == 1 else "left")
  for row in rows:
    table.add_row(*row)
  Console().print(table)


def _spaced(name: str) -> str:
  return name.replace("_", " ")


def _seconds(x: float | None) -> str:
  return "not known without code" if x is None else f"{x:.4g}"
