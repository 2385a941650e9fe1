"""A memory written in Qwen3.8-Flash-Next's layout (interop/qwen.py says what that is), in BF16."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from engram_jax.interop.memory import Memory, require_expressible
from engram_jax.interop.qwen import shard_name, tensor_name
from engram_jax.interop.writer import Source
from engram_jax.memory.dialects import QWEN_SEED

PARTS = 128
_BF16 = np.dtype(ml_dtypes.bfloat16)


def config_of(memory: Memory) -> dict[str, Any]:
  """The config.json. ConfigError, naming field and value, for what the layout cannot say."""
  cfg, layers = memory.cfg, list(memory.layout.layers)
  require_expressible(
    memory,
    "qwen_ple",
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
    "make_ngram_vocab_size_divisible_by": PARTS,
    "split_ngram_parts": PARTS,
    "hidden_size": memory.width,
    "hc_count": memory.branches,
    "vocab_size": int(memory.compressor.table.size),
    "eos_token_id": cfg.pad_id,
    "rms_norm_eps": cfg.norm_eps,
    "seed": cfg.seed or QWEN_SEED,
  }
  return {"model_type": "qwen4_exp", "text_config": text}


def sources(memory: Memory) -> dict[str, Source]:
  """The tensors; rows are read a block at a time, those past the last are zeros."""
  layer, layout = memory.layout.layers[0], memory.layout
  each = -(-layout.rows[layer] // PARTS)
  constants = {
    "layer_multipliers": layout.multipliers[layer],
    "ngram_heads_vocab_sizes": [p for heads in layout.primes[layer] for p in heads],
    "ngram_heads_offsets": layout.offsets[layer],
  }
  found = {
    shard_name(layer, i): Source(
      "BF16", (each, memory.cfg.row_width), lambda i=i: _shard(memory, layer, i * each, each)
    )
    for i in range(PARTS)
  }
  for name, values in constants.items():
    array = np.array(values, np.int64)
    source = Source("I64", array.shape, lambda array=array: [array])
    found[tensor_name(layer, f"ple_embedding.{name}")] = source
  for name, array in _weights(memory.parameters(layer)).items():
    source = Source("BF16", array.shape, lambda array=array: [array])
    found[tensor_name(layer, f"{name}.weight")] = source
  return found


def _shard(memory: Memory, layer: int, start: int, count: int) -> Iterator[np.ndarray]:
  stop = min(start + count, memory.layout.rows[layer])
  for rows in memory.tables[layer].blocks(start=start, stop=max(start, stop)):
    yield rows.astype(_BF16)
  yield np.zeros((count - max(0, stop - start), memory.cfg.row_width), _BF16)


def _weights(parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Of the module, with the names of the layout; norms are stored without their one."""
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
