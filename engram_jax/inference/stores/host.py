"""HostRows: tables in host memory, in any row encoding.

Local letters: N, ids of one layer.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from engram_jax.errors import StorageError
from engram_jax.inference.stores.base import RowStore, remaining_seconds
from engram_jax.memory.codecs import decode, encode, pack, row_bytes, unpack
from engram_jax.memory.hash_layout import HashLayout

BLOCK_ROWS = 4096  # encoded or decoded at once: temporaries stay in the processor's cache


class HostRows(RowStore):
  """Packed rows of each layer, uint8 [R, row_bytes], decoded as they are fetched."""

  level = "host"

  def __init__(
    self,
    packed: Sequence[np.ndarray],
    layout: HashLayout,
    token_map_digest: str,
    *,
    kind: str,
    width: int,
    dtype: np.typing.DTypeLike = np.float32,
  ):
    """Keeps `packed`, one array per layer of `layout`, as `pack` of memory/codecs.py makes them.

    Rows past the end of a layer are padding and never read. Raises ValueError for arrays that do
    not fit the layout.
    """
    super().__init__(layout, token_map_digest, width, dtype)
    if len(packed) != len(self.layers):
      raise ValueError(f"{len(packed)} tables for the {len(self.layers)} layers of the layout")
    size = row_bytes(kind, width)
    for layer, rows, table in zip(self.layers, self.rows, packed, strict=True):
      if table.dtype != np.uint8 or table.shape[1:] != (size,) or len(table) < rows:
        raise ValueError(
          f"layer {layer}: packed {kind} rows are uint8 [{rows} or more, {size}], "
          f"not {table.dtype} {list(table.shape)}"
        )
    self.kind = kind
    self._packed = tuple(packed)
    self._is_float32 = kind == "f32" and self.dtype == np.float32

  @classmethod
  def from_tables(
    cls,
    tables: Sequence[np.ndarray],
    layout: HashLayout,
    token_map_digest: str,
    *,
    kind: str = "f32",
    dtype: np.typing.DTypeLike = np.float32,
  ) -> "HostRows":
    """Packs tables [R or more, C] of any float type; see `from_blocks`."""
    table_by_layer = dict(zip(layout.layers, tables, strict=True))

    def blocks(layer: int) -> Iterator[np.ndarray]:
      table, rows = table_by_layer[layer], layout.rows[layer]
      return (np.asarray(table[i : min(i + BLOCK_ROWS, rows)]) for i in range(0, rows, BLOCK_ROWS))

    width = tables[0].shape[1]
    return cls.from_blocks(blocks, layout, token_map_digest, width, kind=kind, dtype=dtype)

  @classmethod
  def from_blocks(
    cls,
    blocks: Callable[[int], Iterable[np.ndarray]],
    layout: HashLayout,
    token_map_digest: str,
    width: int,
    *,
    kind: str = "f32",
    dtype: np.typing.DTypeLike = np.float32,
  ) -> "HostRows":
    """Packs the rows that `blocks` returns for a layer's id, in order, in blocks [N, C] of any
    float type and any N.

    Only the packed rows and one block are held. Raises StorageError for rows that are not finite.
    """
    tables = []
    for layer in layout.layers:
      rows, start = layout.rows[layer], 0
      table = np.empty((rows, row_bytes(kind, width)), np.uint8)
      for packed in pack_blocks(layer, blocks(layer), rows, kind):
        table[start : start + len(packed)] = packed
        start += len(packed)
      tables.append(table)
    return cls(tables, layout, token_map_digest, kind=kind, width=width, dtype=dtype)

  @property
  def bytes(self) -> int:
    """Bytes of the packed rows."""
    return sum(table.nbytes for table in self._packed)

  def _reads_distinct(self) -> bool:
    return not self._is_float32

  def _read(
    self, ids_by_layer: Sequence[np.ndarray], outs: Sequence[np.ndarray], until: float | None
  ) -> None:
    begin = time.perf_counter()
    for table, ids, out in zip(self._packed, ids_by_layer, outs, strict=True):
      for start in range(0, len(ids), BLOCK_ROWS):
        remaining_seconds(until)
        block = slice(start, start + BLOCK_ROWS)
        read_rows(table, ids[block], out[block], self.kind)
    rows = sum(map(len, ids_by_layer))
    size = rows * row_bytes(self.kind, self.width)
    self.telemetry.add(hits=rows, bytes=size, seconds=time.perf_counter() - begin)


def read_rows(packed: np.ndarray, ids_N: np.ndarray, out_NC: np.ndarray, kind: str) -> None:
  """Decodes rows `ids_N`, which are in range, of a packed table [R, row_bytes] into `out_NC`."""
  if kind == "f32" and out_NC.dtype == np.float32:
    np.take(packed.view("<f4"), ids_N, axis=0, out=out_NC, mode="clip")
  else:
    rows = np.take(packed, ids_N, axis=0, mode="clip")
    out_NC[:] = decode(*unpack(rows, kind, out_NC.shape[1]), kind)


def pack_blocks(
  layer: int, blocks: Iterable[np.ndarray], rows: int, kind: str
) -> Iterator[np.ndarray]:
  """Yields packed rows, uint8 [n, row_bytes] with n at most BLOCK_ROWS, of blocks of a layer's
  rows; StorageError for rows that are not finite."""
  start = 0
  for block in blocks:
    for i in range(0, len(block), BLOCK_ROWS):
      part = np.asarray(block[i : i + BLOCK_ROWS], np.float32)
      try:
        yield pack(*encode(part, kind))
      except ValueError as error:
        raise StorageError(f"layer {layer}, from row {start} on: {error}") from None
      start += len(part)
  assert start == rows, f"layer {layer}: {start} rows were given for {rows}"
