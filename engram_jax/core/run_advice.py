"""Advice on a folder that was given as a run and is none: what it seems to be, what to give.

Without jax, so that the command line can import it.
"""

import json
import pathlib

from engram_jax.config.bounded import PointerError, read_bounded, shorten

CONFIG, TOKENIZER = "config.yaml", "tokenizer.json"  # of a run
MODEL_CONFIG, EXPORT = "config.json", "engram_jax"  # of an export: its file, its model_type there


def advise(path: pathlib.Path) -> str:
  """Says what a folder that is no run seems to be, and what to give instead."""
  try:
    if not path.exists():
      return "no such folder; give one that train.py wrote"
    if not path.is_dir():
      return "it is a file; give a folder that train.py wrote"
    around = next((p for p in path.absolute().parents[:3] if (p / CONFIG).is_file()), None)
    inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
    names = [p.name for p in path.iterdir()]
  except OSError as error:
    return f"the folder cannot be read: {error.strerror}"
  if MODEL_CONFIG in names or any(name.endswith(".safetensors") for name in names):
    return _advise_model(path)
  if around is not None:
    return f"it lies in the run {around}: give that folder"
  if inside:
    more = ", ..." if len(inside) > 5 else ""
    return f"it holds runs: give one of {', '.join(inside[:5])}{more} in it"
  return "give a folder that train.py wrote"


def _advise_model(path: pathlib.Path) -> str:
  """Advice about a folder of safetensors: an export becomes a run, others are inspected."""
  try:
    tree = json.loads(read_bounded(path / MODEL_CONFIG, 1 << 20))
  except PointerError as error:
    return f"its {MODEL_CONFIG} {error}"
  except (OSError, ValueError, RecursionError):
    tree = None
  kind = tree.get("model_type") if isinstance(tree, dict) else None
  command = f"python -m engram_jax convert import --from {path} --run runs/NAME"
  if kind == EXPORT:
    return f"it is an export, of which `{command}` makes a run: give that one"
  what = f"a model folder (model_type {shorten(kind)})" if kind else "a model folder"
  return (
    f"it is {what}, not a run; `convert import` makes a run of what `convert export` wrote, and of "
    f"nothing else; `python -m engram_jax inspect --checkpoint {path}` reads released memories"
  )
