"""This package's runs as checkpoint folders.

config.json holds the run's resolved config and, under "meaning", the meta of its checkpoint with
the fingerprints of tokenizer, token map and hash layout. Tensors are named after the paths of the
training state, with dots:

    params.blocks.1.engram.w_key, ...   biases.blocks.1.moe.bias, ...   as in the checkpoint
    tables.{l}.weight                   [R, C]: block l's rows, without padding

Optimizer state is not exported.
"""

import functools
import json
import pathlib
from typing import Any

import numpy as np

from engram_jax.config import (
  NAMED_TOKENIZERS,
  Config,
  DistributedConfig,
  EngramConfig,
  RunConfig,
  build,
)
from engram_jax.config.bounded import shorten
from engram_jax.errors import ConfigError
from engram_jax.interop.folder import CONFIG, TOKENIZER, Folder
from engram_jax.interop.memory import Memory, StoredTable, require_equal
from engram_jax.memory.compress import tokenizer_digest
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.vocabulary import Vocabulary, require_ngrams

KIND = "engram_jax"
FORMAT_VERSION = 1
MAX_STEP = 2**31 - 1  # a state counts in int32
DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def matches(config: dict) -> bool:
  """Says whether a config.json is of this format."""
  return config.get("model_type") == KIND


def make_config(cfg: Config, step: int, meta: dict[str, Any]) -> dict[str, Any]:
  """The config.json of a run after `step` steps; `meta` is its checkpoint's."""
  return {
    "model_type": KIND,
    "format": FORMAT_VERSION,
    "step": step,
    "config": portable(cfg).model_dump(mode="json"),
    "meaning": meta,
  }


def table_name(layer: int) -> str:
  """The tensor of block `layer`'s rows."""
  return f"tables.{layer}.weight"


def tensor_name(path: str) -> str:
  """The tensor of a leaf of the training state, by its path there ("params/embedding")."""
  return path.replace("/", ".")


def portable(cfg: Config) -> Config:
  """The config without what is of this machine: folders and names of hosts.

  Of a path to the user's text, or of a run to start from, the last name stays.
  """
  last = lambda path: pathlib.PurePath(path).name
  data, train = cfg.data, cfg.train
  of_text = {"cache": None} | ({"path": last(data.path)} if data.path else {})
  if data.tokenizer not in NAMED_TOKENIZERS:
    of_text["tokenizer"] = TOKENIZER  # it lies in the folder
  update = {
    "run": cfg.run.model_copy(update={"root": RunConfig().root}),
    "data": data.model_copy(update=of_text),
    "train": train.model_copy(update={"init_from": last(train.init_from)}),
    "distributed": DistributedConfig(),
  }
  return cfg.model_copy(update=update)


def read_config(folder: Folder) -> tuple[Config, int, dict[str, Any]]:
  """(config, step, meta) of a folder's config.json; ConfigError where `make_config` made none."""
  tree, where = folder.config, folder.path / CONFIG
  kinds = {"format": int, "step": int, "config": dict, "meaning": dict}
  for name, kind in kinds.items():
    if type(tree.get(name)) is not kind:
      found = shorten(tree[name]) if name in tree else "missing"
      raise ConfigError(f"{where}: {name} is {found}: expected {kind.__name__}")
  if tree["format"] != FORMAT_VERSION or tree["step"] < 0:
    raise ConfigError(
      f"{where}: format {tree['format']}, step {tree['step']}: this version reads format "
      f"{FORMAT_VERSION}"
    )
  cfg, step = build(tree["config"], f"{where}: config"), tree["step"]
  if not step <= min(cfg.train.steps, MAX_STEP):
    raise ConfigError(
      f"{where}: step is {step}: its train.steps is {cfg.train.steps}, and {MAX_STEP} the most"
    )
  if cfg.model.layers > len(folder.names):  # each block has tensors
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


