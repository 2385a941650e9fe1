"""No row of a damaged table file is used: it is right, or its fetch raises StorageError."""

import collections
import hashlib
import pathlib
import threading

import numpy as np
import pytest

from engram_jax.errors import StorageError
from engram_jax.inference.stores import file as file_rows
from engram_jax.inference.stores.cache import HostCache
from engram_jax.inference.stores.checksums import Checksums
from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.table_file import TableHeader, gaps
from engram_jax.inference.stores.write import write_table_file
from engram_jax.memory.codecs import decode, encode, pack
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hash_layout import HashLayout

LAYOUT = HashLayout.build("engram", [1, 3], [53, 61], 3, 2, 200, 2)
TOKENS = TokenCompressor.identity(200).digest
VERSION_1 = pathlib.Path(__file__).with_name("version_1.engram")  # as 0.1.0 wrote it
BLOCK = 4096
# Rows of 264 bytes straddle blocks, of 1,024 never do, of 4,800 lie in two or three.
SHAPES = {"fp8_e4m3": 256, "bf16": 512, "f32": 1200}


def numbers(layer: int, width: int) -> np.ndarray:
  """Rows [R, C] of a layer, small integers."""
  i, j = np.indices((LAYOUT.rows[layer], width))
  return ((31 * i + 7 * j + layer) % 257 - 128).astype(np.float32)


def decoded(kind: str, width: int) -> dict[int, np.ndarray]:
  """The rows that a fetch returns, by layer."""
  return {x: decode(*encode(numbers(x, width), kind), kind) for x in LAYOUT.layers}


class Table:
  """A sound file's bytes and rows."""

  def __init__(self, path: pathlib.Path, kind: str, width: int):
    self.content, self.rows = path.read_bytes(), decoded(kind, width)


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> list[Table]:
  folder, result = tmp_path_factory.mktemp("tables"), []
  for kind, width in SHAPES.items():
    rows = lambda layer, width=width: [numbers(layer, width)]
    write_table_file(folder / kind, rows, LAYOUT, TOKENS, kind=kind, width=width)
    result.append(Table(folder / kind, kind, width))
  return result


def damage(rng: np.random.Generator, content: bytes) -> tuple[str, bytes]:
  """(kind of damage, the bytes after it); they differ from those before."""
  kind = rng.choice(["bit", "byte", "cut", "grown", "zeros", "noise", "swapped", "repeated"])
  data = bytearray(content)
  at, pages = int(rng.integers(len(data))), len(data) // BLOCK
  page, other = (BLOCK * int(i) for i in rng.choice(pages, 2, replace=False))
  if kind == "bit":
    data[at] ^= 1 << int(rng.integers(8))
  elif kind == "byte":
    data[at] ^= int(rng.integers(1, 256))
  elif kind == "cut":
    del data[at:]
  elif kind == "grown":
    data += rng.bytes(int(rng.integers(1, 2 * BLOCK)))
  elif kind == "zeros":
    data[page : page + BLOCK] = bytes(BLOCK)
  elif kind == "noise":
    size = min(int(rng.integers(1, 2 * BLOCK)), len(data) - at)
    data[at : at + size] = rng.bytes(size)
  elif kind == "swapped":
    first, second = data[page : page + BLOCK], data[other : other + BLOCK]
    data[page : page + BLOCK], data[other : other + BLOCK] = second, first
  else:
    data[page : page + BLOCK] = data[other : other + BLOCK]
  return (kind, bytes(data)) if data != content else damage(rng, content)


def outcomes(path: pathlib.Path, rows: dict[int, np.ndarray]) -> collections.Counter:
  """Counts what fetches of every row do: "raised", "right" or "silent"."""
  counts, errors = collections.Counter(), []

  def fetch(call, expected) -> None:
    try:
      is_right = np.array_equal(call(), expected)
    except StorageError as error:
      errors.append(str(error))
      counts["raised"] += 1
    else:
      counts["right" if is_right else "silent"] += 1

  try:
    store = FileRows(path, threads=2)
  except StorageError as error:
    return collections.Counter(raised=int(str(error).startswith(str(path))))
  with store, HostCache(FileRows(path, threads=2), 1 << 20) as cache:
    for _ in range(2):  # what raised once raises again
      for layer, table in rows.items():
        ids = np.arange(len(table))
        for some in np.array_split(ids, 6):  # in this thread, once they are verified
          fetch(lambda: store.fetch_layer(layer, some), table[some])  # noqa: B023
        fetch(lambda: store.fetch_layer(layer, ids), table)  # noqa: B023
        fetch(lambda: cache.fetch_layer(layer, ids[::5]), table[::5])  # noqa: B023
    smallest = min(map(len, rows.values()))
    both = np.tile(np.arange(smallest), (len(rows), 1))
    fetch(lambda: store.fetch(both), [table[:smallest] for table in rows.values()])
    with pytest.raises(StorageError):  # whatever the damage, as this reads all
      store.in_memory()
    with pytest.raises(StorageError):
      store.verify()
  assert all(error.startswith(str(path)) and "\n" not in error for error in errors), errors
  return counts


