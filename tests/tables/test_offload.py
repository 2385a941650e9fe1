"""Tables on the host: step for step and bit for bit what a table on the device becomes."""

import errno
import os
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import Config, load_config
from engram_jax.errors import ConfigError, StorageError
from engram_jax.memory.hashing import HashLayout
from engram_jax.memory.table import init_table, padded_rows
from engram_jax.tables.base import Tables
from engram_jax.tables.host_table import FileTable, HostTable
from engram_jax.tables.optimizers.adam import adam
from engram_jax.tables.row_schema import WRITTEN, RowSchema
from engram_jax.tables.saved_run import span
from engram_jax.training.state import flush, init_state, make_setup
from engram_jax.training.step import make_train_step

STEPS, B, T, J, LAYERS = 30, 4, 16, 4, (0, 1)
POISONED = (7, 8, 20)  # steps that are not finite
FLUSHED = 14  # after which all rows are brought up to date, as before an evaluation
# (table optimizer, micro-batches, table's dtype, placement); Adam and a file are in
# tests/training/test_train_host.py
CASES = (
  ("adam", 2, "float32", "host"),
  ("adam_catch_up", 1, "bfloat16", "host"),
  ("adagrad", 1, "float32", "file"),
  ("sinkhorn", 1, "bfloat16", "file"),
)


def config(lab, table: str = "adam", parts: int = 1, dtype: str = "float32", place: str = "host"):
  changes = {
    "model.moe.routed_experts": 0,  # this and the next two: less to compile
    "model.residual.sinkhorn_iterations": 1,
    "model.engram.conv_kernel": 0,
    "model.engram.layers": list(LAYERS),
    "model.engram.rows_per_head": 701,
    "model.engram.table_dtype": dtype,
    "model.engram.placement": place,
    "data.sequence_length": T,
    "train.batch_size": B,
    "train.steps": STEPS,
    "train.accumulate": parts,
    "train.optimizer.table": table,
    "train.optimizer.learning_rate": 0.01,
  }
  return load_config(lab.config, changes)


def layout_of(cfg: Config) -> HashLayout:
  return HashLayout.build("engram", LAYERS, cfg.model.engram.rows_per_head, 3, 2, 300, 2, 0)


