"""The Engram tensors of DeepSeek-V4.1 checkpoints.

For each block l of `engram_layer_ids`:

    layers.{l}.engram.embed.weight   F8_E4M3 [R, C]          rows
    layers.{l}.engram.embed.scale    F8_E8M0 [R, C/32]       of each row's blocks of 32 columns
    layers.{l}.engram.wkv.weight     F8_E4M3 [X, M]          the keys of G branches, then the value
    layers.{l}.engram.wkv.scale      F8_E8M0 [X/32, M/32]    of each block of 32 x 32
    layers.{l}.engram.q_weight, k_weight   BF16 [G, D]       norm weights; only their product counts

No hash constant is stored: all are rebuilt from the config's `text_config` and the tokenizer, and
its `engram_compressed_vocab_size` and `engram_num_embeddings` say whether they were rebuilt right.

Local letters: X = (G+1) D, outputs of the fused projection; n, rows of one block.
"""

import functools
from collections.abc import Iterator
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import pydantic
from pydantic import AliasChoices, Field

from engram_jax.config import EngramConfig
from engram_jax.errors import StorageError
from engram_jax.interop.folder import CONFIG, Folder
from engram_jax.interop.memory import (
  MAX_VOCAB,
  Memory,
  StoredTable,
  make_engram_config,
  parse_fields,
  rebuild_hash_layout,
  require_equal,
  require_expressible,
  text_config,
)
from engram_jax.interop.writer import StreamedTensor
from engram_jax.memory.codecs import encode
from engram_jax.memory.compress import TokenCompressor

KIND = "deepseek_v41"
BLOCK = 32
_TRANSPOSED_COLUMNS = 64  # at once, which keeps both sides of the copy in the cache
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]


class DeepSeekFields(pydantic.BaseModel):
  """The fields of `text_config` that are read."""

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
  """Says whether a config.json is of this format."""
  return "engram_layer_ids" in text_config(config)


def open_memory(folder: Folder) -> Memory:
  """The memory of a checkpoint, once everything that can be rebuilt was found equal.

  Raises ConfigError, with both values, for another tokenizer, other row counts, or a tensor of
  another shape or dtype than the config gives.
  """
  fields = parse_fields(DeepSeekFields, text_config(folder.config), folder.path / CONFIG)
  tokenizer = folder.tokenizer(fields.vocab_size)
  compressor = TokenCompressor.from_tokenizer(tokenizer)
  stored = fields.engram_compressed_vocab_size
  require_equal(folder.path, "engram_compressed_vocab_size", stored, compressor.size)
  cfg = _module_config(folder, fields)
  layout = rebuild_hash_layout(folder, cfg, compressor)
  rebuilt = [layout.rows[layer] for layer in layout.layers]
  require_equal(folder.path, "engram_num_embeddings", fields.engram_num_embeddings, rebuilt)
  D, G = fields.hidden_size, fields.hc_mult
  specs = {
    tensor_name(layer, part): spec
    for layer in layout.layers
    for part, spec in _tensor_specs(layout.rows[layer], cfg, D, G).items()
  }
  for name, (dtype, shape) in specs.items():
    folder.check(name, dtype, shape)
  return Memory(
    kind=KIND,
    cfg=cfg,
    width=D,
    branches=G,
    tokenizer=tokenizer,
    compressor=compressor,
    layout=layout,
    tables={
      layer: StoredTable(
        folder,
        (tensor_name(layer, "embed.weight"),),
        layout.rows[layer],
        cfg.row_width,
        scale_tensor=tensor_name(layer, "embed.scale"),
      )
      for layer in layout.layers
    },
    parameters=functools.partial(_parameters, folder, cfg, D, G),
    tensors=tuple(specs),
  )


def tensor_name(layer: int, part: str) -> str:
  """The tensor `part` ("embed.weight") of block `layer`."""
  return f"layers.{layer}.engram.{part}"


