"""`python -m engram_jax inspect`: a checkpoint's memory described, and its rows for a text.

The checkpoint is an exported run, DeepSeek-V4.1's or Qwen3.8-Flash-Next's. Its hash constants are
rebuilt and compared with what it says before anything is printed; of the tables only the rows of
the text are read.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engram_jax.cli import log, require_text
from engram_jax.interop.reader import MemoryReader


@dataclasses.dataclass(frozen=True)
class InspectArgs:
  """Options of `inspect`."""

  checkpoint: pathlib.Path
  """Folder with config.json, tokenizer.json and safetensors files."""
  text: str | None = None
  """Text to look up; without it only the memory is described."""
  special_tokens: bool = False
  """Add those that the tokenizer puts around a text."""
  verify: bool = True
  """Compare files that are read with the folder's SHA256SUMS; --no-verify trusts them."""
  json: bool = False
  """One JSON object on stdout."""


def main(argv: Sequence[str]) -> int:
  """Describes a checkpoint's memory, and shows the rows that it holds for a text."""
  args = tyro.cli(InspectArgs, prog="python -m engram_jax inspect", args=argv, description=__doc__)
  if args.text is not None:
    require_text("--text", args.text)
  with MemoryReader(args.checkpoint, verify=args.verify) as reader:
    if reader.caveat:
      log(reader.caveat)
    result = {"checkpoint": str(args.checkpoint)} | describe(reader)
    if args.text is not None:
      result |= look_up(reader, args.text, args.special_tokens)
    result["bytes_read"] = reader.bytes_read
  if args.json:
    print(json.dumps(result))
  else:
    show(result)
  return 0


def describe(reader: MemoryReader) -> dict[str, Any]:
  """The memory's sizes and constants, as JSON values; multipliers are strings (above 2^53)."""
  memory, layout = reader.memory, reader.memory.layout
  return {
    "kind": memory.kind,
    "layers": list(layout.layers),
    "orders": list(range(2, layout.max_ngram + 1)),
    "heads": layout.heads,
    "row_width": memory.cfg.row_width,
    "width": memory.width,
    "branches": memory.branches,
    "token_ids": int(memory.compressor.table.size),
    "canonical_ids": memory.compressor.size,
    "rows": {str(layer): n for layer, n in layout.rows.items()},
    "multipliers": {str(layer): list(map(str, m)) for layer, m in layout.multipliers.items()},
    "token_map_digest": memory.compressor.digest,
    "hash_layout_digest": layout.digest,
  }


def look_up(reader: MemoryReader, text: str, special_tokens: bool) -> dict[str, Any]:
  """Tokens of a text, and by layer the row ids [T, J] and the rows' Euclidean norms [T, J]."""
  reading = reader.read(text, special_tokens)
  norms = {
    layer: np.linalg.norm(reader.rows(layer, ids), axis=-1)
    for layer, ids in reading.row_ids.items()
  }
  return {
    "text": text,
    "tokens": [
      {"id": i, "text": token, "canonical": int(canonical)}
      for i, token, canonical in zip(
        reading.token_ids, reading.tokens, reading.canonical_ids, strict=True
      )
    ],
    "row_ids": {str(layer): ids.tolist() for layer, ids in reading.row_ids.items()},
    "row_norms": {str(layer): _json_numbers(norm_TJ) for layer, norm_TJ in norms.items()},
  }


def _json_numbers(norm_TJ: np.ndarray) -> list[list[float | None]]:
  """Numbers as JSON values, which have no NaN or infinity: null stands for those."""
  return [[x if math.isfinite(x) else None for x in norms] for norms in norm_TJ.tolist()]


def show(result: dict[str, Any]) -> None:
  """Prints the result; of a token's rows, by order, the first id and the mean of the norms."""
  print(
    f"{result['checkpoint']}: {result['kind']}, orders {result['orders']} x {result['heads']} "
    f"heads x {result['row_width']}, {result['branches']} branches of width {result['width']}"
  )
  ids, canonical = result["token_ids"], result["canonical_ids"]
  digest = result["hash_layout_digest"][:12]
  print(f"{ids:,} token ids, {canonical:,} canonical; hash {digest}")
  for layer, rows in result["rows"].items():
    multipliers = " ".join(result["multipliers"][layer])
    print(f"block {layer}: {rows:,} rows; multipliers {multipliers}")
  for layer, ids_TJ in result.get("row_ids", {}).items():
    Console().print(_table(result, layer, ids_TJ))
  print(f"{result['bytes_read']:,} bytes read")


def _table(result: dict[str, Any], layer: str, ids_TJ: list[list[int]]) -> Table:
  title = f"block {layer}: canonical id; first row id and mean norm of each order"
  table = Table(title=title, title_justify="left")
  for name in ("token", "id", *(f"order {n}" for n in result["orders"])):
    table.add_column(name, justify="left" if name == "token" else "right")
  heads = result["heads"]
  for token, ids, norms in zip(result["tokens"], ids_TJ, result["row_norms"][layer], strict=True):
    starts = range(0, len(ids), heads)
    cells = [f"{ids[j]} {np.mean(np.array(norms[j : j + heads], float)):.3f}" for j in starts]
    table.add_row(Text(repr(token["text"])), f"{token['canonical']:,}", *cells)
  return table
