"""`python -m engram_jax convert KIND`: a run's tables and weights in other forms."""

import sys
from collections.abc import Callable, Sequence

from engram_jax.commands import (
  convert_export,
  convert_import,
  convert_memory,
  convert_rows,
  convert_table,
)

KINDS: dict[str, Callable[[Sequence[str]], int]] = {
  "table": convert_table.main,
  "verify": convert_table.verify,
  "export": convert_export.main,
  "import": convert_import.main,
  "memory": convert_memory.main,
  "rows": convert_rows.main,
}


def main(args: Sequence[str]) -> int:
  """Tables and weights in other forms: table files, and what else `convert --help` lists."""
  name = args[0] if args else "--help"
  if name in ("-h", "--help"):
    print(f"usage: python -m engram_jax convert KIND [--help] [OPTIONS]\n\n{__doc__}\n")
    for kind, function in KINDS.items():
      print(f"  {kind:14}{(function.__doc__ or '').splitlines()[0]}")
    return 0
  if name not in KINDS:
    print(f"error: cannot convert to {name!r}; there are: {', '.join(KINDS)}", file=sys.stderr)
    return 2
  return KINDS[name](args[1:])
