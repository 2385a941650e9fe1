"""The per-layer-embedding (PLE) tensors of Qwen3.8-Flash-Next checkpoints.

For the one 1-based entry l + 1 of `ple_layer_ids`, under `model.language_model.layers.{l}.ple.`,
with M = `ple_embed_dim` and G = `hc_count`:

    ple_embedding.ngram_embedding.shard_{i}.weight   BF16 or F8_E4M3 [R_padded / shards, C]
    ple_embedding.ngram_embedding.weight_scale       with F8_E4M3: one number for all rows
    ple_embedding.layer_multipliers                  I64 [N]   these three are rebuilt and compared
    ple_embedding.ngram_heads_vocab_sizes, ngram_heads_offsets   I64 [J]
    key_proj.weight [G D, M], value_proj.weight [D, M]
    norm_key.weight, norm_query.weight, norm_conv.weight [G D]   a norm per branch, times 1 + weight
    conv1d.weight [G D, 1, W]                        depthwise, causal, dilated by N

Local letters: N, the largest n-gram order; W, taps of the convolution; n, rows of one block.
"""

import functools
import math
from collections.abc import Iterator
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import pydantic
from pydantic import Field

from engram_jax.config import EngramConfig
from engram_jax.errors import ConfigError
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
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.dialects.qwen_ple import SEED as QWEN_SEED
from engram_jax.memory.hash_layout import HashLayout

KIND = "qwen_ple"
FLOATS = ("BF16", "F16", "F32")
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]


class QwenFields(pydantic.BaseModel):
  """The fields of `text_config` that are read."""

  model_config = pydantic.ConfigDict(strict=True, frozen=True)

  ple_layer_ids: list[Annotated[int, Field(ge=1)]] = Field(min_length=1, max_length=1)
  ple_embed_dim: Size
  ple_conv_kernel_size: Annotated[int, Field(ge=1, le=64)]
  ngram_size: Annotated[int, Field(ge=2, le=8)]
  heads_per_ngram: Annotated[int, Field(ge=1, le=1024)]
  ngram_vocab_size_base: Size
  make_ngram_vocab_size_divisible_by: Size = 128
  split_ngram_parts: Annotated[int, Field(ge=1, le=2**16)] = 128
  hidden_size: Size
  hc_count: Annotated[int, Field(ge=1, le=64)]
  vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCAB)]
  eos_token_id: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]]
  rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
  seed: Annotated[int, Field(ge=0)] = QWEN_SEED  # absent from the released config


def matches(config: dict) -> bool:
  """Says whether a config.json is of this format."""
  return bool(text_config(config).get("ple_layer_ids"))


def open_memory(folder: Folder) -> Memory:
  """The memory of a checkpoint, once everything that can be rebuilt was found equal.

  Raises ConfigError, with both values, for stored hash constants that are not the rebuilt ones,
  a tokenizer with more ids than the model, or a tensor of another shape or dtype.
  """
  fields = parse_fields(QwenFields, text_config(folder.config), folder.path / CONFIG)
  tokenizer = folder.tokenizer(fields.vocab_size)
  compressor = TokenCompressor.identity(fields.vocab_size)
  cfg = _module_config(folder, fields)
  layout = rebuild_hash_layout(folder, cfg, compressor)
  layer = layout.layers[0]
  _check_constants(folder, layer, layout)
  D, G = fields.hidden_size, fields.hc_count
  rows = layout.rows[layer]
  shards = _check_tensors(folder, layer, rows, cfg, fields)
  table = StoredTable(folder, shards, rows, cfg.row_width, scale=_table_scale(folder, layer))
  return Memory(
    kind=KIND,
    cfg=cfg,
    width=D,
    branches=G,
    tokenizer=tokenizer,
    compressor=compressor,
    layout=layout,
    tables={layer: table},
    parameters=functools.partial(_parameters, folder, D, G),
    tensors=tuple(name for name in folder.names if name.startswith(tensor_name(layer, ""))),
  )


def tensor_name(layer: int, part: str) -> str:
  """The tensor `part` ("key_proj.weight") of block `layer`, 0-based."""
  return f"model.language_model.layers.{layer}.ple.{part}"


def shard_name(layer: int, shard: int) -> str:
  """The tensor of one shard of block `layer`'s rows."""
  return tensor_name(layer, f"ple_embedding.ngram_embedding.shard_{shard}.weight")


