"""The memory of a checkpoint folder in any format: tables of rows, and the modules that read them.

Local letter: n, rows of one block.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import pydantic
import tokenizers

from engram_jax.config import EngramConfig, explain
from engram_jax.errors import ConfigError
from engram_jax.interop.folder import Folder
from engram_jax.memory.codecs import decode
from engram_jax.memory.compress import TokenCompressor, check_ids
from engram_jax.memory.hash_layout import HashLayout

MAX_VOCAB = 2**24  # ids of any vocabulary: a larger token map is a mistake
FieldsModel = TypeVar("FieldsModel", bound=pydantic.BaseModel)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTable:
  """One layer's rows in a folder.

  Attributes:
    tensors: names of the tensors that hold the rows, of equal length, in order.
    rows: without padding.
    width: C.
    scale_tensor: name of a tensor with a scale per 32 columns of every row, if there is one.
    scale: multiplies all rows where there is no such tensor.
  """

  folder: Folder
  tensors: tuple[str, ...]
  rows: int
  width: int
  scale_tensor: str | None = None
  scale: float = 1.0

  def __call__(self, row_ids: np.ndarray) -> np.ndarray:
    """Reads rows, float32 [..., C]; each distinct one is read once.

    Raises ValueError naming an id outside [0, rows).
    """
    row_ids = np.asarray(row_ids)
    check_ids(row_ids, self.rows, "row id")
    rows_per_tensor = self._rows_per_tensor()
    tensor_of = row_ids // rows_per_tensor
    dtype = self.folder.read(self.tensors[0], 0, 0).dtype
    stored = np.empty((*row_ids.shape, self.width), dtype)
    for i in np.unique(tensor_of):
      in_tensor = tensor_of == i
      ids = row_ids[in_tensor] - i * rows_per_tensor
      stored[in_tensor] = self.folder.read_rows(self.tensors[i], ids)
    scales = self.folder.read_rows(self.scale_tensor, row_ids) if self.scale_tensor else None
    return self._decode(stored, scales)

  def blocks(
    self, max_rows: int = 1 << 16, start: int = 0, stop: int | None = None
  ) -> Iterator[np.ndarray]:
    """Yields rows [start, stop) in order, float32 [n, C] with n up to `max_rows`."""
    rows_per_tensor = self._rows_per_tensor()
    stop = self.rows if stop is None else stop
    while start < stop:
      i, first = divmod(start, rows_per_tensor)
      last = min(stop - i * rows_per_tensor, rows_per_tensor, first + max_rows)
      scales = self.folder.read(self.scale_tensor, first, last) if self.scale_tensor else None
      yield self._decode(self.folder.read(self.tensors[i], first, last), scales)
      start += last - first

  def _rows_per_tensor(self) -> int:
    return self.folder.tensor(self.tensors[0]).shape[0]

  def _decode(self, stored: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """Decodes rows [..., C] with their scales [..., C / 32], if each has some, to float32."""
    if scales is None:
      return stored.astype(np.float32) * np.float32(self.scale)
    values = stored.reshape(-1, self.width)
    rows = decode(values, scales.reshape(-1, scales.shape[-1]), "fp8_e4m3")
    return rows.reshape(stored.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
  """The memories of a checkpoint, verified.

  Attributes:
    kind: "engram_jax", "deepseek_v41" or "qwen_ple".
    cfg: of the module; `layers` are 0-based blocks.
    width, branches: D and G.
    tokenizer, compressor, layout: from text to row ids.
    tables: by layer.
    parameters: float32 arrays of a layer's module, with the names of `memory.engram.Engram`.
    tensors: every tensor of the folder that belongs to a memory, in the folder's order.
  """

  kind: str
  cfg: EngramConfig
  width: int
  branches: int
  tokenizer: tokenizers.Tokenizer
  compressor: TokenCompressor
  layout: HashLayout
  tables: Mapping[int, StoredTable]
  parameters: Callable[[int], dict[str, np.ndarray]]
  tensors: tuple[str, ...]


def require_equal(where: object, name: str, stored: object, rebuilt: object) -> None:
  """Raises ConfigError with both values where a stored one is not the one that was rebuilt."""
  if stored != rebuilt:
    old, new = ("missing" if x is None else x for x in (stored, rebuilt))
    raise ConfigError(f"{where}: {name} is {old} there but {new} when rebuilt")


def require_expressible(
  memory: Memory, kind: str, fields: Mapping[str, tuple[object, bool, object]]
) -> None:
  """Raises ConfigError for the first field of a memory that a format cannot express.

  Args:
    kind: of the format, as `--layout` names it.
    fields: by name, the value, whether the format can express it, and one that it could.
  """
  for name, (value, is_expressible, valid) in fields.items():
    if not is_expressible:
      raise ConfigError(
        f"--layout {kind} cannot hold this {memory.kind} memory: its {name} is {value}, "
        f"and would have to be {valid}"
      )


def parse_fields(model: type[FieldsModel], tree: dict, where: pathlib.Path) -> FieldsModel:
  """Validates the fields of a config.json; ConfigError naming those that are wrong."""
  try:
    return model.model_validate(tree)
  except pydantic.ValidationError as error:
    raise ConfigError(explain(error, str(where))) from None


def text_config(config: dict) -> dict:
  """The part of a config.json that describes the language model; empty where it is no object."""
  inner = config.get("text_config", config)
  return inner if isinstance(inner, dict) else {}


def make_engram_config(folder: Folder, **fields: Any) -> EngramConfig:
  """An EngramConfig without bias; ConfigError for fields that it cannot have."""
  try:
    return EngramConfig(bias=False, gate="signed_sqrt", **fields)
  except pydantic.ValidationError as error:
    raise ConfigError(explain(error, str(folder.path))) from None


def rebuild_hash_layout(
  folder: Folder, cfg: EngramConfig, compressor: TokenCompressor
) -> HashLayout:
  """Rebuilds the hash constants of a folder's memory; ConfigError where there can be none."""
  if cfg.pad_id >= compressor.table.size:
    raise ConfigError(
      f"{folder.path}: pad id {cfg.pad_id} is outside the {compressor.table.size:,} token ids"
    )
  layout = HashLayout.of(cfg, compressor, str(folder.path))
  assert layout is not None, "the fields of both formats name a layer"
  return layout
