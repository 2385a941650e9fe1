"""Looks up a text in the memory of a checkpoint: canonical ids, row ids, rows, gates.

    with MemoryReader("path/to/checkpoint") as reader:
      reading = reader.read("Only Alexander the Great")
      reading.row_ids[1]                       # [T, J] of block 1
      delta, gate = reader.output(1, hidden_BTGD, reader.rows(1, reading.row_ids[1])[None])

The folder is one that `convert export` wrote, DeepSeek-V4.1's or Qwen3.8-Flash-Next's. Opening it
compares the rebuilt hash constants with the stored ones; rows and weights are read on request.
"""

import os
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engram_jax.errors import ConfigError
from engram_jax.interop import deepseek, engram_format, qwen
from engram_jax.interop.folder import Folder
from engram_jax.interop.memory import Memory
from engram_jax.memory.engram import Engram
from engram_jax.memory.hashing import row_ids
from engram_jax.memory.token_text import token_texts
from engram_jax.memory.vocabulary import encode_texts

FORMATS: tuple[ModuleType, ...] = (engram_format, deepseek, qwen)


class Reading(NamedTuple):
  """A text as a memory sees it.

  Attributes:
    token_ids: T of them.
    tokens: the text that each id alone decodes to.
    canonical_ids: int32 [T].
    row_ids: by layer, int32 [T, J], offsets included.
  """

  token_ids: list[int]
  tokens: list[str]
  canonical_ids: np.ndarray
  row_ids: dict[int, np.ndarray]


def open_memory(folder: Folder) -> Memory:
  """The verified memory of a folder in any of the formats.

  Raises ConfigError where the config is of none of them, or the folder does not fit its own.
  """
  for checkpoint_format in FORMATS:
    if checkpoint_format.matches(folder.config):
      return checkpoint_format.open_memory(folder)
  kinds = ", ".join(checkpoint_format.KIND for checkpoint_format in FORMATS)
  raise ConfigError(f"{folder.path}: config.json describes no memory of a known layout ({kinds})")


class MemoryReader:
  """The memory of a checkpoint folder; a context manager.

  Attributes:
    memory: kind, layout, tables and sizes (interop.memory.Memory).
    caveat: one line that says why files are not verified; None where they are.

  Raises ConfigError (code 2) for parts that do not fit together, StorageError (5) for damaged
  files.
  """

  def __init__(self, path: str | os.PathLike, *, verify: bool = True):
    """Opens a folder; verify: compare its files with its SHA256SUMS before they are used."""
    self._folder = Folder(path, verify=verify)
    self.caveat = self._folder.caveat
    self._modules: dict[int, Engram] = {}
    try:
      self.memory = open_memory(self._folder)
    except BaseException:
      self._folder.close()
      raise

  def __enter__(self) -> "MemoryReader":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def close(self) -> None:
    """Closes the folder's files."""
    self._folder.close()

  @property
  def layers(self) -> tuple[int, ...]:
    """The 0-based blocks that read a memory."""
    return self.memory.layout.layers

  @property
  def bytes_read(self) -> int:
    """Bytes read from tensor files so far, with their headers and for their verification."""
    return self._folder.bytes_read

  def read(self, text: str, special_tokens: bool = False) -> Reading:
    """Encodes a text; ConfigError where it has no tokens.

    special_tokens: adds those that the tokenizer puts around a text.
    """
    tokenizer = self.memory.tokenizer
    (ids,) = encode_texts(tokenizer, [text], "text", special=special_tokens)
    if not ids:
      raise ConfigError(f"text={text!r} has no tokens: give some text")
    canonical = self.canonical_ids(np.array(ids, np.int64))
    return Reading(
      token_ids=ids,
      tokens=token_texts(tokenizer, ids),
      canonical_ids=canonical,
      row_ids={layer: self.row_ids(layer, canonical[None])[0] for layer in self.layers},
    )

  def canonical_ids(self, token_ids: np.ndarray) -> np.ndarray:
    """Canonical ids, int32, of token ids of any shape; ValueError for ids outside [0, V)."""
    return self.memory.compressor(token_ids)

  def row_ids(
    self,
    layer: int,
    canonical_BT: np.ndarray,
    segments_BT: np.ndarray | None = None,
    mask_BT: np.ndarray | None = None,
  ) -> np.ndarray:
    """Row ids of a layer, int32 [B, T, J], offsets included.

    segments_BT, mask_BT: as in `memory.hashing.row_ids`.
    """
    ids_BTJ = row_ids(self.memory.layout, layer, canonical_BT, segments_BT, mask_BT=mask_BT)
    return np.asarray(ids_BTJ)

  def rows(self, layer: int, row_ids: np.ndarray) -> np.ndarray:
    """Dequantised rows, float32 [..., C], each read once; ValueError for ids outside the table."""
    return self.memory.tables[layer](row_ids)

  def module(self, layer: int) -> Engram:
    """The layer's module with the checkpoint's weights in float32; they are read once."""
    if layer not in self._modules:
      self._modules[layer] = _module(self.memory, layer)
    return self._modules[layer]

  def output(
    self,
    layer: int,
    hidden_BTGD: jax.Array,
    rows_BTM: jax.Array,
    mask_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Runs the module: (delta_BTGD that is added to the branches, gate_BTG).

    Args:
      hidden_BTGD: the residual branches at the block's entry; their dtype is the compute dtype.
      rows_BTM: rows of each token, end to end, or [B, T, J, C].
      mask_BT: bool; True where there is no text token: gate and delta are zero there (V4.1).

    Raises ValueError for a mask where the module has a convolution, which would look past it.
    """
    if mask_BT is not None and self.memory.cfg.conv_kernel:
      raise ValueError(f"a {self.memory.kind} memory has a convolution and takes no mask")
    delta, probes = self.module(layer)(hidden_BTGD, jnp.asarray(rows_BTM))
    gate = probes["gate"]
    if mask_BT is None:
      return delta, gate
    masked = jnp.asarray(mask_BT, bool)[..., None]
    return jnp.where(masked[..., None], 0, delta), jnp.where(masked, 0, gate)


def _module(memory: Memory, layer: int) -> Engram:
  make = lambda: Engram(memory.cfg, memory.width, memory.branches, rngs=nnx.Rngs(0))
  graphdef, shapes = nnx.split(nnx.eval_shape(make), nnx.Param)
  weights = {name: jnp.asarray(array) for name, array in memory.parameters(layer).items()}
  expected = {name: leaf.shape for name, leaf in nnx.to_pure_dict(shapes).items()}
  assert {name: weight.shape for name, weight in weights.items()} == expected
  return nnx.merge(graphdef, nnx.State(weights))