def _module_config(folder: Folder, fields: DeepSeekFields) -> EngramConfig:
  return make_engram_config(
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


def _tensor_specs(
  rows: int, cfg: EngramConfig, D: int, G: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
  """(dtype, shape) of a block's tensors, by the last part of their names."""
  C, M, X = cfg.row_width, cfg.memory_width, (G + 1) * D
  blocks = lambda size: -(-size // BLOCK)
  return {
    "embed.weight": ("F8_E4M3", (rows, C)),
    "embed.scale": ("F8_E8M0", (rows, blocks(C))),
    "wkv.weight": ("F8_E4M3", (X, M)),
    "wkv.scale": ("F8_E8M0", (blocks(X), blocks(M))),
    "q_weight": ("BF16", (G, D)),
    "k_weight": ("BF16", (G, D)),
  }


def _parameters(
  folder: Folder, cfg: EngramConfig, D: int, G: int, layer: int
) -> dict[str, np.ndarray]:
  """A module's parameters: the fused projection is dequantised one branch at a time."""
  M = cfg.memory_width
  w_key, w_value = np.empty((M, G, D), np.float32), np.empty((M, D), np.float32)
  for g in range(G + 1):
    out_MD = w_key[:, g] if g < G else w_value
    weight_DM = _dequantize(folder, layer, g * D, D)
    for m in range(0, M, _TRANSPOSED_COLUMNS):
      columns = slice(m, m + _TRANSPOSED_COLUMNS)
      out_MD[columns] = weight_DM[:, columns].T
  query, key = (folder.read(tensor_name(layer, part)) for part in ("q_weight", "k_weight"))
  return {
    "w_key": w_key,
    "w_value": w_value,
    "g_key": key.astype(np.float32),
    "g_query": query.astype(np.float32),
  }


def _dequantize(folder: Folder, layer: int, start: int, count: int) -> np.ndarray:
  """Output rows [start, start + count) of the fused projection, float32 [count, M]."""
  weight = folder.read(tensor_name(layer, "wkv.weight"), start, start + count).astype(np.float32)
  first, last = start // BLOCK, -(-(start + count) // BLOCK)
  scale = folder.read(tensor_name(layer, "wkv.scale"), first, last).astype(np.float32)
  block_of_row = np.arange(start, start + count) // BLOCK - first
  weight *= np.repeat(scale[block_of_row], BLOCK, axis=1)[:, : weight.shape[1]]
  return weight


_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_BF16 = np.dtype(ml_dtypes.bfloat16)


def make_config(memory: Memory) -> dict[str, Any]:
  """The config.json of a memory; ConfigError naming a field that the format cannot express."""
  cfg, layout = memory.cfg, memory.layout
  require_expressible(
    memory,
    KIND,
    {
      "dialect": (cfg.dialect, cfg.dialect in ("engram", "deepseek_v41"), "deepseek_v41"),
      "seed": (cfg.seed, cfg.seed == 0, 0),
      "gate": (cfg.gate, cfg.gate == "signed_sqrt", "signed_sqrt"),
      "compress": (cfg.compress, cfg.compress, True),
      "bias": (cfg.bias, not cfg.bias, False),
      "conv_kernel": (cfg.conv_kernel, cfg.conv_kernel == 0, 0),
      "reset_at_documents": (cfg.reset_at_documents, cfg.reset_at_documents, True),
      "rows_per_head": (
        list(cfg.rows_per_head),
        len(set(cfg.rows_per_head)) == 1,
        "one number for all orders",
      ),
    },
  )
  text = {
    "engram_layer_ids": list(layout.layers),
    "engram_vocab_size": cfg.rows_per_head[0],
    "engram_num_embeddings": [layout.rows[layer] for layer in layout.layers],
    "engram_max_ngram_size": cfg.max_ngram,
    "engram_n_heads": cfg.heads,
    "engram_head_dim": cfg.row_width,
    "engram_pad_token_id": cfg.pad_id,
    "engram_compressed_vocab_size": memory.compressor.size,
    "hidden_size": memory.width,
    "hc_mult": memory.branches,
    "vocab_size": int(memory.compressor.table.size),
    "rms_norm_eps": cfg.norm_eps,
  }
  quantized = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "scale_fmt": "ue8m0"}
  return {"model_type": KIND, "quantization_config": quantized, "text_config": text}


def make_tensors(memory: Memory) -> dict[str, StreamedTensor]:
  """The tensors of a memory by name; nothing is read yet.

  Rows are read and encoded a block at a time, once for values and once for scales. Reading raises
  StorageError for infinities and NaN, which have no encoding.
  """
  layout, tensors = memory.layout, {}
  for layer in layout.layers:
    specs = _tensor_specs(layout.rows[layer], memory.cfg, memory.width, memory.branches)
    module = functools.cache(functools.partial(_encoded_module, memory, layer))
    for part, (dtype, shape) in specs.items():
      if part.startswith("embed."):
        slices = functools.partial(_encoded_rows, memory, layer, part)
      else:
        slices = lambda module=module, part=part: [module()[part]]
      tensors[tensor_name(layer, part)] = StreamedTensor(dtype, shape, slices)
  return tensors


def encode_blocks(weight_XM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Encodes a float32 matrix: (E4M3 values [X, M], E8M0 scales [X/32, M/32], rounded up).

  A block's scale is the smallest power of two at which nothing in it exceeds 448.
  """
  X, M = weight_XM.shape
  largest = np.maximum.reduceat(np.abs(weight_XM), np.arange(0, X, BLOCK), axis=0)
  largest = np.maximum.reduceat(largest, np.arange(0, M, BLOCK), axis=1)
  m, e = np.frexp(largest)  # largest = m 2^e, m in [1/2, 1); 448 = 7/8 2^9
  exponents = np.where(largest == 0, 0, np.clip(e - 9 + (m > 0.875), -127, 127))
  exponents_XM = np.repeat(np.repeat(exponents, BLOCK, 0)[:X], BLOCK, 1)[:, :M]
  values = np.ldexp(weight_XM, -exponents_XM).astype(_E4M3)
  return values, (exponents + 127).astype(np.uint8).view(_E8M0)


def _encoded_rows(memory: Memory, layer: int, part: str) -> Iterator[np.ndarray]:
  """Yields a table's values ("embed.weight") or scales ("embed.scale"), a block at a time."""
  for rows_nC in memory.tables[layer].blocks():
    _require_finite(f"rows of block {layer}", rows_nC)
    values, scales = encode(rows_nC, "fp8_e4m3")
    assert scales is not None
    yield scales if part == "embed.scale" else values


def _encoded_module(memory: Memory, layer: int) -> dict[str, np.ndarray]:
  """The fused projection (keys of all branches, then the value) and norm weights, encoded."""
  parameters = memory.parameters(layer)
  for name, array in parameters.items():
    _require_finite(f"{name} of block {layer}", array)
  fused = np.concatenate([parameters["w_key"], parameters["w_value"][:, None]], axis=1)
  values, scales = encode_blocks(fused.reshape(len(fused), -1).T)
  return {
    "wkv.weight": values,
    "wkv.scale": scales,
    "q_weight": parameters["g_query"].astype(_BF16),
    "k_weight": parameters["g_key"].astype(_BF16),
  }


def _require_finite(name: str, array: np.ndarray) -> None:
  finite = np.isfinite(array)
  if not finite.all():
    raise StorageError(f"{name} hold {array[~finite].flat[0]}: no number for FP8")
