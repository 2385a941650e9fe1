"""Miniature checkpoints in the released layouts, written and read back without the package.

Everything here is NumPy, struct and json, from the layouts' descriptions: names, dtypes, block
sizes and hash constants as released, sizes tiny.
"""

import json
import math
import pathlib
import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXT = "Only Alexander the Great could tame the horse Bucephalus, the horse of Alexander."
BYTES = {"F8_E4M3": 1, "F8_E8M0": 1, "BF16": 2, "F32": 4, "I64": 8}


class Raw(NamedTuple):
  """A tensor as stored: bytes, of a dtype by its safetensors name."""

  dtype: str
  shape: tuple[int, ...]
  data: bytes


def header_of(tensors: Mapping[str, Raw]) -> dict:
  header, end = {}, 0
  for name, tensor in tensors.items():
    offsets = [end, end + math.prod(tensor.shape) * BYTES[tensor.dtype]]
    header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    end = offsets[1]
  return header


def write_file(path: pathlib.Path, header: dict | bytes, data: bytes) -> None:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_folder(path: pathlib.Path, config: dict, tensors: Mapping[str, Raw], shards: int) -> None:
  """config.json, tokenizer.json, an index and `shards` files, tensors dealt in order."""
  path.mkdir(parents=True)
  (path / "config.json").write_text(json.dumps(config))
  (path / "tokenizer.json").write_text(tokenizer().to_str())
  weight_map, names = {}, list(tensors)
  for i, positions in enumerate(np.array_split(np.arange(len(names)), shards), 1):
    file = f"model-{i:05}-of-{shards:05}.safetensors"
    shard = {names[j]: tensors[names[j]] for j in positions}
    write_file(path / file, header_of(shard), b"".join(t.data for t in shard.values()))
    weight_map |= dict.fromkeys(shard, file)
  index = {"metadata": {}, "weight_map": weight_map}
  (path / "model.safetensors.index.json").write_text(json.dumps(index))


def read_folder(path: pathlib.Path) -> dict[str, Raw]:
  """All tensors of a folder by its files' headers, with which the index must agree."""
  found = {}
  weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
  for file in sorted(path.glob("*.safetensors")):
    content = file.read_bytes()
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    for name, entry in json.loads(content[8:begin]).items():
      if name == "__metadata__":
        continue
      a, b = entry["data_offsets"]
      found[name] = Raw(entry["dtype"], tuple(entry["shape"]), content[begin + a : begin + b])
      assert weight_map.pop(name) == file.name
  assert weight_map == {}
  return found


def tokenizer() -> tokenizers.Tokenizer:
  """A byte-level BPE with three special tokens: 0 ends a text, 2 is padding."""
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=280,
    special_tokens=["<|endoftext|>", "<|bos|>", "<|pad|>"],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  bpe.train_from_iterator([TEXT], trainer)
  return bpe


def primes_from(start: int, count: int, taken: set[int]) -> list[int]:
  found, n = [], start
  while len(found) < count:
    if n > 1 and n not in taken and all(n % d for d in range(2, math.isqrt(n) + 1)):
      found.append(n)
      taken.add(n)
    n += 1
  return found


# --- DeepSeek-V4.1 --------------------------------------------------------------------------

V41_LAYERS = (1, 3)
V41 = {  # text_config; D is no multiple of 32, so a block of the projection holds two branches
  "engram_layer_ids": list(V41_LAYERS),
  "engram_vocab_size": 53,
  "engram_max_ngram_size": 4,
  "engram_n_heads": 2,
  "engram_head_dim": 64,
  "engram_pad_id": 2,
  "hidden_size": 40,
  "hc_mult": 2,
  "vocab_size": 300,  # more than the tokenizer has
  "rms_norm_eps": 1e-20,
}


def v41_primes(text: dict = V41) -> dict[int, list[int]]:
  taken: set[int] = set()
  heads, orders = text["engram_n_heads"], text["engram_max_ngram_size"] - 1
  take = lambda: primes_from(text["engram_vocab_size"], heads, taken)
  return {layer: [p for _ in range(orders) for p in take()] for layer in text["engram_layer_ids"]}


def v41_config(compressed: int) -> dict:
  rows = [sum(primes) for primes in v41_primes().values()]
  more = {"engram_num_embeddings": rows, "engram_compressed_vocab_size": compressed}
  return {"model_type": "deepseek_v41", "text_config": V41 | more}


