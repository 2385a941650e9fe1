"""Our own runs as a checkpoint folder.

config.json holds the run's resolved config and what its numbers mean (tokenizer, token map and hash
layout); tensors are named after the paths of the training state, with dots:

    params.blocks.1.engram.w_key, ...   biases.blocks.1.moe.bias, ...   as in the checkpoint
    tables.{l}.weight                   [R, C]: block l's rows, without padding

Optimizer state stays behind.
"""

import functools
import json
from typing import Any

import numpy as np

from engram_jax.config import Config, EngramConfig, build
from engram_jax.errors import ConfigError
from engram_jax.interop.folder import CONFIG, Folder
from engram_jax.interop.memory import Memory, Table, require_equal
from engram_jax.memory.compress import TokenCompressor, tokenizer_digest
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.vocabulary import Vocabulary

KIND = "engram_jax"
FORMAT = 1
MAX_STEP = 2**31 - 1  # a state counts in int32
DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def matches(config: dict) -> bool:
  """Whether a config.json is of this layout."""
  return config.get("model_type") == KIND


def description(cfg: Config, step: int, meaning: dict[str, Any]) -> dict[str, Any]:
  """The config.json of a run after `step` steps; `meaning` is its checkpoint's meta."""
  return {
    "model_type": KIND,
    "format": FORMAT,
    "step": step,
    "config": cfg.model_dump(mode="json"),
    "meaning": meaning,
  }


def table_name(layer: int) -> str:
  """The tensor of block `layer`'s rows."""
  return f"tables.{layer}.weight"


def tensor_name(path: str) -> str:
  """The tensor of a leaf of the training state, by its path there ("params/embedding")."""
  return path.replace("/", ".")


def read_config(folder: Folder) -> tuple[Config, int, dict[str, Any]]:
  """(config, step, meaning) of a folder that `description` described. ConfigError otherwise."""
  tree, where = folder.config, folder.path / CONFIG
  kinds = {"format": int, "step": int, "config": dict, "meaning": dict}
  for name, kind in kinds.items():
    if type(tree.get(name)) is not kind:
      raise ConfigError(f"{where}: {name} is {tree.get(name)!r}: expected {kind.__name__}")
  if tree["format"] != FORMAT or tree["step"] < 0:
    raise ConfigError(
      f"{where}: format {tree['format']}, step {tree['step']}: this version reads format {FORMAT}"
    )
  cfg, step = build(tree["config"], f"{where}: config"), tree["step"]
  if not step <= min(cfg.train.steps, MAX_STEP):
    raise ConfigError(
      f"{where}: step is {step}: its train.steps is {cfg.train.steps}, and {MAX_STEP} the most"
    )
  if cfg.model.layers > len(folder.names):  # each block has tensors: before any is looked for
    raise ConfigError(
      f"{where}: model.layers is {cfg.model.layers}, but there are {len(folder.names)} tensors"
    )
  stored = tree["meaning"].get("hash_layout")
  if not isinstance(stored, dict | None):
    raise ConfigError(f"{where}: meaning.hash_layout is {stored!r}: expected an object or null")
  try:
    json.dumps(tree["meaning"], allow_nan=False)
  except ValueError as error:
    raise ConfigError(f"{where}: meaning cannot be kept: {error}") from None
  return cfg, step, tree["meaning"]


def verified_layout(
  folder: Folder, cfg: Config, meaning: dict[str, Any]
) -> tuple[TokenCompressor, HashLayout | None]:
  """Token map and hash layout, rebuilt from the folder's own tokenizer and config.

  Raises ConfigError, with both values, where one is not what the run was trained with.
  """
  tokenizer = folder.tokenizer(cfg.model.vocab_size)
  digest = tokenizer_digest(tokenizer)
  require_equal(folder.path, "tokenizer_digest", meaning.get("tokenizer_digest"), digest)
  try:
    vocabulary = Vocabulary.build(cfg.model, tokenizer)
  except ConfigError as error:
    raise ConfigError(f"{folder.path}: {error}") from None
  compressor, layout = vocabulary.compressor, vocabulary.layout
  require_equal(folder.path, "token_map_digest", meaning.get("token_map_digest"), compressor.digest)
  if layout is None:
    require_equal(folder.path, "hash_layout", meaning.get("hash_layout"), None)
    return compressor, None
  rebuilt, stored = layout.describe(), meaning.get("hash_layout") or {}
  for name, value in rebuilt.items():
    require_equal(folder.path, f"hash_layout.{name}", stored.get(name), value)
  digest = meaning.get("hash_layout_digest")
  require_equal(folder.path, "hash_layout_digest", digest, layout.digest)
  return compressor, layout


def check_tables(folder: Folder, engram: EngramConfig, layout: HashLayout | None) -> None:
  """ConfigError unless every table has as many rows as its primes add up to."""
  for layer in engram.layers:
    shape = (layout.rows[layer], engram.row_width)
    folder.check(table_name(layer), DTYPES[engram.table_dtype], shape)


def open_memory(folder: Folder) -> Memory:
  """The memory of an exported run, once everything that can be rebuilt was found equal.

  Raises ConfigError, with both values, for another tokenizer, hash constants, row counts or a
  tensor of another shape or dtype, and for a run without a memory.
  """
  cfg, _, meaning = read_config(folder)
  engram = cfg.model.engram
  compressor, layout = verified_layout(folder, cfg, meaning)
  if layout is None:
    raise ConfigError(f"{folder.path} has no memory: model.engram.layers is empty")
  check_tables(folder, engram, layout)
  D, G = cfg.model.width, cfg.model.residual.branches
  shapes = module_shapes(engram, D, G)
  modules = {_module_name(layer, part): shapes[part] for layer in engram.layers for part in shapes}
  for name, shape in modules.items():
    folder.check(name, "F32", shape)
  tokenizer = folder.tokenizer(cfg.model.vocab_size)
  tokenizer.encode_special_tokens = True  # as in training: what spells a special token is text
  modules = [_module_name(layer, p) for layer in engram.layers for p in module_shapes(engram, D, G)]
  return Memory(
    kind=KIND,
    cfg=engram,
    width=D,
    branches=G,
    tokenizer=tokenizer,
    compressor=compressor,
    layout=layout,
    tables={
      layer: Table(folder, (table_name(layer),), layout.rows[layer], engram.row_width)
      for layer in engram.layers
    },
    parameters=functools.partial(_parameters, folder, shapes),
    tensors=(*modules, *map(table_name, engram.layers)),
  )


def _module_name(layer: int, part: str) -> str:
  return f"params.blocks.{layer}.engram.{part}"


def module_shapes(engram: EngramConfig, D: int, G: int) -> dict[str, tuple[int, ...]]:
  """Of a module's parameters, as memory/engram.py has them; a test holds the two equal."""
  M, W = engram.memory_width, engram.conv_kernel
  shapes = {"w_key": (M, G, D), "w_value": (M, D), "g_key": (G, D), "g_query": (G, D)}
  if engram.bias:
    shapes |= {"b_key": (G, D), "b_value": (D,)}
  if W:
    shapes |= {"g_conv": (G, D), "w_conv": (W, G, D)}
  return shapes


def _parameters(folder: Folder, shapes: dict, layer: int) -> dict[str, np.ndarray]:
  return {part: folder.read(_module_name(layer, part)) for part in shapes}
