"""Every row store returns the rows of a expected_rows array, or raises a one-line error."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import weakref

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import engram_jax
from engram_jax.errors import ConfigError, StorageError
from engram_jax.inference.stores import file as file_rows
from engram_jax.inference.stores import table_file
from engram_jax.inference.stores.base import store_digest
from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.host import HostRows
from engram_jax.inference.stores.write import write_table_file
from engram_jax.memory.codecs import KINDS, decode, encode
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hash_layout import HashLayout

ROOT = pathlib.Path(engram_jax.__file__).parents[1]
WIDTH = 40
LAYOUT = HashLayout.build("engram", [1, 3], [53, 61], 3, 2, 200, 2)
TOKENS = TokenCompressor.identity(200).digest
reproducible = settings(deadline=None, derandomize=True, database=None)
SMALLEST = min(LAYOUT.rows.values())
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def tables() -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  return [rng.normal(size=(LAYOUT.rows[x], WIDTH)).astype(np.float32) for x in LAYOUT.layers]


def blocks_of(tables, size=50):
  by_layer = dict(zip(LAYOUT.layers, tables, strict=True))
  return lambda layer: (by_layer[layer][i : i + size] for i in range(0, len(by_layer[layer]), size))


def write(path, tables, kind="f32", **options):
  options = {"kind": kind, "width": WIDTH} | options
  write_table_file(path, blocks_of(tables), LAYOUT, TOKENS, **options)
  return path


@pytest.fixture(scope="module")
def files(tables, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tables")
  return {kind: write(folder / f"{kind}.engram", tables, kind) for kind in KINDS}


@pytest.fixture(params=["host", "file", "in memory"])
def make(request, tables, files):
  """make(kind, dtype) -> a store of each class over the same tables."""
  stores = []

  def make_store(kind="f32", dtype=np.float32):
    if request.param == "host":
      store = HostRows.from_tables(tables, LAYOUT, TOKENS, kind=kind, dtype=dtype)
    else:
      store = FileRows(files[kind], dtype=dtype, threads=4)
    stores.append(store)
    if request.param == "in memory":
      store = store.in_memory()
      stores.append(store)
    return store

  yield make_store
  for store in stores:
    store.close()


def expected_rows(tables, ids, kind="f32"):
  """The rows that a fetch must return: encode, decode, index."""
  decoded = [decode(*encode(table, kind), kind) for table in tables]
  return np.stack([table[i] for table, i in zip(decoded, ids, strict=True)])


def random_ids(shape, seed=1):
  return np.random.default_rng(seed).integers(0, SMALLEST, (2, *shape))


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fetch_is_decode_and_index(make, tables, kind, dtype):
  ids = random_ids((3, 5, 4)).astype(np.int32)
  rows = make(kind, dtype).fetch(ids)
  assert rows.dtype == dtype
  assert rows.shape == (2, 3, 5, 4, WIDTH)
  assert np.array_equal(rows, expected_rows(tables, ids, kind).astype(dtype))


@given(hnp.arrays(np.int64, hnp.array_shapes(max_dims=3, max_side=9, min_side=0)))
@settings(reproducible, max_examples=60)
def test_ids_of_any_shape_are_fetched(tables, files, ids):
  ids = np.stack([ids % LAYOUT.rows[layer] for layer in LAYOUT.layers])
  with FileRows(files["f32"], threads=3) as store:
    assert np.array_equal(store.fetch(ids), expected_rows(tables, ids))
  assert np.array_equal(
    HostRows.from_tables(tables, LAYOUT, TOKENS).fetch(ids), expected_rows(tables, ids)
  )


def test_fewer_or_more_ids_than_threads_are_fetched(make, tables):
  store = make("fp8_e4m3")
  for count in (1, 15, 32, 33, 64, 5000):
    ids = random_ids((count,), seed=count)
    assert np.array_equal(store.fetch(ids), expected_rows(tables, ids, "fp8_e4m3"))


def test_layers_have_separate_rows(make, tables):
  store = make()
  assert store.layers == (1, 3)
  assert store.rows == tuple(LAYOUT.rows[x] for x in store.layers)
  last = np.array([LAYOUT.rows[3] - 1, 0])
  assert store.width == WIDTH
  assert np.array_equal(store.fetch_layer(3, last[:, None]), tables[1][last[:, None]])
  assert store.fetch_layer(3, np.zeros((0, 3), int)).shape == (0, 3, WIDTH)
  with pytest.raises(ValueError, match=rf"layer 3: row id {LAYOUT.rows[3]} at"):
    store.fetch_layer(3, last + 1)
  with pytest.raises(ValueError, match="layer=2 has no table"):
    store.fetch_layer(2, last)


def test_layers_may_have_different_numbers_of_ids(make, tables):
  rows = make().fetch_by_layer([np.array([5, 5, 1]), np.array([], np.int32)])
  assert np.array_equal(rows[0], tables[0][[5, 5, 1]])
  assert rows[1].shape == (0, WIDTH)


@pytest.mark.parametrize("bad", [-1, "rows", 2**31])
def test_ids_outside_the_table_are_refused(make, bad):
  store = make()
  ids = random_ids((4,))
  ids[1, 2] = LAYOUT.rows[3] if bad == "rows" else bad
  message = rf"layer 3: row id {ids[1, 2]} at position \[2\] is outside \[0, {LAYOUT.rows[3]}\)"
  for fetch in (store.fetch, store.fetch_by_layer):
    with pytest.raises(ValueError, match=message):
      fetch(ids)


def test_malformed_ids_and_deadlines_are_refused(make):
  store = make()
  with pytest.raises(ValueError, match="integers, not float64"):
    store.fetch(np.zeros((2, 3)))
  with pytest.raises(ValueError, match=r"\[L=2, ...\], not of shape \(3, 1\)"):
    store.fetch(np.zeros((3, 1), int))
  with pytest.raises(ValueError, match="deadline=0"):
    store.fetch(np.zeros((2, 1), int), deadline=0)


def test_a_closed_store_raises(make):
  store = make()
  store.close()
  store.close()
  with pytest.raises(ValueError, match="closed"):
    store.fetch(random_ids((1,)))


def test_digests_differ_by_hash_and_tokenizer(make):
  store = make()
  store.require(LAYOUT, TOKENS)
  other = HashLayout.build("engram", [1, 3], [53, 61], 3, 2, 200, 2, seed=1)
  with pytest.raises(ConfigError, match="another hash layout: seed 0 there, 1 here"):
    store.require(other, TOKENS)
  with pytest.raises(ConfigError, match="another tokenizer"):
    store.require(LAYOUT, "0" * 64)
  digests = {store_digest(LAYOUT, TOKENS), store_digest(other, TOKENS), store_digest(LAYOUT, "0")}
  assert len(digests) == 3
  assert store.digest in digests


def test_telemetry_counts_distinct_rows_and_their_bytes(make):
  store = make("fp8_e4m3")
  store.fetch(np.array([[1, 1, 2], [5, 5, 5]]))
  ((level, counts),) = store.levels().items()
  assert level in ("host", "file")
  assert (counts["hits"], counts["misses"], counts["hit_rate"]) == (3, 0, 1.0)
  assert counts["bytes"] == 3 * (WIDTH + 2)
  assert counts["wait_seconds"] > 0
  store.telemetry.reset()
  assert store.levels()[level]["hit_rate"] is None


# --- reads that are late or fail ------------------------------------------------------------


class SlowReads:
  """Blocks the reads of a store until `go` is set."""

  def __init__(self, store, monkeypatch):
    self.go = threading.Event()
    monkeypatch.setattr(store, "_read_cached", lambda *_: False)
    read = store._read_chunk
    monkeypatch.setattr(store, "_read_chunk", lambda *a: (self.go.wait(20), read(*a))[1])


def test_a_late_read_is_an_error_and_the_next_fetch_is_right(files, tables, monkeypatch):
  ids = random_ids((40,))
  with FileRows(files["bf16"], threads=2) as store:
    slow = SlowReads(store, monkeypatch)
    begin = time.monotonic()
    with pytest.raises(StorageError, match="late: the deadline has passed") as caught:
      store.fetch(ids, deadline=0.05)
    assert time.monotonic() - begin < 10
    assert caught.value.exit_code == 5
    slow.go.set()
    assert np.array_equal(store.fetch(ids, deadline=30), expected_rows(tables, ids, "bf16"))


def test_reads_after_a_deadline_are_cancelled(files):
  """The deadline passes before the first wait."""
  with FileRows(files["f32"], threads=1) as store:
    go = threading.Event()
    reads = [store._pool.submit(go.wait, 20) for _ in range(3)]
    with pytest.raises(StorageError, match="deadline has passed"):
      store._wait(reads, time.monotonic())
    assert [read.cancelled() for read in reads[1:]] == [True, True]
    go.set()


def test_a_failed_read_is_a_storage_error(files, monkeypatch):
  with FileRows(files["f32"], threads=2) as store:

    def fail(*_):
      raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, "_read_chunk", fail)
    monkeypatch.setattr(os, "preadv", fail)
    for count in (1, 200):
      with pytest.raises(StorageError, match="cannot be read: Input/output error"):
        store.fetch(random_ids((count,)))


@pytest.mark.parametrize("nowait", ["fails", "is short", "is unknown"])
def test_rows_that_are_not_cached_are_read_by_threads(files, tables, monkeypatch, nowait):
  def not_cached(*_):
    if nowait == "fails":
      raise BlockingIOError
    return 3

  with FileRows(files["int8"]) as store:
    if nowait == "is unknown":
      monkeypatch.setattr(file_rows, "_NOWAIT", 0)
    monkeypatch.setattr(os, "preadv", not_cached)
    ids = random_ids((5, 3))
    for deadline in (None, 30):
      assert np.array_equal(store.fetch(ids, deadline=deadline), expected_rows(tables, ids, "int8"))


def test_a_file_that_changes_while_open_is_an_error(tables, tmp_path):
  path = write(tmp_path / "t", tables)
  with FileRows(path) as store:
    store.fetch(random_ids((3,)))
    with open(path, "r+b") as file:
      file.truncate(path.stat().st_size - 1)
    with pytest.raises(StorageError, match="has changed since it was opened"):
      store.fetch(random_ids((3,)))


def test_a_replaced_file_is_still_read_by_an_open_store(tables, tmp_path):
  path = write(tmp_path / "t", tables)
  with FileRows(path) as store:
    os.replace(write(tmp_path / "u", [2 * table for table in tables]), path)
    ids = random_ids((9,))
    assert np.array_equal(store.fetch(ids), expected_rows(tables, ids))


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_file_verifies_and_has_its_constants(files, kind):
  with FileRows(files[kind]) as store:
    store.verify()
    assert store.header.kind == kind
    assert store.layout == LAYOUT
    assert store.token_map_digest == TOKENS
    assert all(isinstance(m, str) for m in store.header.hash_layout["multipliers"]["1"])


def test_dropping_the_page_cache_changes_no_row(files, tables):
  with FileRows(files["fp8_e4m3"], mapped_bytes=1) as store:  # gives pages back after each read
    for count in (3, 100, 3):
      ids = random_ids((count,), seed=count)
      store.drop_page_cache()
      assert np.array_equal(store.fetch(ids), expected_rows(tables, ids, "fp8_e4m3"))


@given(st.data())
@settings(reproducible, max_examples=40)
def test_every_changed_byte_is_detected(files, tmp_path_factory, data):
  """Opening detects changes outside the rows, verify all."""
  content = bytearray(files["int8"].read_bytes())
  at = data.draw(st.integers(0, len(content) - 1))
  content[at] ^= 1 << data.draw(st.integers(0, 7))
  path = tmp_path_factory.mktemp("edited") / "t"
  path.write_bytes(content)
  with pytest.raises(StorageError) as caught, FileRows(path) as store:
    store.verify()
  assert str(caught.value).startswith(str(path))
  assert "\n" not in str(caught.value)


def test_verify_names_the_rows_that_changed(tables, tmp_path):
  path = write(tmp_path / "t", tables)
  with FileRows(path) as store:
    last = store.header.tables[1].end - 1
  with open(path, "r+b") as file:
    file.seek(last)
    file.write(b"\x55")
  with FileRows(path) as store, pytest.raises(StorageError) as caught:
    store.verify()
  last = LAYOUT.rows[3] - 1
  assert str(caught.value) == f"{path} is damaged: layer 3 rows {last - 24} to {last} have changed"


@pytest.mark.parametrize("size", [0, 47, 48, 300, 4096, -4097, -1])
def test_truncated_files_are_refused_at_opening(files, tmp_path, size):
  content = files["f32"].read_bytes()
  path = tmp_path / "t"
  path.write_bytes(content[:size])
  with pytest.raises(StorageError, match=r"is damaged|is no table file"):
    FileRows(path)


def forge(path, change):
  """The bytes of a file with a changed header and the digest of that header."""
  with open(path, "rb") as file:
    header, _ = table_file.read_header(file, "t")
  fields = header.model_dump()
  change(fields)
  text = json.dumps(fields).encode()
  prefix = table_file.PREFIX.pack(
    table_file.MAGIC, table_file.VERSION, len(text), hashlib.sha256(text).digest()
  )
  return prefix + text + path.read_bytes()[len(prefix + text) :]


def number(*keys):
  def change(fields, value):
    for key in keys[:-1]:
      fields = fields[key]
    fields[keys[-1]] = value

  return change


@pytest.mark.parametrize(
  ("change", "value"),
  [
    (number("width"), 10**15),
    (number("width"), -1),
    (number("width"), 40.0),
    (number("kind"), "fp4"),
    (number("kind"), "bf16"),
    (number("file_bytes"), 2**62),
    (number("tables", 0, "rows"), 2**62),
    (number("tables", 0, "offset"), 0),
    (number("tables", 1, "offset"), 4096),
    (number("tables", 1, "bytes"), 1),
    (number("tables"), []),
    (number("checksums_offset"), 2**63),
    (number("hash_layout"), {}),
    (number("hash_layout"), []),
    (number("hash_layout", "heads"), 10**9),
    (number("hash_layout", "max_ngram"), 10**9),
    (number("hash_layout", "layers"), []),
    (number("hash_layout", "primes"), {}),
    (number("hash_layout", "seed"), 7),
    (number("hash_layout", "compressed_vocab"), 10**30),
    (number("hash_layout", "rows_per_head"), 1),
    (number("hash_layout", "multipliers", "1"), ["1", "3", "5"]),
    (number("block_bytes"), 1 << 20),
    (number("block_bytes"), 512),
    (number("surprise"), 1),
  ],
)
def test_inconsistent_headers_are_refused(files, tmp_path, change, value):
  path = tmp_path / "t"
  path.write_bytes(forge(files["f32"], lambda fields: change(fields, value)))
  with pytest.raises(StorageError, match="damaged") as caught:
    FileRows(path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 2**20 + 1, 2**32 - 1])
def test_a_header_of_absurd_size_is_not_read(files, tmp_path, length):
  path = tmp_path / "t"
  content = bytearray(files["f32"].read_bytes())
  content[12:16] = length.to_bytes(4, "little")
  path.write_bytes(content)
  with pytest.raises(StorageError, match=f"announces a header of {length:,} bytes"):
    FileRows(path)


def test_other_files_are_refused(tmp_path):
  path = tmp_path / "t"
  with pytest.raises(StorageError, match="cannot be opened: No such file"):
    FileRows(path)
  path.write_text("a text that is long enough to hold a prefix of 48 bytes")
  with pytest.raises(StorageError, match="is no table file"):
    FileRows(path)
  path.write_bytes(table_file.PREFIX.pack(table_file.MAGIC, 9, 2, bytes(32)) + b"{}")
  with pytest.raises(StorageError, match="has format 9; this version reads 1 and 2"):
    FileRows(path)


def test_writing_leaves_a_complete_file_or_none(tables, tmp_path):
  path = write(tmp_path / "t", tables)
  with pytest.raises(ConfigError, match="exists and is not overwritten"):
    write(path, tables)
  broken = [tables[0], tables[1].copy()]
  broken[1][7, 3] = np.nan
  with pytest.raises(StorageError, match="layer 3, from row 0 on: row 7, column 3 is nan"):
    write(tmp_path / "u", broken, "int8")
  with pytest.raises(StorageError, match="cannot be written"):
    write(tmp_path / "nowhere" / "u", tables)
  assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_written_file_has_the_permissions_of_the_umask(tables, tmp_path):
  for mask, mode in ((0o077, 0o600), (0o002, 0o664)):
    before = os.umask(mask)
    try:
      path = write(tmp_path / f"{mask}", tables)
    finally:
      os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_host_tables_are_filled_block_by_block(tables):
  """At most one earlier block is alive when a block is made."""

  def blocks(layer):
    held = []
    for block in blocks_of(tables)(layer):
      assert sum(ref() is not None for ref in held) <= 1
      copy = block.copy()
      held.append(weakref.ref(copy))
      yield copy
      del copy

  store = HostRows.from_blocks(blocks, LAYOUT, TOKENS, WIDTH, kind="bf16")
  assert store.bytes == sum(LAYOUT.rows.values()) * WIDTH * 2
  ids = random_ids((7,))
  assert np.array_equal(store.fetch(ids), expected_rows(tables, ids, "bf16"))
  broken = [tables[0], np.full_like(tables[1], np.nan)]
  with pytest.raises(StorageError, match="layer 3, from row 0 on: row 0, column 0 is nan"):
    HostRows.from_tables(broken, LAYOUT, TOKENS)


def test_a_file_larger_than_the_free_space_is_not_begun(tables, tmp_path, monkeypatch):
  free = type("Usage", (), {"free": 1000})
  monkeypatch.setattr("shutil.disk_usage", lambda _: free)
  with pytest.raises(StorageError, match=r"takes [\d,]+ bytes, but .* has 1,000 free"):
    write(tmp_path / "t", tables)
  assert list(tmp_path.iterdir()) == []


HUGE = """
import hashlib, os, sys, time, zlib
import numpy as np
from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.table_file import TableHeader
from engram_jax.memory.hash_layout import HashLayout
path = sys.argv[1]
layout = HashLayout.build("deepseek_v41", [1, 14], 16_000_000, 4, 8, 99092, 2)
header = TableHeader.plan(layout, "0" * 64, "fp8_e4m3", 256)
one = bytes([0x38] * 256 + [130] * 8)  # ones, times 2^3
block, at = divmod(264 * 384_006_167, 4096)
changed = bytes(at) + one + bytes(2 * 4096 - at - len(one))
checksums = np.full(header.blocks, zlib.crc32(bytes(4096)), "<u4")
checksums[block : block + 2] = zlib.crc32(changed[:4096]), zlib.crc32(changed[4096:])
digest = hashlib.sha256(checksums.data).hexdigest()
with open(path, "wb") as file:
  file.truncate(header.file_bytes)
  file.write(header.model_copy(update={"checksums_sha256": digest}).to_bytes())
  file.seek(header.tables[0].offset + 264 * 384_006_167)
  file.write(one)
  file.seek(header.checksums_offset)
  file.write(checksums.data)
del checksums
begin = time.perf_counter()
store = FileRows(path)
opened = time.perf_counter() - begin
rng = np.random.default_rng(0)
served, begin = 0, time.perf_counter()
for _ in range(6):
  rows = store.fetch(rng.integers(0, 384_006_168, (2, 128, 48)))
  assert not rows.any()
  served += rows[..., 0].size
seconds = time.perf_counter() - begin
assert (store.fetch(np.array([[384_006_167], [0]]))[0] == 8).all()
with open("/proc/self/status") as file:  # getrusage would include the process that started it
  peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
print(opened, served / seconds, peak << 10, os.path.getsize(path))
os.remove(path)
"""


def test_a_table_larger_than_memory_opens_and_serves_rows(tmp_path):
  """V4.1's two tables, 203 GB, sparse: in a process of its own, whose memory is measured."""
  argv = [sys.executable, "-c", HUGE, str(tmp_path / "huge")]
  result = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
  assert result.returncode == 0, result.stderr
  opened, per_second, peak, size = map(float, result.stdout.split())
  print(f"opened in {opened:.3f} s, {per_second:,.0f} rows/s, peak {peak / 2**20:.0f} MiB")
  assert size > 200e9
  assert peak < 1e9