def v41_tensors(seed: int = 0) -> dict[str, Raw]:
  """Random bytes that are finite numbers; scales around one."""
  rng = np.random.default_rng(seed)
  C, D, G = V41["engram_head_dim"], V41["hidden_size"], V41["hc_mult"]
  found = {}
  for layer, primes in v41_primes().items():
    R, M, X = sum(primes), len(primes) * C, (G + 1) * D
    name = f"layers.{layer}.engram."
    found[name + "embed.weight"] = fp8(rng, (R, C))
    found[name + "embed.scale"] = e8m0(rng, (R, C // 32))
    found[name + "wkv.weight"] = fp8(rng, (X, M))
    found[name + "wkv.scale"] = e8m0(rng, (-(-X // 32), -(-M // 32)))
    found[name + "q_weight"] = bf16(rng.normal(size=(G, D)))
    found[name + "k_weight"] = bf16(rng.normal(size=(G, D)))
  found["layers.0.attn.wq.weight"] = bf16(rng.normal(size=(4, 4)))  # no memory's
  return found


# --- Qwen3.8-Flash-Next ---------------------------------------------------------------------

PLE = "model.language_model.layers.1.ple."
QWEN_PRIMES = (101, 103, 107, 109)
QWEN = {
  "ple_layer_ids": [2],
  "ple_embed_dim": 32,
  "ple_conv_kernel_size": 4,
  "ngram_size": 3,
  "heads_per_ngram": 2,
  "ngram_vocab_size_base": 101,
  "make_ngram_vocab_size_divisible_by": 128,
  "split_ngram_parts": 8,
  "hidden_size": 16,
  "hc_count": 2,
  "vocab_size": 300,
  "eos_token_id": 0,
  "rms_norm_eps": 1e-6,
}


def splitmix64(state: int) -> int:
  mask = 2**64 - 1
  z = (state + 0x9E3779B97F4A7C15) & mask
  z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
  z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
  return z ^ (z >> 31)


def qwen_multipliers() -> list[int]:
  half = ((2**63 - 1) // QWEN["vocab_size"]) // 2
  states = [(1234 + 0x9E3779B97F4A7C15 * (i + 1)) % 2**64 for i in range(3)]
  return [2 * (splitmix64(state) % half) + 1 for state in states]


def qwen_tensors(dtype: str = "BF16", seed: int = 0) -> dict[str, Raw]:
  rng = np.random.default_rng(seed)
  M, D, G, W = 32, QWEN["hidden_size"], QWEN["hc_count"], QWEN["ple_conv_kernel_size"]
  parts = QWEN["split_ngram_parts"]
  padded = -(-sum(QWEN_PRIMES) // 128) * 128
  found = {}
  for i in range(parts):
    shape = (padded // parts, M // 4)
    shard = fp8(rng, shape) if dtype == "F8_E4M3" else bf16(rng.normal(size=shape))
    found[PLE + f"ple_embedding.ngram_embedding.shard_{i}.weight"] = shard
  if dtype == "F8_E4M3":
    found[PLE + "ple_embedding.ngram_embedding.weight_scale"] = bf16(np.array([0.01171875]))
  offsets = np.cumsum([0, *QWEN_PRIMES[:-1]])
  constants = {
    "layer_multipliers": qwen_multipliers(),
    "ngram_heads_vocab_sizes": QWEN_PRIMES,
    "ngram_heads_offsets": offsets,
  }
  for name, values in constants.items():
    array = np.array(values, "<i8")
    found[PLE + f"ple_embedding.{name}"] = Raw("I64", array.shape, array.tobytes())
  shapes = {"key_proj": (G * D, M), "value_proj": (D, M), "conv1d": (G * D, 1, W)}
  shapes |= dict.fromkeys(("norm_key", "norm_query", "norm_conv"), (G * D,))
  for name, shape in shapes.items():
    found[PLE + f"{name}.weight"] = bf16(rng.normal(size=shape))
  return found


# --- dtypes, by their bits ------------------------------------------------------------------


def fp8(rng: np.random.Generator, shape: tuple[int, ...]) -> Raw:
  """Random E4M3 bytes without the two that are no number."""
  codes = rng.integers(0, 256, size=shape, dtype=np.uint8)
  codes[(codes & 0x7F) == 0x7F] = 0
  return Raw("F8_E4M3", shape, codes.tobytes())


def e8m0(rng: np.random.Generator, shape: tuple[int, ...]) -> Raw:
  codes = rng.integers(115, 125, size=shape, dtype=np.uint8)
  return Raw("F8_E8M0", shape, codes.tobytes())


def bf16(values: np.ndarray) -> Raw:
  """The upper halves of float32s."""
  halves = (np.asarray(values, "<f4").view("<u4") >> 16).astype("<u2")
  return Raw("BF16", halves.shape, halves.tobytes())


def numbers(tensor: Raw) -> np.ndarray:
  """float32 (or int64) values of a stored tensor, from its bits."""
  if tensor.dtype == "I64":
    return np.frombuffer(tensor.data, "<i8").reshape(tensor.shape)
  if tensor.dtype == "F32":
    return np.frombuffer(tensor.data, "<f4").reshape(tensor.shape)
  if tensor.dtype == "BF16":
    halves = np.frombuffer(tensor.data, "<u2").reshape(tensor.shape).astype("<u4")
    return (halves << 16).view("<f4")
  codes = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape).astype(np.int64)
  if tensor.dtype == "F8_E8M0":
    return np.exp2(codes - 127.0).astype(np.float32)
  sign, exponent, mantissa = codes >> 7, (codes >> 3) & 15, codes & 7
  normal = (1 + mantissa / 8) * np.exp2(exponent - 7.0)
  value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
  return np.where(sign == 1, -value, value).astype(np.float32)
