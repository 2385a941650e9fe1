"""`python -m engram_jax plan`: what a config would cost, by arithmetic.

No array is made and jax is not imported, so that a model too large for this machine, or for any,
takes as long as a small one.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from engram_jax.cli import parse_config
from engram_jax.config import Config
from engram_jax.errors import ConfigError
from engram_jax.memory.dialects import HashLayout
from engram_jax.model.counts import Counts, count, flops_per_token, table_layout

PAD_MULTIPLE = 1024  # as in memory/table.py, which imports jax; a test holds the two equal

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
  "tables": "float32, pad rows included",
  "table_gradients": "float32, of the rows one step touches: at most",
  "table_optimizer": "two float32 moments, and an int32 count a row",
  "total": "without activations",
}


def main(args: Sequence[str]) -> int:
  """Parameters, FLOPs and bytes of a config, without making an array."""
  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  first.add_argument("--json", action="store_true")
  own, rest = first.parse_known_args(args)
  about = "What a config would cost. --json prints one object on stdout instead of tables."
  plan = make_plan(parse_config("python -m engram_jax plan", about, rest))
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
    "bytes": training_bytes(cfg, counts, layout),
  }


def training_bytes(cfg: Config, counts: Counts, layout: HashLayout | None) -> dict[str, int]:
  """Bytes of the training state and gradients over all devices; keys and contents: `BYTES`."""
  engram = cfg.model.engram
  rows = list(layout.rows.values()) if layout else []
  padded = sum(-(-n // PAD_MULTIPLE) * PAD_MULTIPLE for n in rows)
  looked_up = cfg.train.batch_size * cfg.data.sequence_length * engram.columns
  touched = sum(min(n, looked_up) for n in rows)
  backbone = counts.all_parameters - counts.tables
  sizes = {
    "parameters": 4 * backbone,
    "gradients": 4 * backbone,
    "optimizer": 4 * (2 * backbone - counts.matrix_parameters),
    "tables": 4 * padded * engram.row_width,
    "table_gradients": 4 * touched * engram.row_width,
    "table_optimizer": 4 * padded * (2 * engram.row_width + 1),
  }
  return sizes | {"total": sum(sizes.values())}


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
