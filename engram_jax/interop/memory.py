"""What every layout comes down to: tables of rows, and the modules that read them."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import pydantic
import tokenizers

from engram_jax.config import EngramConfig, explain
from engram_jax.errors import ConfigError
from engram_jax.interop.folder import Folder
from engram_jax.memory.codecs import decode
from engram_jax.memory.compress import TokenCompressor, check_ids
from engram_jax.memory.hash_layout import HashLayout

MAX_VOCAB = 2**24  # ids of any vocabulary; a token map of more is somebody's mistake
Fields = TypeVar("Fields", bound=pydantic.BaseModel)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """One layer's rows in a folder: one tensor, or several of equal length end to end.

  `scales` names a tensor with a scale per 32 columns of every row; `factor` scales all rows alike.
  """

  folder: Folder
  parts: tuple[str, ...]
  rows: int  # without padding
  width: int
  scales: str | None = None
  factor: float = 1.0

  def stored(self, row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows [..., C] as they are stored, and their scales [..., C / 32] where each row has some.

    Raises ValueError naming an id outside [0, rows).
    """
    row_ids = np.asarray(row_ids)
    check_ids(row_ids, self.rows, "row id")
    each = self.folder.tensor(self.parts[0]).shape[0]
    pieces = row_ids // each
    rows = None
    for piece in np.unique(pieces):
      here = pieces == piece
      found = self.folder.rows(self.parts[piece], row_ids[here] - piece * each)
      if rows is None:
        rows = np.empty((*row_ids.shape, self.width), found.dtype)
      rows[here] = found
    if rows is None:
      rows = self.folder.read(self.parts[0], 0, 0).reshape(*row_ids.shape, self.width)
    return rows, None if self.scales is None else self.folder.rows(self.scales, row_ids)

  def __call__(self, row_ids: np.ndarray) -> np.ndarray:
    """Rows float32 [..., C]; each distinct one is read once."""
    return self._decoded(*self.stored(row_ids))

  def blocks(
    self, most: int = 1 << 16, start: int = 0, stop: int | None = None
  ) -> Iterator[np.ndarray]:
    """Rows [start, stop) in order, float32 [n, C] with n up to `most`, read from end to end."""
    each = self.folder.tensor(self.parts[0]).shape[0]
    stop = self.rows if stop is None else stop
    while start < stop:
      piece, first = divmod(start, each)
      last = min(stop - piece * each, each, first + most)
      scales = self.scales and self.folder.read(self.scales, first, last)
      yield self._decoded(self.folder.read(self.parts[piece], first, last), scales)
      start += last - first

  def _decoded(self, rows: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    if scales is None:
      return rows.astype(np.float32) * np.float32(self.factor)
    flat = decode(rows.reshape(-1, self.width), scales.reshape(-1, scales.shape[-1]), "fp8_e4m3")
    return flat.reshape(rows.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
  """The memories of a checkpoint, verified; letters as in the package's docstring.

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
  tables: Mapping[int, Table]
  parameters: Callable[[int], dict[str, np.ndarray]]
  tensors: tuple[str, ...]


def require_equal(where: object, name: str, stored: object, rebuilt: object) -> None:
  """ConfigError with both values unless what a checkpoint says is what its config gives."""
  if stored != rebuilt:
    raise ConfigError(f"{where}: {name} is {stored} there but {rebuilt} when rebuilt")


def require_expressible(
  memory: Memory, layout: str, fields: Mapping[str, tuple[object, bool, object]]
) -> None:
  """ConfigError for the first field (its value, whether a layout can say it, what it could say)."""
  for name, (value, sayable, instead) in fields.items():
    if not sayable:
      raise ConfigError(
        f"--layout {layout} cannot hold this {memory.kind} memory: its {name} is {value}, "
        f"and would have to be {instead}"
      )


def parsed(model: type[Fields], tree: dict, where: pathlib.Path) -> Fields:
  """The fields of a config.json that matter here; ConfigError naming those that are not right."""
  try:
    return model.model_validate(tree)
  except pydantic.ValidationError as error:
    raise ConfigError(explain(error, str(where))) from None


def module_config(folder: Folder, **fields: object) -> EngramConfig:
  """An EngramConfig without bias; ConfigError for what cannot be one."""
  try:
    return EngramConfig(bias=False, gate="signed_sqrt", **fields)
  except pydantic.ValidationError as error:
    raise ConfigError(explain(error, str(folder.path))) from None


def hash_layout(folder: Folder, cfg: EngramConfig, compressor: TokenCompressor) -> HashLayout:
  """The hash constants, rebuilt; ConfigError where there can be none."""
  if cfg.pad_id >= compressor.table.size:
    raise ConfigError(
      f"{folder.path}: pad id {cfg.pad_id} is outside the {compressor.table.size:,} token ids"
    )
  return HashLayout.of(cfg, compressor, str(folder.path))
