"""Arrays in a checkpoint and leaves of a state: what may be saved, what fits, where it goes."""

import contextlib
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from engram_jax.core.distributed import several
from engram_jax.errors import StorageError

PyTree = Any
CHUNK_BYTES = 64 << 20  # what is read at once: a table saved on one device is restored on many


class SavedArray:
  """An array in a checkpoint that is read a few rows at a time, in whatever order."""

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
    """The whole array, or with `start, stop` those rows of it."""
    with as_storage_error(self._name, "cannot be read"):
      return (self._array[slice(*rows)] if rows else self._array).read().result()


@contextlib.contextmanager
def as_storage_error(path: pathlib.Path, what: str) -> Iterator[None]:
  """Turns what the system, Orbax and TensorStore raise about files into a StorageError."""
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    reason = " ".join(str(error).split())
    raise StorageError(f"{path} {what}: {reason}") from error


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
  """Leaves by path, "params/blocks/0/w_key", in the tree's order."""
  found = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    if path in found or not path:
      raise ValueError(f"two leaves share the path {path!r}" if path else "the state is one leaf")
    found[path] = leaf
  return found


def require_array(path: str, leaf: Any) -> None:
  if isinstance(leaf, np.ndarray) and leaf.dtype != object:
    return  # tables in host memory
  if not isinstance(leaf, jax.Array):
    raise ValueError(f"leaf {path} is a {type(leaf).__name__}: a state's leaves are jax arrays")
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    raise ValueError(f"leaf {path} is a typed key: save jax.random.key_data of it")
  if leaf.weak_type:
    # Restored it would be strong, and the resumed run's arithmetic would promote differently.
    raise ValueError(f"leaf {path} is weakly typed: make it with an explicit dtype")
  if several() and leaf.is_fully_addressable:
    # Each process has one of its own, and nothing says that they are equal.
    raise ValueError(f"leaf {path} is on this process's devices alone: spread it over the mesh")


def own_copies(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Copies arrays in host memory; Orbax copies only those of NumPy and those on an accelerator.

  Of a CPU array it would write a view, which keeps the next step from donating the array, and which
  changes with the NumPy array that `jax.device_put` may have made it of without a copy.
  """
  of_jax = {path: array for path, array in arrays.items() if isinstance(array, jax.Array)}
  mine = {path: array for path, array in of_jax.items() if _in_host_memory(array)}
  places = {path: array.sharding for path, array in mine.items()}
  return arrays | jax.block_until_ready(jax.device_put(mine, places, may_alias=False))


def _in_host_memory(array: jax.Array) -> bool:
  kind = array.sharding.memory_kind
  return kind in ("pinned_host", "unpinned_host") or any(
    device.platform == "cpu" for device in array.sharding.device_set
  )


def signature(leaf: Any) -> str:
  return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def require_same_tree(
  folder: pathlib.Path,
  saved: dict[str, str],
  wanted: dict[str, Any],
  partial: bool,
  rows: Mapping[str, int],
) -> None:
  """Refuses what Orbax would cast, cut or leave out without a word."""
  here = {path: signature(leaf) for path, leaf in wanted.items()}
  problems = []
  for path in here | saved:
    if path not in saved:
      problems.append(f"leaf {path} is not in the checkpoint, {here[path]} in the state")
    elif path not in here and not partial:
      problems.append(f"leaf {path} is {saved[path]} in the checkpoint, not in the state")
    elif path in here and not _fits(saved[path], here[path], _rows_of(path, rows)):
      problems.append(f"leaf {path} is {saved[path]} in the checkpoint, {here[path]} in the state")
  if problems:
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise StorageError(f"{folder} does not fit this state: {'; '.join(problems[:3])}{more}")


def _rows_of(path: str, rows: Mapping[str, int]) -> int | None:
  above = (count for prefix, count in rows.items() if f"{path}/".startswith(f"{prefix}/"))
  return next(above, None)


def _fits(saved: str, here: str, rows: int | None) -> bool:
  """Whether signatures are equal, apart from leading sizes that both hold `rows`."""
  if saved == here or rows is None:
    return saved == here
  pattern = re.compile(r"(\w+)\[(\d+)(.*)\]")
  left, right = pattern.fullmatch(saved), pattern.fullmatch(here)
  if left is None or right is None:  # a scalar
    return False
  return left.group(1, 3) == right.group(1, 3) and min(int(left[2]), int(right[2])) >= rows


def _committed(like: Any) -> bool:
  return like.committed if isinstance(like, jax.Array) else like.sharding is not None


def restore_args(like: Any) -> ocp.RestoreArgs:
  if not _committed(like):
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=like.dtype)
  return ocp.ArrayRestoreArgs(
    restore_type=jax.Array,
    dtype=like.dtype,
    sharding=like.sharding,
    global_shape=like.shape,
    strict=False,  # other shapes than the saved were refused, but for rows that fill up
  )


def placed(array: Any, like: Any) -> jax.Array:
  if array is None:  # Orbax stores no arrays without elements
    array = np.zeros(like.shape, like.dtype)
  if isinstance(array, jax.Array):
    return array
  if array.shape != like.shape:
    more = max(0, like.shape[0] - array.shape[0])
    array = np.pad(array[: like.shape[0]], [(0, more)] + [(0, 0)] * (array.ndim - 1))
  return jax.device_put(array, like.sharding if _committed(like) else None)