def rebuild_vocabulary(folder: Folder, cfg: Config, meta: dict[str, Any]) -> Vocabulary:
  """Rebuilds tokenizer, token map and hash layout from the folder's tokenizer and config.

  Raises ConfigError, with both values, where one is not the one that the run was trained with.
  """
  tokenizer = folder.tokenizer(cfg.model.vocab_size)
  digest = tokenizer_digest(tokenizer)
  require_equal(folder.path, "tokenizer_digest", meta.get("tokenizer_digest"), digest)
  tokenizer.encode_special_tokens = True  # as in training: what spells a special token is text
  try:
    vocabulary = Vocabulary.build(cfg.model, tokenizer)
  except ConfigError as error:
    raise ConfigError(f"{folder.path}: {error}") from None
  digest, layout = vocabulary.compressor.digest, vocabulary.layout
  require_equal(folder.path, "token_map_digest", meta.get("token_map_digest"), digest)
  if layout is None:
    require_equal(folder.path, "hash_layout", meta.get("hash_layout"), None)
    return vocabulary
  stored = meta.get("hash_layout") or {}
  for name, value in layout.describe().items():
    require_equal(folder.path, f"hash_layout.{name}", stored.get(name), value)
  digest = meta.get("hash_layout_digest")
  require_equal(folder.path, "hash_layout_digest", digest, layout.digest)
  return vocabulary


def check_tables(folder: Folder, engram: EngramConfig, layout: HashLayout | None) -> None:
  """Raises ConfigError unless every table has as many rows as its primes add up to."""
  for layer, rows in layout.rows.items() if layout else ():
    folder.check(table_name(layer), DTYPES[engram.table_dtype], (rows, engram.row_width))


def open_memory(folder: Folder) -> Memory:
  """The memory of an exported run, once everything that can be rebuilt was found equal.

  Raises ConfigError, with both values, for another tokenizer, hash constants, row counts or a
  tensor of another shape or dtype, and for a run without a memory.
  """
  cfg, _, meta = read_config(folder)
  engram = cfg.model.engram
  vocabulary = rebuild_vocabulary(folder, cfg, meta)
  layout = vocabulary.layout
  if layout is None:
    raise ConfigError(f"{folder.path} has no memory: model.engram.layers is empty")
  check_tables(folder, engram, layout)
  D, G = cfg.model.width, cfg.model.residual.branches
  shapes = module_shapes(engram, D, G)
  modules = {_module_name(layer, part): shapes[part] for layer in engram.layers for part in shapes}
  for name, shape in modules.items():
    folder.check(name, "F32", shape)
  require_ngrams(vocabulary.address)
  return Memory(
    kind=KIND,
    cfg=engram,
    width=D,
    branches=G,
    tokenizer=vocabulary.tokenizer,
    compressor=vocabulary.compressor,
    layout=layout,
    tables={
      layer: StoredTable(folder, (table_name(layer),), layout.rows[layer], engram.row_width)
      for layer in engram.layers
    },
    parameters=functools.partial(_parameters, folder, list(shapes)),
    tensors=(*modules, *map(table_name, engram.layers)),
  )


def _module_name(layer: int, part: str) -> str:
  return f"params.blocks.{layer}.engram.{part}"


def module_shapes(engram: EngramConfig, D: int, G: int) -> dict[str, tuple[int, ...]]:
  """The shapes of a module's parameters by name, as in memory/engram.py; a test compares them."""
  M, kernel = engram.memory_width, engram.conv_kernel
  shapes: dict[str, tuple[int, ...]] = {}
  if engram.gate != "none":
    shapes |= {"w_key": (M, G, D), "g_key": (G, D), "g_query": (G, D)}
    shapes |= {"b_key": (G, D)} if engram.bias else {}
  if engram.projections:
    shapes |= {"w_value": (M, D)}
  if engram.bias:
    shapes |= {"b_value": (D,)}
  if kernel:
    shapes |= {"g_conv": (G, D), "w_conv": (kernel, G, D)}
  return shapes


def _parameters(folder: Folder, parts: list[str], layer: int) -> dict[str, np.ndarray]:
  return {part: folder.read(_module_name(layer, part)) for part in parts}
