"""Checkpoints come back bit for bit; a damaged one is told and the one before it used."""

import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import engram_jax
from engram_jax.core import manifest
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.errors import NoUsableCheckpoint, StorageError

ROOT = pathlib.Path(engram_jax.__file__).parents[1]


class RowState(NamedTuple):
  moment: jax.Array
  last_step: jax.Array


def make_state(seed: int = 0):
  keys = iter(jax.random.split(jax.random.key(seed), 4))
  params = {
    "blocks": [{"w_key": jax.random.normal(next(keys), (6, 4))}, {"w_key": jnp.ones((6, 4))}],
    "embedding": jax.random.normal(next(keys), (32, 4), jnp.bfloat16),
    "odd": jnp.array([np.nan, -0.0, np.inf, 1e-45], jnp.float32),
    "empty": jnp.zeros((0, 4)),
  }
  rows = RowState(jax.random.normal(next(keys), (64, 8)), jnp.zeros(64, jnp.int32))
  step = jnp.asarray(seed, jnp.int32)
  return params, optax.adam(1e-3).init(params), rows, {"step": step, "done": jnp.bool_(True)}


def constant(value: float):
  return {"w": jnp.full((1000,), value, jnp.float32)}


def fill(directory: pathlib.Path, steps=(1, 2), keep: int = 9) -> None:
  with Checkpoints(directory, keep) as checkpoints:
    for step in steps:
      checkpoints.save(step, constant(step), {"step": step})


def newest(directory: pathlib.Path) -> tuple[int | None, list[str]]:
  reports: list[str] = []
  with Checkpoints(directory, keep=None) as checkpoints:
    return checkpoints.newest_valid(reports.append), reports


def assert_same_bits(left, right) -> None:
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  directory = tmp_path_factory.mktemp("two_steps")
  fill(directory)
  return directory


def test_a_restored_state_has_the_same_bits_tree_and_placement(tmp_path):
  state = make_state(3)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(3, state, {"position": [3, 4]})
    restored = checkpoints.restore(3, like=make_state(0))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    assert_same_bits(checkpoints.restore(3, like=abstract), state)
    assert checkpoints.meta(3) == {"position": [3, 4]}
  assert_same_bits(restored, state)
  for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
    assert (after.committed, after.weak_type) == (before.committed, False)
  # A restored state is donated like any other.
  jax.block_until_ready(jax.jit(lambda s: s, donate_argnums=0)(restored))


def test_a_committed_leaf_is_restored_to_its_device(tmp_path):
  state = jax.device_put(constant(1), jax.devices()[0])
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state, {})
    restored = checkpoints.restore(1, like=state)
  assert restored["w"].committed
  assert restored["w"].sharding == state["w"].sharding


def test_parameters_can_be_restored_without_the_rest(tmp_path):
  params, *rest = make_state(1)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, {"params": params, "rest": rest}, {})
    assert_same_bits(checkpoints.restore(1, {"params": params}, partial=True), {"params": params})


def aligned(size: int) -> np.ndarray:
  """A float32 buffer that jax.device_put shares instead of copying."""
  buffer = np.zeros(size + 16, np.float32)
  start = -buffer.ctypes.data % 64 // buffer.itemsize
  return buffer[start : start + size]


def test_arrays_may_be_donated_and_overwritten_as_soon_as_save_returns(tmp_path):
  expected = np.arange(1 << 22, dtype=np.float32)
  shared = aligned(expected.size)
  shared[:] = expected
  state = {"made": jnp.asarray(expected), "shared": jax.device_put(shared)}
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state, {})
    shared[:] = -2
    like = jax.block_until_ready(overwrite(state))
    restored = checkpoints.restore(1, like)
  np.testing.assert_array_equal(restored["made"], expected)
  np.testing.assert_array_equal(restored["shared"], expected)