def _module_config(folder: Folder, fields: QwenFields) -> EngramConfig:
  hash_heads = (fields.ngram_size - 1) * fields.heads_per_ngram
  if fields.ple_embed_dim % hash_heads:
    raise ConfigError(
      f"{folder.path}: ple_embed_dim={fields.ple_embed_dim} does not divide by its "
      f"{hash_heads} = (ngram_size - 1) x heads_per_ngram columns"
    )
  eos = fields.eos_token_id
  if eos == []:
    raise ConfigError(f"{folder.path}: eos_token_id is empty: the hash needs one")
  return make_engram_config(
    folder,
    layers=[fields.ple_layer_ids[0] - 1],
    max_ngram=fields.ngram_size,
    heads=fields.heads_per_ngram,
    row_width=fields.ple_embed_dim // hash_heads,
    rows_per_head=fields.ngram_vocab_size_base,
    seed=fields.seed,
    pad_id=eos[0] if isinstance(eos, list) else eos,
    dialect="qwen_ple",
    conv_kernel=fields.ple_conv_kernel_size,
    norm_eps=fields.rms_norm_eps,
    conv_norm_eps=fields.rms_norm_eps,
  )


def _check_constants(folder: Folder, layer: int, layout: HashLayout) -> None:
  """Compares stored hash constants with rebuilt ones; ConfigError where they differ."""
  for name, values in _hash_constants(layout, layer).items():
    folder.check(name, "I64", (len(values),))
    require_equal(folder.path, name, folder.read(name).tolist(), values)


def _hash_constants(layout: HashLayout, layer: int) -> dict[str, list[int]]:
  """The hash constants of a block, by the names of their tensors."""
  constants = {
    "layer_multipliers": list(layout.multipliers[layer]),
    "ngram_heads_vocab_sizes": [p for heads in layout.primes[layer] for p in heads],
    "ngram_heads_offsets": list(layout.offsets[layer]),
  }
  return {tensor_name(layer, f"ple_embedding.{name}"): x for name, x in constants.items()}