def batch_at(layout: HashLayout, step: int) -> dict[str, np.ndarray]:
  """Rows of a batch are drawn from a few that three steps share: most are met in steps on end."""
  numbers, shared = np.random.default_rng(step), np.random.default_rng(step // 3)
  tokens = numbers.integers(0, 300, (B, T)).astype(np.int32)
  pools = [shared.integers(0, layout.rows[layer], 150) for layer in LAYERS]
  return {
    "tokens": tokens,
    "targets": (7 * tokens + 1) % 300,
    "mask": numbers.random((B, T)) < 0.9,
    "segments": np.zeros((B, T), np.int32),
    "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    "row_ids": np.stack([numbers.choice(p, (B, T, J)) for p in pools]).astype(np.int32),
  }


def trained(setup, state, batches):
  """(the last state, each step's metrics) of a run in which some steps are not finite."""
  step, measured = make_train_step(setup), []
  for i, batch in enumerate(setup.tables.prefetch(state.tables, batches)):
    good = jax.tree.map(jnp.copy, state.params)
    if i in POISONED:
      state = state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    state, metrics = step(state, batch)
    assert int(metrics["nonfinite_in_row"]) == (1 + (i - 1 in POISONED) if i in POISONED else 0)
    if i in POISONED:
      state = state._replace(params=good)
    if i == FLUSHED:
      state = flush(setup, state)
    measured.append(metrics)
  return state, measured


def assert_same_bits(left, right) -> None:
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(("table", "parts", "dtype", "place"), CASES)
def test_a_run_on_the_host_is_the_run_on_the_device(lab, tmp_path, table, parts, dtype, place):
  cfg = config(lab, table, parts, dtype, "device")
  layout = layout_of(cfg)
  batches = [batch_at(layout, i) for i in range(STEPS)]
  setup = make_setup(cfg, layout)
  expected, metrics = trained(setup, init_state(setup), batches)

  setup = setup_in(tmp_path, config(lab, table, parts, dtype, place), layout)
  with setup.tables:
    state = init_state(setup)
    host = state.tables.host
    assert state.tables.tables == {}
    found, measured = trained(setup, state, batches)
    host.settle()
    assert_same_bits(measured, metrics)
    assert_same_bits(found._replace(tables=None), expected._replace(tables=None))
    for i, n in enumerate(LAYERS):
      offloaded = host.tables[n]
      per_row, scalars = offloaded.schema.split_state(expected.tables.optimizer[n])
      assert_same_bits(found.tables.optimizer[n], offloaded.schema.scalars_alone(scalars))
      records = offloaded.take(np.arange(offloaded.schema.padded))
      written = records[WRITTEN] != 0
      touched = np.unique(np.stack([b["row_ids"][i] for b in batches]))
      assert written[touched].all()
      assert written.sum() == touched.size
      all_leaves = (expected.tables.tables[n], *per_row)
      unpacked = offloaded.schema.unpack(records[written])
      for leaf, whole in zip(unpacked, all_leaves, strict=True):
        assert_same_bits(leaf, np.asarray(whole)[written])


def setup_in(folder, cfg: Config, layout: HashLayout):
  """A setup whose files lie in this folder."""
  run = cfg.run.model_copy(update={"root": str(folder.parent), "name": folder.name})
  return make_setup(cfg.model_copy(update={"run": run}), layout)


def test_reading_ahead_meets_rows_of_the_step_before(lab, tmp_path):
  layout = layout_of(config(lab))
  met = [
    np.intersect1d(batch_at(layout, i)["row_ids"][0], batch_at(layout, i + 1)["row_ids"][0]).size
    for i in range(STEPS - 1)
  ]
  assert np.median(met) > 30


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_no_step_has_touched_are_those_of_init_table(lab, tmp_path, dtype):
  cfg = config(lab, dtype=dtype)
  layout = layout_of(cfg)
  with Tables.of(cfg, layout) as tables:
    some = np.random.default_rng(0).integers(0, layout.rows[0], (2, 3, 50, 4))
    state = tables.init(key := jax.random.key(jnp.uint32(cfg.train.seed)))
    found = tables.lookup(state, dict(zip(LAYERS, some, strict=True)))
    for i, layer in enumerate(LAYERS):
      drawn = init_table(
        jax.random.fold_in(key, 1 + layer),
        layout.rows[layer],
        4,
        std=cfg.model.init_std,
        dtype=jnp.dtype(dtype),
      )
      assert_same_bits(found[layer], np.asarray(drawn)[some[i]])


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.fixture
def started(lab, tmp_path):
  """The step of tables in files, its state, and batches."""
  cfg = config(lab, "adagrad", place="file")  # compiled above
  layout = layout_of(cfg)
  setup = setup_in(tmp_path, cfg, layout)
  with setup.tables as tables:
    state = init_state(setup)
    batches = tables.prefetch(state.tables, (batch_at(layout, i) for i in range(STEPS)))
    yield make_train_step(setup), state, batches


def steps_until(error: type[Exception], match: str, step, state, batches) -> int:
  """Returns the number of steps taken before it was raised."""
  taken = []

  def run(state) -> None:
    for batch in batches:
      state, metrics = step(state, batch)
      taken.append(jax.block_until_ready(metrics))

  with pytest.raises(error, match=match):
    run(state)
  return len(taken)


def test_a_write_that_fails_stops_the_run_within_two_steps(started, monkeypatch):
  step, state, batches = started
  host = state.tables.host
  monkeypatch.setattr(host.tables[1], "put", _fail)
  assert steps_until(OSError, "no such luck", step, state, batches) <= 2
  with pytest.raises(OSError, match="no such luck"):
    host.settle()


def test_a_read_that_fails_is_raised_where_its_rows_are_needed(started, monkeypatch):
  step, state, batches = started
  state, _ = step(state, next(batches))
  monkeypatch.setattr(state.tables.host.tables[0], "take", _fail)
  assert steps_until(OSError, "no such luck", step, state, batches) <= 2


def _fail(*_):
  raise OSError("no such luck")


def test_a_full_disk_is_an_error_and_not_a_killed_process(started, monkeypatch):
  step, state, batches = started
  full = type("Full", (), {"f_bavail": 1, "f_frsize": 4096})
  monkeypatch.setattr(os, "fstatvfs", lambda _: full)
  assert steps_until(StorageError, "the disk has no room for", step, state, batches) <= 2


def schema_of(rows: int = 1000, width: int = 4) -> RowSchema:
  return RowSchema.of(adam(1e-3), rows, padded_rows(rows), width, np.dtype("float32"))


def test_a_file_has_no_name_that_could_outlive_the_process(tmp_path):
  table = FileTable(tmp_path, schema_of())
  assert list(tmp_path.iterdir()) == []
  assert table.stat().st_nlink == 0
  table.close()


@pytest.mark.parametrize("kind", [errno.EIO, errno.EINVAL])
def test_a_disk_that_fails_is_no_hole(tmp_path, monkeypatch, kind):
  """Taken for one, every row after it would be left out of the checkpoint."""
  table = FileTable(tmp_path, schema_of())

  def fail(*_):
    raise OSError(kind, "no such luck")

  monkeypatch.setattr(os, "lseek", fail)
  with pytest.raises(StorageError, match="no such luck"):
    list(table.written())
  monkeypatch.undo()
  table.close()


@pytest.mark.parametrize("kind", [HostTable, FileTable])
def test_written_rows_are_found_wherever_they_are(tmp_path, kind):
  schema = schema_of(40_000)
  table = kind(*(tmp_path,) * (kind is FileTable), schema)
  generator = np.random.default_rng(1)
  ids = np.unique(np.r_[0, schema.padded - 1, generator.integers(0, schema.padded, 77), 5000:7100])
  leaves = tuple(
    generator.integers(0, 99, (ids.size, *shape)).astype(dtype) for _, shape, dtype in schema.leaves
  )
  table.put(ids, schema.pack(leaves))
  found, content = zip(*table.written(), strict=True)
  np.testing.assert_array_equal(np.concatenate(found), ids)
  for part, leaf in zip(schema.unpack(np.concatenate(content)), leaves, strict=True):
    np.testing.assert_array_equal(part, leaf)
  table.close()


def test_a_large_file_is_made_in_no_time_and_takes_no_room(tmp_path):
  schema = schema_of(2**30, width=16)
  begin = time.perf_counter()
  table = FileTable(tmp_path, schema)
  ids = np.array([0, 12_345_678, schema.padded - 1])
  assert (table.take(ids)[WRITTEN] == 0).all()
  table.put(ids, schema.pack(schema.unpack(table.take(ids))))
  assert [ids.tolist() for ids, _ in table.written()] == [[i] for i in ids]
  assert time.perf_counter() - begin < 5
  status = table.stat()
  assert status.st_size == schema.padded * schema.dtype.itemsize > 200e9
  assert 512 * status.st_blocks < 1e6
  table.close()


# --- what a config may say ----------------------------------------------------------------------


def test_tables_on_the_host_are_for_one_device(lab):
  cfg = load_config(lab.config, {"model.engram.placement": "host"})
  assert cfg.mesh_sizes(1) == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
  with pytest.raises(ConfigError, match=r"placement='host' .*mesh.data=2: give placement=device"):
    cfg.mesh_sizes(2)
  for field, match in (("mesh.fsdp", "mesh.fsdp=2"), ("distributed.processes", "processes=2")):
    changes = {"model.engram.placement": "file", field: 2, "distributed.coordinator": "a:1"}
    with pytest.raises(ConfigError, match=f"placement='file'.*{match}.*placement=device"):
      load_config(lab.config, changes)
  without = {"model.engram.placement": "host", "model.engram.layers": [], "mesh.fsdp": 2}
  assert not load_config(lab.config, without).model.engram.on_host


def test_an_optimizer_that_moves_all_rows_is_not_for_files(lab):
  changes = {"model.engram.placement": "file", "train.optimizer.table": "adam_catch_up"}
  with pytest.raises(ConfigError, match=r"adam_catch_up.*give adam, adagrad or sinkhorn"):
    load_config(lab.config, changes)


def test_bounds_are_found_without_a_copy_of_all_ids(tmp_path):
  np.save(tmp_path / "ids.npy", np.arange(0, 2**23, 4, dtype=np.int32))
  ids = np.load(tmp_path / "ids.npy", mmap_mode="r")
  tracemalloc.start()
  found = span(ids, 1000, 2001)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert (ids[found][0], ids[found][-1]) == (1000, 2000)
  assert peak < 100_000