def test_one_flipped_bit_anywhere_is_noticed(two_steps):
  folder = two_steps / "step_00000002"
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  assert folder / manifest.NAME in files

  @hypothesis.settings(max_examples=120, deadline=None, database=None)
  @hypothesis.given(st.sampled_from(files), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
  def check(file, position, bit):
    good = file.read_bytes()
    bad = bytearray(good)
    bad[int(position * len(bad))] ^= 1 << bit
    file.write_bytes(bad)
    try:
      step, reports = newest(two_steps)
    finally:
      file.write_bytes(good)
    assert step == 1
    assert len(reports) == 1
    assert "step 2" in reports[0]
    assert str(file) in reports[0]

  check()
  assert newest(two_steps) == (2, [])


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("name", [manifest.NAME, "state/_METADATA", "state/manifest.ocdbt"])
def test_a_truncated_file_is_noticed(tmp_path, two_steps, name, share):
  shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
  file = tmp_path / "step_00000002" / name
  os.truncate(file, int(file.stat().st_size * share))
  step, (report,) = newest(tmp_path)
  assert step == 1
  assert str(file) in report


def test_missing_files_and_renamed_folders_are_noticed(tmp_path, two_steps):
  shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
  (tmp_path / "step_00000002" / manifest.NAME).unlink()
  shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000003")
  next((tmp_path / "step_00000003" / "state" / "d").iterdir()).unlink()
  shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000004")
  step, reports = newest(tmp_path)
  assert step == 1
  assert [report.split(":")[0] for report in reports] == [
    f"checkpoint of step {n} cannot be used" for n in (4, 3, 2)
  ]
  assert "holds step 1" in reports[0]
  assert "is missing" in reports[1]
  assert "never completed" in reports[2]


def test_nothing_valid_is_none_and_a_damaged_step_is_refused(tmp_path):
  assert newest(tmp_path / "absent") == (None, [])
  fill(tmp_path, [1])
  os.truncate(tmp_path / "step_00000001" / manifest.NAME, 10)
  with Checkpoints(tmp_path, keep=None) as checkpoints:
    with pytest.raises(NoUsableCheckpoint, match=r"\(damaged\): step 1: .* is damaged"):
      checkpoints.newest_valid(pytest.fail)
    with pytest.raises(StorageError, match="step 1 cannot be used"):
      checkpoints.restore(1, like=constant(0))
    with pytest.raises(StorageError, match="damaged"):
      checkpoints.meta(1)


def test_the_last_few_good_ones_stay(tmp_path):
  fill(tmp_path, [1, 2, 3, 4], keep=3)
  os.truncate(tmp_path / "step_00000004" / "state" / "_METADATA", 1)
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.steps() == [2, 3, 4]
    assert checkpoints.newest_valid([].append) == 3
    checkpoints.save(5, constant(5), {})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 5]  # the damaged 4 did not take the place of 3


def test_a_good_step_is_never_overwritten_and_a_damaged_one_is_replaced(tmp_path):
  fill(tmp_path, [1, 2])
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    with pytest.raises(ValueError, match="already holds a good checkpoint"):
      checkpoints.save(2, constant(7), {})
    os.truncate(tmp_path / "step_00000002" / "state" / "_METADATA", 1)
    checkpoints.save(2, constant(7), {})
    assert_same_bits(checkpoints.restore(2, constant(0)), constant(7))


def test_old_ones_go_only_after_the_new_one_is_committed(tmp_path, monkeypatch):
  fill(tmp_path, [1])

  def fail(directory, content):
    raise OSError(28, "No space left on device", str(directory))

  checkpoints = Checkpoints(tmp_path, keep=1)
  with monkeypatch.context() as patched:
    patched.setattr(manifest, "write", fail)
    checkpoints.save(2, constant(2), {})
    with pytest.raises(StorageError, match=r"step_00000002 cannot be written: .*No space left"):
      checkpoints.save(3, constant(3), {})
  assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
  checkpoints.save(3, constant(3), {})  # the error was told once; the next save stands on its own
  checkpoints.close()
  assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_a_full_disk_is_a_storage_error(tmp_path):
  fill(tmp_path, [1])
  state = {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  checkpoints = Checkpoints(tmp_path, keep=1)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # a write beyond it fails
  try:
    checkpoints.save(2, state, {})
    with pytest.raises(StorageError, match="step_00000002"):
      checkpoints.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert newest(tmp_path) == (1, [])


@pytest.mark.parametrize("error", [OSError("full"), StorageError("full"), KeyboardInterrupt()])
def test_files_that_cannot_be_written_leave_nothing_behind(tmp_path, error):
  def files(folder):
    (folder / "rows").write_bytes(bytes(1000))
    raise error

  kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StorageError
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, constant(1), {})
    with pytest.raises(kind):
      checkpoints.save(2, constant(2), {}, files=files)
    assert checkpoints.steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    checkpoints.save(2, constant(2), {})


def test_a_folder_may_have_any_name(tmp_path):
  """Its characters are no URL's."""
  directory = tmp_path / "%41#?&=+ \u00fc"
  with Checkpoints(directory, keep=1) as checkpoints:
    checkpoints.save(1, constant(3), {})
    found = checkpoints.open_array(1, "w").read(10, 20)
    assert_same_bits(checkpoints.restore(1, constant(0)), constant(3))
  np.testing.assert_array_equal(found, np.full(10, 3))