def _check_tensors(
  folder: Folder, layer: int, rows: int, cfg: EngramConfig, fields: QwenFields
) -> tuple[str, ...]:
  """Checks shapes and dtypes; returns the names of the table's shards."""
  shards, multiple = fields.split_ngram_parts, fields.make_ngram_vocab_size_divisible_by
  padded = -(-rows // multiple) * multiple
  if padded % shards:
    raise ConfigError(
      f"{folder.path}: {rows:,} rows padded to {padded:,} do not divide into "
      f"split_ngram_parts={shards}"
    )
  names = tuple(shard_name(layer, i) for i in range(shards))
  dtype = folder.tensor(names[0]).dtype
  if dtype not in ("BF16", "F8_E4M3"):
    dtype = "BF16"
  for name in names:
    folder.check(name, dtype, (padded // shards, cfg.row_width))
  GD, M, W = fields.hc_count * fields.hidden_size, cfg.memory_width, cfg.conv_kernel
  folder.check(tensor_name(layer, "key_proj.weight"), FLOATS, (GD, M))
  folder.check(tensor_name(layer, "value_proj.weight"), FLOATS, (fields.hidden_size, M))
  for norm in ("norm_key", "norm_query", "norm_conv"):
    folder.check(tensor_name(layer, f"{norm}.weight"), FLOATS, (GD,))
  folder.check(tensor_name(layer, "conv1d.weight"), FLOATS, (GD, 1, W))
  return names


def _table_scale(folder: Folder, layer: int) -> float:
  """The factor of all rows: 1 for BF16, the table's one scale for FP8."""
  if folder.tensor(shard_name(layer, 0)).dtype == "BF16":
    return 1.0
  name = tensor_name(layer, "ple_embedding.ngram_embedding.weight_scale")
  dtype, shape, *_ = folder.tensor(name)
  if dtype not in FLOATS or math.prod(shape) != 1:
    raise ConfigError(f"{folder.path}: {name} is {dtype}{list(shape)}, not one number")
  return float(folder.read(name).reshape(-1)[0])


def _parameters(folder: Folder, D: int, G: int, layer: int) -> dict[str, np.ndarray]:
  read = lambda part: folder.read(tensor_name(layer, f"{part}.weight")).astype(np.float32)
  norm = lambda part: 1 + read(part).reshape(G, D)
  return {
    "w_key": np.ascontiguousarray(read("key_proj").T).reshape(-1, G, D),
    "w_value": np.ascontiguousarray(read("value_proj").T),
    "g_key": norm("norm_key"),
    "g_query": norm("norm_query"),
    "g_conv": norm("norm_conv"),
    "w_conv": np.ascontiguousarray(read("conv1d")[:, 0].T).reshape(-1, G, D),
  }


SHARDS = 128  # as released
_BF16 = np.dtype(ml_dtypes.bfloat16)


def make_config(memory: Memory) -> dict[str, Any]:
  """The config.json of a memory; ConfigError naming a field that the format cannot express."""
  cfg, layers = memory.cfg, list(memory.layout.layers)
  require_expressible(
    memory,
    KIND,
    {
      "dialect": (cfg.dialect, cfg.dialect == "qwen_ple", "qwen_ple"),
      "layers": (layers, len(layers) == 1, "one"),
      "gate": (cfg.gate, cfg.gate == "signed_sqrt", "signed_sqrt"),
      "bias": (cfg.bias, not cfg.bias, False),
      "conv_kernel": (cfg.conv_kernel, cfg.conv_kernel > 0, "at least 1"),
      "conv_norm_eps": (cfg.conv_norm_eps, cfg.conv_norm_eps == cfg.norm_eps, cfg.norm_eps),
      "rows_per_head": (
        list(cfg.rows_per_head),
        len(set(cfg.rows_per_head)) == 1,
        "one number for all orders",
      ),
    },
  )
  text = {
    "ple_layer_ids": [layers[0] + 1],
    "ple_embed_dim": cfg.memory_width,
    "ple_conv_kernel_size": cfg.conv_kernel,
    "ngram_size": cfg.max_ngram,
    "heads_per_ngram": cfg.heads,
    "ngram_vocab_size_base": cfg.rows_per_head[0],
    "make_ngram_vocab_size_divisible_by": SHARDS,
    "split_ngram_parts": SHARDS,
    "hidden_size": memory.width,
    "hc_count": memory.branches,
    "vocab_size": int(memory.compressor.table.size),
    "eos_token_id": cfg.pad_id,
    "rms_norm_eps": cfg.norm_eps,
    "seed": cfg.seed or QWEN_SEED,
  }
  return {"model_type": "qwen4_exp", "text_config": text}


def make_tensors(memory: Memory) -> dict[str, StreamedTensor]:
  """The tensors of a memory by name; nothing is read yet but the module's parameters.

  Rows are read a block at a time; those past the last are zeros.
  """
  layer, layout = memory.layout.layers[0], memory.layout
  shard_rows = -(-layout.rows[layer] // SHARDS)
  tensors = {
    shard_name(layer, i): StreamedTensor(
      "BF16",
      (shard_rows, memory.cfg.row_width),
      functools.partial(_shard_rows, memory, layer, i * shard_rows, shard_rows),
    )
    for i in range(SHARDS)
  }
  for name, values in _hash_constants(layout, layer).items():
    tensors[name] = _full_tensor("I64", np.array(values, np.int64))
  for name, array in _stored_weights(memory.parameters(layer)).items():
    tensors[tensor_name(layer, f"{name}.weight")] = _full_tensor("BF16", array)
  return tensors


def _full_tensor(dtype: str, array: np.ndarray) -> StreamedTensor:
  return StreamedTensor(dtype, array.shape, lambda: [array])


def _shard_rows(memory: Memory, layer: int, start: int, count: int) -> Iterator[np.ndarray]:
  stop = min(start + count, memory.layout.rows[layer])
  for rows_nC in memory.tables[layer].blocks(start=start, stop=max(start, stop)):
    yield rows_nC.astype(_BF16)
  yield np.zeros((count - max(0, stop - start), memory.cfg.row_width), _BF16)


def _stored_weights(parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The module's weights as they are stored: norms without the 1 that is added to them."""
  M, G, D = parameters["w_key"].shape
  arrays = {
    "key_proj": parameters["w_key"].reshape(M, G * D).T,
    "value_proj": parameters["w_value"].T,
    "norm_key": parameters["g_key"].reshape(-1) - 1,
    "norm_query": parameters["g_query"].reshape(-1) - 1,
    "norm_conv": parameters["g_conv"].reshape(-1) - 1,
    "conv1d": parameters["w_conv"].reshape(-1, G * D).T[:, None],
  }
  return {name: np.ascontiguousarray(array).astype(_BF16) for name, array in arrays.items()}