def damage_all(tables: list[Table], path: pathlib.Path, times: int) -> None:
  """Damages files `times` times; prints what became of them, and asserts that nothing is silent."""
  rng, by_kind = np.random.default_rng(times), collections.defaultdict(collections.Counter)
  for i in range(times):
    table = tables[i % len(tables)]
    kind, content = damage(rng, table.content)
    path.write_bytes(content)
    by_kind[kind] += outcomes(path, table.rows)
    by_kind[kind]["files"] += 1
  for kind, counts in sorted(by_kind.items()):
    print(f"{kind:9}", "  ".join(f"{name} {n:,}" for name, n in sorted(counts.items())))
  total = sum(by_kind.values(), collections.Counter())
  print(f"{times} damaged files: {total['silent']} fetches returned other rows")
  assert total["files"] == times
  assert total["raised"]
  assert total["silent"] == 0


def test_no_row_of_a_damaged_file_is_used(tables, tmp_path):
  damage_all(tables, tmp_path / "t", 100)


@pytest.mark.slow
def test_no_row_of_a_thousand_damaged_files_is_used(tables, tmp_path):
  damage_all(tables, tmp_path / "t", 1000)


def test_rows_beside_a_damaged_block_are_still_read(tables, tmp_path):
  """And the error names the layer and the rows."""
  table, path = tables[0], tmp_path / "t"
  path.write_bytes(table.content)
  with FileRows(path) as store:
    entry = store.header.tables[1]
  content = bytearray(table.content)
  content[entry.offset + BLOCK + 10] ^= 1  # rows 15 to 31 of 264 bytes lie in that block
  path.write_bytes(content)
  with FileRows(path) as store:
    ids = np.setdiff1d(np.arange(entry.rows), np.arange(15, 32))
    assert np.array_equal(store.fetch_layer(3, ids), table.rows[3][ids])
    for ids in ([15], [31], np.arange(entry.rows)):
      with pytest.raises(StorageError) as caught:
        store.fetch_layer(3, np.array(ids))
      assert str(caught.value) == f"{path} is damaged: layer 3 rows 15 to 31 have changed"
    assert np.array_equal(store.fetch_layer(3, np.array([14, 32])), table.rows[3][[14, 32]])


