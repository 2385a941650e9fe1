"""The Engram tensors of DeepSeek-V4.1 checkpoints.

For each l of `engram_layer_ids`, with R rows, width C, G branches of width D and M = J C:

    layers.{l}.engram.embed.weight   F8_E4M3 [R, C]          rows
    layers.{l}.engram.embed.scale    F8_E8M0 [R, C/32]       of each row's blocks of 32 columns
    layers.{l}.engram.wkv.weight     F8_E4M3 [(G+1) D, M]    the keys of G branches, then the value
    layers.{l}.engram.wkv.scale      F8_E8M0 [(G+1) D/32, M/32]  of each block of 32 x 32
    layers.{l}.engram.q_weight, k_weight   BF16 [G, D]       norm weights; only their product counts

No hash constant is stored: all are rebuilt from the config's `text_config` and the tokenizer, and
its `engram_compressed_vocab_size` and `engram_num_embeddings` say whether they were rebuilt right.
"""

import functools
from typing import Annotated

import numpy as np
import pydantic
from pydantic import AliasChoices, Field

from engram_jax.config import EngramConfig
from engram_jax.interop.folder import CONFIG, Folder
from engram_jax.interop.memory import (
  MAX_VOCAB,
  Memory,
  Table,
  hash_layout,
  module_config,
  parsed,
  require_equal,
)
from engram_jax.memory.compress import TokenCompressor

KIND = "deepseek_v41"
BLOCK = 32
_COLUMNS = 64
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Fields(pydantic.BaseModel):
  """What is read of `text_config`."""

  model_config = pydantic.ConfigDict(strict=True, frozen=True)

  engram_layer_ids: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=64)
  engram_vocab_size: Size
  engram_num_embeddings: list[Size]
  engram_max_ngram_size: Annotated[int, Field(ge=2, le=8)]
  engram_n_heads: Annotated[int, Field(ge=1, le=1024)]
  engram_head_dim: Annotated[int, Field(ge=1, le=2**16)]
  engram_pad_id: Annotated[int, Field(ge=0)] = Field(
    validation_alias=AliasChoices("engram_pad_id", "engram_pad_token_id")
  )
  engram_compressed_vocab_size: Size
  hidden_size: Size
  hc_mult: Annotated[int, Field(ge=1, le=64)]
  vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCAB)]
  rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-20  # as released


def matches(config: dict) -> bool:
  """Whether a config.json is of this layout."""
  return "engram_layer_ids" in _text_config(config)


def open_memory(folder: Folder) -> Memory:
  """The memory of a checkpoint, once everything that can be rebuilt was found equal.

  Raises ConfigError, with both values, for another tokenizer, other row counts, or a tensor of
  another shape or dtype than the config gives.
  """
  fields = parsed(Fields, _text_config(folder.config), folder.path / CONFIG)
  tokenizer = folder.tokenizer(fields.vocab_size)
  compressor = TokenCompressor.from_tokenizer(tokenizer)
  stored = fields.engram_compressed_vocab_size
  require_equal(folder.path, "engram_compressed_vocab_size", stored, compressor.size)
  cfg = _module_config(folder, fields)
  layout = hash_layout(folder, cfg, compressor)
  rebuilt = [layout.rows[layer] for layer in layout.layers]
  require_equal(folder.path, "engram_num_embeddings", fields.engram_num_embeddings, rebuilt)
  D, G = fields.hidden_size, fields.hc_mult
  for layer in layout.layers:
    _check_tensors(folder, layer, layout.rows[layer], cfg, D, G)
  return Memory(
    kind=KIND,
    cfg=cfg,
    width=D,
    branches=G,
    tokenizer=tokenizer,
    compressor=compressor,
    layout=layout,
    tables={
      layer: Table(
        folder,
        (tensor_name(layer, "embed.weight"),),
        layout.rows[layer],
        cfg.row_width,
        scales=tensor_name(layer, "embed.scale"),
      )
      for layer in layout.layers
    },
    parameters=functools.partial(_parameters, folder, cfg, D, G),
    tensors=tuple(tensor_name(layer, part) for layer in layout.layers for part in _PARTS),
  )


_PARTS = ("embed.weight", "embed.scale", "wkv.weight", "wkv.scale", "q_weight", "k_weight")


def tensor_name(layer: int, part: str) -> str:
  """The tensor `part` ("embed.weight") of block `layer`."""
  return f"layers.{layer}.engram.{part}"


def _text_config(config: dict) -> dict:
  inner = config.get("text_config", config)
  return inner if isinstance(inner, dict) else {}


def _module_config(folder: Folder, fields: Fields) -> EngramConfig:
  return module_config(
    folder,
    layers=fields.engram_layer_ids,
    max_ngram=fields.engram_max_ngram_size,
    heads=fields.engram_n_heads,
    row_width=fields.engram_head_dim,
    rows_per_head=fields.engram_vocab_size,
    pad_id=fields.engram_pad_id,
    dialect="deepseek_v41",
    conv_kernel=0,
    norm_eps=fields.rms_norm_eps,
  )


def _check_tensors(folder: Folder, layer: int, rows: int, cfg: EngramConfig, D: int, G: int):
  C, M, X = cfg.row_width, cfg.memory_width, (G + 1) * D
  blocks = lambda n: -(-n // BLOCK)
  folder.check(tensor_name(layer, "embed.weight"), "F8_E4M3", (rows, C))
  folder.check(tensor_name(layer, "embed.scale"), "F8_E8M0", (rows, blocks(C)))
  folder.check(tensor_name(layer, "wkv.weight"), "F8_E4M3", (X, M))
  folder.check(tensor_name(layer, "wkv.scale"), "F8_E8M0", (blocks(X), blocks(M)))
  for part in ("q_weight", "k_weight"):
    folder.check(tensor_name(layer, part), "BF16", (G, D))


def _parameters(folder: Folder, cfg: EngramConfig, D: int, G: int, layer: int) -> dict:
  """The fused projection dequantised one branch at a time, transposed to ours."""
  M = cfg.memory_width
  w_key, w_value = np.empty((M, G, D), np.float32), np.empty((M, D), np.float32)
  for g in range(G + 1):
    into, part_DM = w_key[:, g] if g < G else w_value, _dequantised(folder, layer, g * D, D)
    for m in range(0, M, _COLUMNS):  # transposed a few columns at a time, which caches like
      into[m : m + _COLUMNS] = part_DM[:, m : m + _COLUMNS].T
  query, key = (folder.read(tensor_name(layer, part)) for part in ("q_weight", "k_weight"))
  return {
    "w_key": w_key,
    "w_value": w_value,
    "g_key": key.astype(np.float32),
    "g_query": query.astype(np.float32),
  }


def _dequantised(folder: Folder, layer: int, start: int, count: int) -> np.ndarray:
  """Output rows [start, start + count) of the fused projection, float32 [count, M]."""
  weight = folder.read(tensor_name(layer, "wkv.weight"), start, start + count).astype(np.float32)
  first, last = start // BLOCK, -(-(start + count) // BLOCK)
  scale = folder.read(tensor_name(layer, "wkv.scale"), first, last).astype(np.float32)
  of_row = np.arange(start, start + count) // BLOCK - first
  weight *= np.repeat(scale[of_row], BLOCK, axis=1)[:, : weight.shape[1]]
  return weight
