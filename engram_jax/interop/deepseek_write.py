"""A memory written in DeepSeek-V4.1's layout (interop/deepseek.py says what that is).

Rows become FP8 E4M3 with a power of two for 32 columns, the projections with one for each block of
32 x 32, norm weights bfloat16. A memory that has those precisions already keeps every value.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from engram_jax.errors import StorageError
from engram_jax.interop.deepseek import BLOCK, tensor_name
from engram_jax.interop.memory import Memory, require_expressible
from engram_jax.interop.writer import Source
from engram_jax.memory.codecs import encode

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_BF16 = np.dtype(ml_dtypes.bfloat16)


def config_of(memory: Memory) -> dict[str, Any]:
  """The config.json. ConfigError, naming field and value, for what the layout cannot say."""
  cfg, layout = memory.cfg, memory.layout
  require_expressible(
    memory,
    "deepseek_v41",
    {
      "dialect": (cfg.dialect, cfg.dialect in ("engram", "deepseek_v41"), "deepseek_v41"),
      "seed": (cfg.seed, cfg.seed == 0, 0),
      "gate": (cfg.gate, cfg.gate == "signed_sqrt", "signed_sqrt"),
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
  return {"model_type": "deepseek_v41", "quantization_config": quantized, "text_config": text}


def sources(memory: Memory) -> dict[str, Source]:
  """The tensors. Rows are read and encoded a block at a time, once for values, once for scales.

  Reading them raises StorageError for numbers that are infinite or none, which FP8 cannot say.
  """
  C, D, G, M = memory.cfg.row_width, memory.width, memory.branches, memory.cfg.memory_width
  X, blocks = (G + 1) * D, lambda n: -(-n // BLOCK)
  found = {}
  for layer in memory.layout.layers:
    R, shape = memory.layout.rows[layer], (blocks(X), blocks(M))
    module = functools.cache(functools.partial(_module, memory, layer))
    part = lambda name, module=module: lambda: [module()[name]]
    made = {
      "embed.weight": Source("F8_E4M3", (R, C), _rows(memory, layer, 0)),
      "embed.scale": Source("F8_E8M0", (R, blocks(C)), _rows(memory, layer, 1)),
      "wkv.weight": Source("F8_E4M3", (X, M), part("wkv.weight")),
      "wkv.scale": Source("F8_E8M0", shape, part("wkv.scale")),
      "q_weight": Source("BF16", (G, D), part("q_weight")),
      "k_weight": Source("BF16", (G, D), part("k_weight")),
    }
    found |= {tensor_name(layer, name): source for name, source in made.items()}
  return found


def encode_blocks(weight_XM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(E4M3 values [X, M], E8M0 scales [X/32, M/32]) of a float32 matrix; sizes rounded up.

  A block's scale is the smallest power of two at which nothing in it exceeds 448.
  """
  X, M = weight_XM.shape
  largest = np.maximum.reduceat(np.abs(weight_XM), np.arange(0, X, BLOCK), axis=0)
  largest = np.maximum.reduceat(largest, np.arange(0, M, BLOCK), axis=1)
  m, e = np.frexp(largest)  # largest = m 2^e, m in [1/2, 1); 448 = 7/8 2^9
  exponents = np.where(largest == 0, 0, np.clip(e - 9 + (m > 0.875), -127, 127))
  spread = np.repeat(np.repeat(exponents, BLOCK, 0)[:X], BLOCK, 1)[:, :M]
  values = np.ldexp(weight_XM, -spread).astype(_E4M3)
  return values, (exponents + 127).astype(np.uint8).view(_E8M0)


def _rows(memory: Memory, layer: int, part: int) -> Callable[[], Iterator[np.ndarray]]:
  def slices() -> Iterator[np.ndarray]:
    for rows_UC in memory.tables[layer].blocks():
      _require_finite(f"rows of block {layer}", rows_UC)
      yield encode(rows_UC, "fp8_e4m3")[part]

  return slices


def _require_finite(what: str, numbers: np.ndarray) -> None:
  if not np.isfinite(numbers).all():
    raise StorageError(f"{what} hold {numbers[~np.isfinite(numbers)].flat[0]}: no number for FP8")


def _module(memory: Memory, layer: int) -> dict[str, np.ndarray]:
  """The fused projection (keys of all branches, then the value) and norm weights, encoded."""
  parameters = memory.parameters(layer)
  for name, array in parameters.items():
    _require_finite(f"{name} of block {layer}", array)
  both_MXD = np.concatenate([parameters["w_key"], parameters["w_value"][:, None]], axis=1)
  values, scales = encode_blocks(both_MXD.reshape(len(both_MXD), -1).T)
  norms = {"q_weight": parameters["g_query"], "k_weight": parameters["g_key"]}
  norms = {name: weight.astype(_BF16) for name, weight in norms.items()}
  return {"wkv.weight": values, "wkv.scale": scales} | norms
