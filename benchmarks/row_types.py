"""The cost of smaller rows: validation loss of a run with its tables in other encodings.

    python train.py
    python benchmarks/row_types.py --run runs/tiny [--batches N] [--json]

The model and the text stay; only the rows that the model is given pass through an encoding
(memory/codecs.py) and back. `off` gives it zeros. All of the validation text by default, so the
differences between encodings are exact for this run, not estimates.
"""

import argparse
import contextlib
import itertools
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np

from engram_jax.inference.load import LoadedModel, load_model
from engram_jax.memory.codecs import KINDS, decode, encode, row_bytes
from engram_jax.tables.state import TableState
from engram_jax.training.evaluate import evaluate, make_eval_step
from engram_jax.training.state import make_setup

BLOCK = 65_536  # rows encoded at once


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--run", type=pathlib.Path, required=True, help="a folder train.py wrote")
  parser.add_argument("--batches", type=int, help="validation batches to read; all if left out")
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  args = parser.parse_args()
  say = lambda text: print(text, file=sys.stderr)
  opened = load_model(args.run, None, say)
  found = measure(opened, args.batches)
  base, width = found["f32"], opened.config.model.engram.row_width
  say(f"{'rows':10}{'bytes a row':>12}{'loss':>10}{'more than f32':>16}")
  for name, loss in found.items():
    size = "" if name == "off" else row_bytes(name, width)
    say(f"{name:10}{size:>12}{loss:10.5f}{loss - base:16.6f}")
  if args.json:
    print(json.dumps({"run": str(args.run), "step": opened.step, "loss": found}))


def measure(opened: LoadedModel, batches: int | None) -> dict[str, float]:
  """{encoding: mean loss in nats a token}, and "off"."""
  data = opened.data()
  setup = make_setup(opened.config, data.vocabulary.layout)
  step, layers, tables, found = make_eval_step(setup), setup.tables.layers, opened.tables(), {}
  for name in (*KINDS, "off"):
    given = tables if name == "off" else [through(table, name) for table in tables]
    state = argparse.Namespace(
      params=opened.weights.params,
      biases=opened.weights.biases,
      tables=TableState(dict(zip(layers, map(jnp.array, given), strict=True)), {}),
    )
    with contextlib.closing(data.validation_pipeline().iterate()) as windows:
      some = itertools.islice(windows, batches)
      found[name] = evaluate(
        step, setup, state, some, data.token_bytes, data.source_names, memory=name != "off"
      )["loss"]
  return found


def through(table_RC: np.ndarray, kind: str) -> np.ndarray:
  """The table as it comes back from an encoding, float32."""
  parts = [table_RC[i : i + BLOCK].astype(np.float32) for i in range(0, len(table_RC), BLOCK)]
  return np.concatenate([decode(*encode(part, kind), kind) for part in parts])


if __name__ == "__main__":
  main()
