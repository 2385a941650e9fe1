"""`python -m engram_jax plan`: what a config would cost, by arithmetic.

No array is made and jax is not imported, so that a model too large for this machine, or for any,
takes as long as a small one. `--topology v5p:4x4x8` divides it over a TPU slice; `--compile` with
it asks the TPU compiler instead (commands/plan_compile.py), which needs no TPU. `--no-code` ends it
once all but the machine code is settled, in a fraction of the time.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
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

PAD_MULTIPLE = 1024  # as in memory/table.py, which imports jax; a test holds the two equal
EFFORTS, USUAL_EFFORT = ("O0", "O1", "O2", "O3"), "O2"

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


def main(args: Sequence[str]) -> int:
  """Parameters, FLOPs and bytes of a config, without making an array."""
  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  first.add_argument("--json", action="store_true")
  first.add_argument("--topology")
  first.add_argument("--compile", action="store_true")
  first.add_argument("--effort")
  first.add_argument("--no-code", action="store_true")
  own, rest = first.parse_known_args(args)
  about = (
    "What a config would cost. --json prints one object on stdout instead of tables. --topology "
    "v5p:4x4x8 divides it over a TPU slice; with --compile the TPU compiler says what one device "
    "holds, sends and computes. --no-code ends it before it makes machine code, in a fraction "
    "of the time. --effort O0 to O3 is how hard it tries: O2, the default, as in training."
  )
  cfg = parse_config("python -m engram_jax plan", about, rest)
  if own.compile and own.topology is None:
    raise ConfigError("--compile needs --topology, the devices to compile for: v5p:4x4x8")
  if not own.compile and (own.effort is not None or own.no_code):
    raise ConfigError("--effort and --no-code are the compiler's: they need --compile")
  if own.effort not in (None, *EFFORTS):
    raise ConfigError(f"--effort {own.effort!r} is none of {', '.join(EFFORTS)}")
  plan = make_plan(cfg)
  if own.topology is not None:
    wanted = topology(own.topology)
    if own.compile:
      plan |= compiled_plan(cfg, wanted, own.effort or USUAL_EFFORT, code=not own.no_code)
    else:
      plan |= divided_plan(cfg, wanted, plan["bytes"])
  if own.json:
    print(json.dumps(plan, indent=2))
  else:
    show(plan)
  return 0


def make_plan(cfg: Config) -> dict[str, Any]:
  """Everything the command reports, as one JSON-able object; numbers are exact, bytes are bytes.

  Raises ConfigError for tables that cannot be.
  """
  try:
    layout = table_layout(cfg.model)
  except ValueError as error:  # primes may add up to more rows than the config's own check allows
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
  """Bytes of the training state and gradients: `bytes` over all devices, contents as in `BYTES`,
  and `host_bytes`, as in `ON_HOST`, of a placement that keeps tables off them (else empty)."""
  engram = cfg.model.engram
  width, size = engram.row_width, 2 if engram.table_dtype == "bfloat16" else 4
  rows = list(layout.rows.values()) if layout else []
  padded = sum(-(-n // PAD_MULTIPLE) * PAD_MULTIPLE for n in rows)
  looked_up = cfg.train.batch_size * cfg.data.sequence_length * engram.hash_heads
  touched = sum(min(n, looked_up) for n in rows)
  backbone = counts.all_parameters - counts.tables
  adam = 2 * 4 * width + 4
  state = {"adam": adam, "adam_catch_up": adam, "adagrad": 4, "sinkhorn": size * width}
  row = {"tables": size * width, "table_optimizer": state[cfg.train.optimizer.table]}
  whole = {name: padded * each for name, each in row.items()}
  held = {name: touched * each for name, each in row.items()} if engram.on_host else whole
  host = whole | {"total": sum(whole.values())} if engram.on_host else {}
  sizes = {
    "parameters": 4 * backbone,
    "gradients": 4 * backbone,
    "optimizer": 4 * (2 * backbone - counts.matrix_parameters),
    "tables": held["tables"],
    "table_gradients": 4 * touched * width,
    "table_optimizer": held["table_optimizer"],
  }
  return {"bytes": sizes | {"total": sum(sizes.values())}, "host_bytes": host}


def divided_plan(cfg: Config, wanted: Topology, sizes: dict[str, int]) -> dict[str, Any]:
  """The state's bytes on one device of the slice, at least: tables over all axes of the mesh,
  the rest over all but `data`, as if everything divided evenly; no activations.

  Raises ConfigError for a mesh or batch that does not divide.
  """
  mesh = cfg.mesh_sizes(wanted.devices)
  parts = {"table": wanted.devices, "rest": math.prod(mesh.values()) // mesh["data"]}
  each = {
    name: -(-total // parts["table" if name.startswith("table") else "rest"])
    for name, total in sizes.items()
    if name != "total"
  }
  return {
    "topology": wanted.name,
    "devices": wanted.devices,
    "mesh": mesh,
    "bytes_per_device": each | {"total": sum(each.values())},
    "hbm_bytes": wanted.generation.hbm_bytes,
  }


def compiled_plan(cfg: Config, wanted: Topology, effort: str, code: bool) -> dict[str, Any]:
  """What the TPU compiler says of the real train step; see `compile_report`."""
  cfg.mesh_sizes(wanted.devices)
  os.environ["JAX_PLATFORMS"] = "cpu"  # a TPU that is here belongs to whoever trains on it
  from engram_jax.aot.report import compile_report, lower_train_step

  return compile_report(lower_train_step, cfg, wanted, effort, code)


def show(plan: dict[str, Any]) -> None:
  """The plan as tables on stdout."""
  console = Console()

  def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    made = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
      made.add_column(name, justify="right" if i == 1 else "left")
    for row in rows:
      made.add_row(*row)
    console.print(made)

  def named(name: str) -> str:
    return name.replace("_", " ")

  everything = plan["all_parameters"]
  parts = [(named(k), f"{n:,}", f"{n / everything:.1%}") for k, n in plan["parts"].items()]
  table(f"{plan['name']}: stored parameters", ("part", "parameters", "share"), parts)
  table(
    "Sums", ("sum", "parameters", "holds"), [(named(k), f"{plan[k]:,}", v) for k, v in SUMS.items()]
  )
  if plan["rows"]:
    rows = [(layer, f"{n:,}") for layer, n in plan["rows"].items()]
    table("Tables", ("block", "rows"), rows)
  compute = [
    ("FLOP a token, forward", f"{plan['flops_per_token']:.4g}"),
    ("FLOP a token, training", f"{plan['training_flops_per_token']:.4g}"),
    ("tokens a step", f"{plan['tokens_per_step']:,}"),
    ("steps", f"{plan['steps']:,}"),
    ("tokens of the run", f"{plan['training_tokens']:,}"),
    ("FLOP of the run", f"{plan['training_flops']:.4g}"),
  ]
  table("Compute (matrix products)", ("", "number"), compute)
  sizes = [(named(k), decimal(n), BYTES[k]) for k, n in plan["bytes"].items()]
  table("Memory in training, over all devices", ("what", "size", "holds"), sizes)
  if plan["host_bytes"]:
    sizes = [(named(k), decimal(n), ON_HOST[k]) for k, n in plan["host_bytes"].items()]
    table("Off the devices, on their host", ("what", "size", "holds"), sizes)
  if "topology" in plan:
    show_device(plan, table)


def show_device(plan: dict[str, Any], table: Callable[..., None]) -> None:
  """What one device of a topology holds and, if compiled, sends and computes."""
  sizes = [(name.replace("_", " "), decimal(n)) for name, n in plan["bytes_per_device"].items()]
  sizes.append(("it has", decimal(plan["hbm_bytes"])))
  if "fits" in plan:
    sizes.append(("fits", "yes" if plan["fits"] else "no"))
  mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
  where = f"one of {plan['devices']} devices of {plan['topology']} ({mesh})"
  table(f"Memory of {where}", ("what", "size"), sizes)
  if plan.get("collectives") is None:
    return
  moved = [(c["kind"], f"{c['count']:,}", decimal(c["bytes"])) for c in plan["collectives"]]
  table("Collectives in a step, one device", ("kind", "executions", "bytes"), moved)
  step = [
    ("FLOP a step", f"{plan['flops']:.4g}"),
    ("seconds a step, compiler's estimate", _number(plan["optimal_seconds"])),
    ("the same, gathers as slow as their rows", f"{plan['modelled_seconds']:.4g}"),
    (
      f"seconds to {'compile' if plan['code'] else 'lay out'}, effort {plan['effort']}",
      f"{plan['compile_seconds']:.1f}",
    ),
    *((name, f"{count:,} calls") for name, count in plan["kernels"].items()),
  ]
  table("A step, one device", ("", "number"), step)


def _number(x: float | None) -> str:
  return "not known without code" if x is None else f"{x:.4g}"