def test_a_block_is_compared_when_it_is_first_read(tables, tmp_path, monkeypatch):
  path, compared = tmp_path / "t", []
  path.write_bytes(tables[0].content)
  with FileRows(path) as store:
    compare = store._blocks._compare
    monkeypatch.setattr(
      store._blocks, "_compare", lambda block, data: (compared.append(block), compare(block, data))
    )
    one = np.array([15])  # straddles two blocks
    for _ in range(3):
      store.fetch_layer(1, one)
    assert compared == [0, 1]
    store.drop_page_cache()
    store.fetch_layer(1, one)
    assert compared == [0, 1, 0, 1]
    compared.clear()
    ids = np.arange(store.rows[0])
    store.fetch_layer(1, ids)
    assert set(compared) == set(range(2, -(-264 * len(ids) // BLOCK)))  # some by two threads
    compared.clear()
    store.fetch_layer(1, ids)
    assert compared == []


def test_threads_that_share_a_damaged_block_all_fail(tables, tmp_path):
  table, path = tables[0], tmp_path / "t"
  with open(path, "wb") as file:
    file.write(table.content)
  with FileRows(path) as store:
    at = store.header.tables[0].offset + 5 * BLOCK
  content = bytearray(table.content)
  content[at] ^= 128
  path.write_bytes(content)
  results, begin = [], threading.Barrier(8)

  def fetch(store: FileRows, ids: np.ndarray) -> None:
    begin.wait()
    try:
      results.append(np.array_equal(store.fetch_layer(1, ids), table.rows[1][ids]))
    except StorageError:
      results.append("raised")

  with FileRows(path, threads=8) as store:
    ids = np.arange(5 * BLOCK // 264 + 1)
    pairs = [ids, ids[:-2]] * 4  # with a row of the block, and without
    threads = [threading.Thread(target=fetch, args=(store, ids)) for ids in pairs]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  assert collections.Counter(results) == {"raised": 4, True: 4}


@pytest.mark.parametrize("piece", [2 * BLOCK, 1 << 22])
def test_a_load_in_pieces_finds_the_block(tables, tmp_path, monkeypatch, piece):
  monkeypatch.setattr(file_rows, "PIECE", piece)
  path, table = tmp_path / "t", tables[2]
  path.write_bytes(table.content)
  with FileRows(path) as store, store.in_memory() as host:
    offset, rows = store.header.tables[1].offset, store.rows[1]
    assert np.array_equal(host.fetch_layer(3, np.arange(rows)), table.rows[3])
  content = bytearray(table.content)
  content[offset + 4800 * 100] ^= 1
  path.write_bytes(content)
  with FileRows(path) as store, pytest.raises(StorageError, match="layer 3 rows 99 to 100 have"):
    store.in_memory()


def test_what_is_not_verified_is_read_as_it_is(tables, tmp_path):
  """Neither rows nor checksums are looked at with verify=False."""
  path, table = tmp_path / "t", tables[2]
  path.write_bytes(table.content)
  with FileRows(path) as store:
    offset = store.header.tables[0].offset
  content = bytearray(table.content)
  content[offset] ^= 1
  content[-1] ^= 1
  path.write_bytes(content)
  with pytest.raises(StorageError, match="its checksums have changed"):
    FileRows(path)
  with FileRows(path, verify=False) as store, store.in_memory() as host:
    ids = np.arange(store.rows[0])
    for rows in (store, host):
      assert (rows.fetch_layer(1, ids) != table.rows[1]).sum() == 1


# --- format 1 -------------------------------------------------------------------------------


def write_version_1(path: pathlib.Path, kind: str, width: int) -> TableHeader:
  """Writes a file of format 1 as 0.1.0 did; of f32 rows of 4,800 bytes its tables have a block in
  common."""
  header = TableHeader.plan(LAYOUT, TOKENS, kind, width, version=1)
  checksums = Checksums(header.block_bytes)
  with open(path, "wb") as file:
    file.seek(header.tables[0].offset)
    for table, gap in gaps(header):
      for data in (pack(*encode(numbers(table.layer, width), kind)).tobytes(), bytes(gap)):
        file.write(data)
        checksums.add(memoryview(data))
    digest = hashlib.sha256(checksums.to_bytes()).hexdigest()
    file.write(checksums.to_bytes())
    file.seek(0)
    file.write(header.model_copy(update={"checksums_sha256": digest}).to_bytes())
  return header


def test_a_file_of_format_1_is_read_and_verified(tmp_path):
  with FileRows(VERSION_1) as store, store.in_memory() as host:
    store.verify()
    store.require(LAYOUT, TOKENS)
    assert store.header.version == 1
    for layer, rows in decoded("int8", 8).items():
      for held in (store, host):
        assert np.array_equal(held.fetch_layer(layer, np.arange(len(rows))), rows)
  write_version_1(tmp_path / "t", "int8", 8)
  with open(VERSION_1, "rb") as file, FileRows(tmp_path / "t") as store:
    tables_at = store.header.tables[0].offset
    assert file.read()[tables_at:] == (tmp_path / "t").read_bytes()[tables_at:]


@pytest.mark.parametrize("size", ["small", "of several blocks"])
def test_no_row_of_a_damaged_file_of_format_1_is_used(tmp_path, size):
  if size == "small":
    table = Table(VERSION_1, "int8", 8)
  else:
    header = write_version_1(tmp_path / "sound", "f32", 1200)
    assert header.blocks == 3
    table = Table(tmp_path / "sound", "f32", 1200)
  damage_all([table], tmp_path / "t", 30)


def test_a_file_says_one_format_alone(tmp_path, tables):
  """The version is not covered by the header's digest, but by what the header says of blocks."""
  for content, other in ((tables[0].content, 1), (VERSION_1.read_bytes(), 2)):
    path = tmp_path / "t"
    path.write_bytes(content[:8] + other.to_bytes(4, "little") + content[12:])
    with pytest.raises(StorageError, match=f"blocks of .* bytes in format {other}"):
      FileRows(path)