def test_an_unwritable_folder_is_a_storage_error(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(StorageError, match=r"file/checkpoints cannot be written"):
    Checkpoints(tmp_path / "file" / "checkpoints", keep=1).prepare()


def test_opening_removes_only_what_a_killed_save_left(tmp_path):
  fill(tmp_path, [1])
  for name in ("step_00000002.unfinished", "step_00000001.removed", "step_2.unfinished", "notes"):
    (tmp_path / name).mkdir()
  newest(tmp_path)  # reading changes nothing: the run may still be writing
  assert len(list(tmp_path.iterdir())) == 5
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.newest_valid(pytest.fail) == 1
    assert len(list(tmp_path.iterdir())) == 5
    checkpoints.prepare()
  assert {path.name for path in tmp_path.iterdir()} == {
    "step_00000001",
    "step_2.unfinished",
    "notes",
  }


@pytest.mark.parametrize(
  ("like", "message"),
  [
    ({"w": jnp.zeros(999)}, r"leaf w is float32\[1000\] in the checkpoint, float32\[999\] in"),
    ({"w": jnp.zeros(1000, jnp.bfloat16)}, r"leaf w is float32\[1000\] .*, bfloat16\[1000\] in"),
    ({"v": jnp.zeros(1)}, r"leaf v is not in the checkpoint, float32\[1\] in the state"),
    ({"v": jnp.zeros(1)}, r"leaf w is float32\[1000\] in the checkpoint, not in the state"),
  ],
)
def test_another_tree_is_refused(two_steps, like, message):
  with (
    Checkpoints(two_steps, keep=None) as checkpoints,
    pytest.raises(StorageError, match=message),
  ):
    checkpoints.restore(2, like)


@pytest.mark.parametrize(
  ("leaf", "message"),
  [
    (np.zeros(3, object), "leaf a/0 is a ndarray"),
    (3, "leaf a/0 is a int"),
    (jnp.asarray(3), "leaf a/0 is weakly typed"),
    (jax.random.key(0), "leaf a/0 is a typed key"),
  ],
)
def test_leaves_that_would_not_come_back_the_same_are_refused(tmp_path, leaf, message):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    with pytest.raises(ValueError, match=message):
      checkpoints.save(1, {"a": [leaf]}, {})
    with pytest.raises(ValueError, match="JSON"):
      checkpoints.save(1, constant(1), {"loss": float("nan")})
    assert checkpoints.steps() == []


def test_misuse_is_refused(two_steps):
  with pytest.raises(ValueError, match="keep=0"):
    Checkpoints(two_steps, keep=0)
  with Checkpoints(two_steps, keep=None) as checkpoints, pytest.raises(ValueError, match="reading"):
    checkpoints.save(3, constant(3), {})


def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(script), *arguments],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment,
    stdout=subprocess.PIPE,
    text=True,
  )


SAVE_FOREVER = """
  import sys
  import jax.numpy as jnp
  from engram_jax.core.checkpoint import Checkpoints

  def state(step):
    return {"w": jnp.full((100_000,), step, jnp.float32), "step": jnp.int32(step)}

  with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    step = checkpoints.newest_valid(lambda line: print(line, flush=True)) or 0
    if step:
      assert int(checkpoints.restore(step, like=state(0))["step"]) == step
    while True:
      step += 1
      checkpoints.save(step, state(step), {})
      if step % 2:
        checkpoints.wait()
        print(step, flush=True)
"""


def test_a_killed_process_loses_nothing_that_was_committed(tmp_path):
  for delay in (0.0, 0.013, 0.034):
    process = start(SAVE_FOREVER, str(tmp_path))
    with process:
      told = [process.stdout.readline().strip() for _ in range(2)]
      time.sleep(delay)
      process.send_signal(signal.SIGKILL)
      told += process.stdout.read().split()
    assert all(line.isdigit() for line in told)  # nothing was damaged at the start
    step, reports = newest(tmp_path)
    assert step >= int(told[-1])
    assert reports == []
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    like = {"w": jnp.zeros(100_000), "step": jnp.int32(0)}
    restored = checkpoints.restore(step, like)
    assert int(restored["step"]) == step
    np.testing.assert_array_equal(restored["w"], np.full(100_000, step, np.float32))
    checkpoints.prepare()
  assert all(path.name.startswith("step_") and not path.suffix for path in tmp_path.iterdir())


RESHARD = """
  import sys
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import NamedSharding, PartitionSpec as P
  from engram_jax.core.checkpoint import Checkpoints

  table = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
  def like(shape, spec):
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, spec)
    return {"t": jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=sharding)}

  with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    written, turned = like((4, 1), P("a")), like((2, 2), P("b", "a"))
    checkpoints.save(1, {"t": jax.device_put(table, written["t"].sharding)}, {})
    for wanted in (written, turned, like((1, 4), P(("a", "b"))), like((4, 1), P())):
      restored = checkpoints.restore(1, wanted)["t"]
      assert restored.sharding == wanted["t"].sharding
      assert np.array_equal(restored, table)
  print("equal")
"""


def test_saved_on_one_mesh_restored_on_another(tmp_path):
  flags = "--xla_force_host_platform_device_count=4"
  with start(RESHARD, str(tmp_path), XLA_FLAGS=flags) as process:
    assert process.stdout.read().strip() == "equal"
  with Checkpoints(tmp_path, keep=None) as checkpoints:  # and on this one, of one device
    restored = checkpoints.restore(1, {"t": jax.ShapeDtypeStruct((64, 8), jnp.float32)})
  expected = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
  np.testing.assert_array_equal(restored["t"], expected)
