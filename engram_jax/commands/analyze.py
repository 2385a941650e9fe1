"""`python -m engram_jax analyze KIND --run DIR`: numbers and pictures of what a memory does."""

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tyro

from engram_jax.analysis.gates import gates_html, gates_png
from engram_jax.errors import ConfigError
from engram_jax.inference.completion import encode
from engram_jax.inference.decoder import Decoder
from engram_jax.inference.load import LoadedModel, PlacementArgs, load_model


@dataclasses.dataclass(frozen=True)
class GatesArgs:
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


def gates(args: Sequence[str]) -> int:
  """Gates of each token of a text, the mean over branches, by layer."""
  own = tyro.cli(GatesArgs, prog="python -m engram_jax analyze gates", args=args)
  if own.png is not None and importlib.util.find_spec("matplotlib") is None:
    raise ConfigError("--png needs matplotlib: pip install 'engram_jax[colab]'")
  for path in (own.html, own.png):
    if path is not None and not path.absolute().parent.is_dir():
      raise ConfigError(f"{path}: there is no folder {path.absolute().parent}")
  model = load_model(own.run, own.step, lambda line: print(line, file=sys.stderr))
  result = text_gates(model, own.text)
  layers = list(result["gates"])
  layer = layers[0] if own.layer is None else own.layer
  if layer not in layers:
    raise ConfigError(f"--layer {layer} has no memory: give one of {layers}")
  pieces, drawn = result["tokens"], np.array(result["gates"][layer])
  if own.html is not None:
    own.html.write_text(gates_html(pieces, drawn), encoding="utf-8")
  if own.png is not None:
    gates_png(pieces, drawn, own.png)
  if own.json:
    print(json.dumps({"run": str(own.run), "step": model.step} | result))
  else:
    for piece, *each in zip(pieces, *result["gates"].values(), strict=True):
      print(f"{piece!r:24}" + "".join(f"{gate:8.3f}" for gate in each))
  return 0


def text_gates(model: LoadedModel, text: str) -> dict[str, Any]:
  """{"tokens": T strings, "gates": {layer: T floats}} of a text, the mean over branches.

  Raises ConfigError for a text without tokens and a model without a memory.
  """
  layers = model.weights.cfg.engram.layers
  if not layers:
    raise ConfigError("this run was trained without a memory: it has no gates")
  (ids,) = encode(model.tokenizer, [text])
  if not ids:
    raise ConfigError(f"--text {text!r} has no tokens: give some text")
  with contextlib.ExitStack() as stack:
    source = model.source(stack, PlacementArgs())
    decoder = Decoder(model.weights, source, len(ids))
    out = decoder.extend(decoder.empty(1), np.array([ids], np.int32), np.array([len(ids)]))
    means = [np.asarray(gate_BTG, np.float64)[0].mean(-1).tolist() for gate_BTG in out.gates]
  tokens = [model.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
  return {"tokens": tokens, "gates": dict(zip(layers, means, strict=True))}


KINDS: dict[str, Callable[[Sequence[str]], int]] = {"gates": gates}


def main(args: Sequence[str]) -> int:
  """Numbers and pictures of what a memory does: `analyze --help` lists the kinds."""
  name = args[0] if args else "--help"
  if name in ("-h", "--help"):
    print(f"usage: python -m engram_jax analyze KIND [--help] [OPTIONS]\n\n{__doc__}\n")
    for kind, function in KINDS.items():
      print(f"  {kind:14}{(function.__doc__ or '').splitlines()[0]}")
    return 0
  if name not in KINDS:
    print(f"error: cannot analyze {name!r}; there are: {', '.join(KINDS)}", file=sys.stderr)
    return 2
  return KINDS[name](args[1:])
