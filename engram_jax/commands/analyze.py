"""`python -m engram_jax analyze KIND --run DIR`: numbers and pictures of what a memory does."""

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tyro

from engram_jax.analysis.gates import gates_html, gates_png
from engram_jax.cli import log, require_text, run_kind
from engram_jax.errors import ConfigError
from engram_jax.inference.completion import encode_prompts
from engram_jax.inference.decoder import Decoder
from engram_jax.inference.load import LoadedModel, PlacementArgs, load_model
from engram_jax.memory.token_text import token_texts


@dataclasses.dataclass(frozen=True)
class GatesArgs:
  """Options of `analyze gates`."""

  run: pathlib.Path
  """Folder of a run that train.py wrote."""
  text: str
  """Text whose tokens' gates are shown."""
  html: pathlib.Path | None = None
  """File to write, each token coloured by its gate."""
  png: pathlib.Path | None = None
  """File to write, the same as a picture; needs matplotlib (the extra `colab`)."""
  layer: int | None = None
  """Block whose memory is drawn; the first that has one if left out."""
  step: int | None = None
  """Checkpoint to use; the newest one that is sound if left out."""
  json: bool = False
  """One JSON object on stdout, everything else on stderr."""


def analyze_gates(argv: Sequence[str]) -> int:
  """Gates of each token of a text, the mean over branches, by layer."""
  prog = "python -m engram_jax analyze gates"
  args = tyro.cli(GatesArgs, prog=prog, args=argv, description=analyze_gates.__doc__)
  if args.png is not None and importlib.util.find_spec("matplotlib") is None:
    raise ConfigError("--png needs matplotlib: pip install 'engram_jax[colab]'")
  for path in (args.html, args.png):
    if path is not None and not path.absolute().parent.is_dir():
      raise ConfigError(f"{path}: there is no folder {path.absolute().parent}")
  require_text("--text", args.text)
  model = load_model(args.run, args.step, log)
  result = text_gates(model, args.text)
  layers = list(result["gates"])
  layer = layers[0] if args.layer is None else args.layer
  if layer not in layers:
    raise ConfigError(f"--layer {layer} has no memory: give one of {layers}")
  tokens, gates_T = result["tokens"], np.array(result["gates"][layer])
  if args.html is not None:
    args.html.write_text(gates_html(tokens, gates_T), encoding="utf-8")
  if args.png is not None:
    gates_png(tokens, gates_T, args.png)
  if args.json:
    print(json.dumps({"run": str(args.run), "step": model.step} | result))
  else:
    for token, *gates in zip(tokens, *result["gates"].values(), strict=True):
      print(f"{token!r:24}" + "".join(f"{gate:8.3f}" for gate in gates))
  return 0


def text_gates(model: LoadedModel, text: str) -> dict[str, Any]:
  """{"tokens": T strings, "gates": {layer: T floats}} of a text, the mean over branches.

  Raises ConfigError for a text without tokens and a model without a memory.
  """
  layers = model.weights.cfg.engram.layers
  if not layers:
    raise ConfigError("this run was trained without a memory: it has no gates")
  (ids,) = encode_prompts(model.tokenizer, [text])
  if not ids:
    raise ConfigError(f"--text {text!r} has no tokens: give some text")
  with contextlib.ExitStack() as stack:
    row_source = model.open_row_source(stack, PlacementArgs())
    decoder = Decoder(model.weights, row_source, len(ids))
    out = decoder.extend(decoder.empty_state(1), np.array([ids], np.int32), np.array([len(ids)]))
    means = [np.asarray(gate_BTG, np.float64)[0].mean(-1).tolist() for gate_BTG in out.gates]
  tokens = token_texts(model.tokenizer, ids)
  return {"tokens": tokens, "gates": dict(zip(layers, means, strict=True))}


KINDS: dict[str, Callable[[Sequence[str]], int]] = {"gates": analyze_gates}


def main(argv: Sequence[str]) -> int:
  """Runs an analysis of a run's memory; `analyze --help` lists the kinds."""
  return run_kind("analyze", KINDS, argv, about=__doc__, unknown="cannot analyze")
