"""Arrays of a checkpoint and leaves of a state: how they are saved, compared and restored."""

import contextlib
import pathlib
import re
from collections.abc import Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from engram_jax.core.distributed import is_multiprocess
from engram_jax.errors import StorageError

PyTree = Any
CHUNK_BYTES = 64 << 20  # what is read at once: a table saved on one device is restored on many

REASON_CHARACTERS = 240  # of another library's error, in a message


class SavedArray:
  """An array in a checkpoint that is read a range of rows at a time, in any order."""

  def __init__(self, directory: pathlib.Path, path: str):
    self._name = directory / path
    spec = {
      "driver": "zarr",
      "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}},
      "path": path,
      # Rows are read in turn from chunks of CHUNK_BYTES, which would else be read for each slice.
      "context": {"cache_pool": {"total_bytes_limit": 2 * CHUNK_BYTES}},
    }
    with as_storage_error(self._name, "cannot be read"):
      self._array = tensorstore.open(spec, open=True, read=True).result()
    self.shape, self.dtype = self._array.shape, self._array.dtype.numpy_dtype

  def read(self, *rows: int) -> np.ndarray:
    """Reads the full array, or with `start, stop` those rows of it."""
    with as_storage_error(self._name, "cannot be read"):
      return (self._array[slice(*rows)] if rows else self._array).read().result()


@contextlib.contextmanager
def as_storage_error(path: pathlib.Path, action: str) -> Generator[None]:
  """Turns errors of the system, Orbax and TensorStore about files into a StorageError."""
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    reason = " ".join(str(error).split())
    if len(reason) > REASON_CHARACTERS:  # TensorStore gives each path some times over
      half = REASON_CHARACTERS // 2
      reason = f"{reason[:half]} ... {reason[-half:]}"
    raise StorageError(f"{path} {action}: {reason}") from error


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
  """Leaves by path, "params/blocks/0/w_key", in the tree's order."""
  leaves = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    if path in leaves or not path:
      raise ValueError(f"two leaves share the path {path!r}" if path else "the state is one leaf")
    leaves[path] = leaf
  return leaves


def require_array(path: str, leaf: Any) -> None:
  """Raises ValueError for a leaf that would not be restored as it is."""
  if isinstance(leaf, np.ndarray) and leaf.dtype != object:
    return  # tables in host memory
  if not isinstance(leaf, jax.Array):
    raise ValueError(f"leaf {path} is a {type(leaf).__name__}: a state's leaves are jax arrays")
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    raise ValueError(f"leaf {path} is a typed key: save jax.random.key_data of it")
  if leaf.weak_type:
    # Restored it would be strong, and the resumed run's arithmetic would promote differently.
    raise ValueError(f"leaf {path} is weakly typed: make it with an explicit dtype")
  if is_multiprocess() and leaf.is_fully_addressable:
    # Each process has one of its own, which may differ from the others'.
    raise ValueError(f"leaf {path} is on this process's devices alone: spread it over the mesh")


def copy_host_arrays(arrays: dict[str, Any]) -> dict[str, Any]:
  """Replaces jax arrays in host memory by copies: Orbax copies NumPy arrays and those on devices.

  Of a CPU array it would write a view, which keeps the next step from donating the array, and which
  changes with the NumPy array that `jax.device_put` may have made it of without a copy.
  """
  on_host = {path: array for path, array in arrays.items() if _in_host_memory(array)}
  shardings = {path: array.sharding for path, array in on_host.items()}
  return arrays | jax.block_until_ready(jax.device_put(on_host, shardings, may_alias=False))


def _in_host_memory(array: Any) -> bool:
  if not isinstance(array, jax.Array):
    return False
  return array.sharding.memory_kind in ("pinned_host", "unpinned_host") or any(
    device.platform == "cpu" for device in array.sharding.device_set
  )


def signature(leaf: Any) -> str:
  """Dtype and shape of a leaf, "float32[2,3]"."""
  return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def require_compatible(
  folder: pathlib.Path,
  saved: dict[str, str],
  leaves: dict[str, Any],
  partial: bool,
  rows: Mapping[str, int],
) -> None:
  """Raises StorageError where Orbax would cast, cut or leave out a leaf without an error.

  Args:
    folder: of the checkpoint, for the message.
    saved: signatures of its leaves by path.
    leaves: of the state to restore, by path.
    partial, rows: as for `Checkpoints.restore`.
  """
  expected = {path: signature(leaf) for path, leaf in leaves.items()}
  problems = []
  for path in expected | saved:
    if path not in saved:
      problems.append(f"leaf {path} is not in the checkpoint, {expected[path]} in the state")
    elif path not in expected:
      if not partial:
        problems.append(f"leaf {path} is {saved[path]} in the checkpoint, not in the state")
    elif not _is_compatible(saved[path], expected[path], _required_rows(path, rows)):
      problems.append(
        f"leaf {path} is {saved[path]} in the checkpoint, {expected[path]} in the state"
      )
  if problems:
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise StorageError(f"{folder} does not fit this state: {'; '.join(problems[:3])}{more}")


def _required_rows(path: str, rows: Mapping[str, int]) -> int | None:
  counts = (count for prefix, count in rows.items() if f"{path}/".startswith(f"{prefix}/"))
  return next(counts, None)


def _is_compatible(saved: str, expected: str, rows: int | None) -> bool:
  """Says whether signatures are equal, apart from leading sizes that both hold `rows`."""
  if saved == expected or rows is None:
    return saved == expected
  pattern = re.compile(r"(\w+)\[(\d+)(.*)\]")
  a, b = pattern.fullmatch(saved), pattern.fullmatch(expected)
  if a is None or b is None:  # a scalar
    return False
  return a.group(1, 3) == b.group(1, 3) and min(int(a[2]), int(b[2])) >= rows


def _is_committed(like: Any) -> bool:
  return like.committed if isinstance(like, jax.Array) else like.sharding is not None


def restore_args(like: Any) -> ocp.RestoreArgs:
  """Orbax's arguments to restore a leaf with the dtype, shape and sharding of `like`."""
  if not _is_committed(like):
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=like.dtype)
  return ocp.ArrayRestoreArgs(
    restore_type=jax.Array,
    dtype=like.dtype,
    sharding=like.sharding,
    global_shape=like.shape,
    strict=False,  # other shapes than the saved were refused, but for rows that are cut or padded
  )


def put_like(array: Any, like: Any) -> jax.Array:
  """Puts a restored array, or zeros for None, where `like` is, cut or padded to its rows."""
  if array is None:  # Orbax stores no arrays without elements
    array = np.zeros(like.shape, like.dtype)
  if isinstance(array, jax.Array):
    return array
  if array.shape != like.shape:
    pad = max(0, like.shape[0] - array.shape[0])
    array = np.pad(array[: like.shape[0]], [(0, pad)] + [(0, 0)] * (array.ndim - 1))
  return jax.device_put(array, like.sharding if _is_committed(like) else None)
