"""The device mesh: four axes, of which any may have size 1 and then costs nothing.

`data`, `fsdp` and `expert` divide the batch; `fsdp` divides parameters too, `expert` the routed
experts, `tensor` the width of matrices. Memory tables are sharded over all four, flattened.

Local letters: L, memories; b, examples of the batch on this process's devices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")


def make_mesh(
  shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Returns a mesh over the devices (default: all), by axis name; axes not named have size 1.

  Without a shape all devices are on `data`. Raises ValueError for an unknown axis, or sizes that do
  not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = {"data": len(devices)} if shape is None else dict(shape)
  unknown = [axis for axis in shape if axis not in AXES]
  if unknown:
    raise ValueError(f"mesh has no axis {unknown[0]!r}: the axes are {', '.join(AXES)}")
  sizes = tuple(shape.get(axis, 1) for axis in AXES)
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise ValueError(
      f"mesh {shape} holds {math.prod(sizes)} devices but there are {len(devices)}: "
      "positive sizes must multiply to that number"
    )
  # jax.make_mesh refuses sizes that split an axis of the torus, such as 2 x 32 on 4 x 4 x 4.
  device_array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(device_array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding that puts a full copy of an array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its leading axis over `data`, `fsdp` and `expert`."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
  """The number of shards that `batch_sharding` divides a batch into."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def platform(mesh: Mesh | None) -> str:
  """The platform of a mesh's devices, or for None of this process's: "cpu", "gpu" or "tpu".

  The devices need not be attached: a topology to compile for has abstract ones.
  """
  return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def compute_capability(mesh: Mesh | None) -> float | None:
  """The compute capability of a mesh's NVIDIA GPUs, 9.0 of an H100; None for other devices.

  mesh: None stands for this process's devices, as in `platform`.
  """
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  try:
    return float(getattr(device, "compute_capability", ""))  # AMD's is a name
  except ValueError:
    return None


def compute_dtype(name: str, platform: str | None = None) -> Any:
  """The dtype of activations: as named, or for "auto" float32 on CPU and bfloat16 elsewhere.

  platform: of the devices that will compute; default: this process's.
  """
  if name == "auto":
    return jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16
  return jnp.dtype(name)


STACKED = ("row_ids", "slots")  # [L, B, T, J]; every other array of a batch is [B, T]


def process_indices(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """Indices, int64 [b] rising, of the examples of a batch [B, ...] on this process's devices.

  Together the processes make every example; two make the same ones where a `tensor` axis crosses
  them.
  Raises ValueError where the sharding does not divide the batch.
  """
  axes = sharding.spec[0] if len(sharding.spec) else ()
  names = axes if isinstance(axes, tuple) else (axes,)
  parts = math.prod(sharding.mesh.shape[name] for name in names if name is not None)
  if batch_size % parts:
    raise ValueError(
      f"a batch of {batch_size} does not divide over {parts} devices of the axes {', '.join(names)}"
    )
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_global(local: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
  """Returns the batch of all processes, sharded by `batch_sharding(mesh)`.

  Args:
    local: this process's arrays [b, ...], and `row_ids` int32 [L, b, T, J]: the examples of
      `process_indices`, in its order.
    mesh: over the devices of all processes.
    batch_size: B, of all processes together.
  """
  sharding = batch_sharding(mesh)
  indices = process_indices(sharding, batch_size)
  return {
    name: _to_global(array, name, sharding, indices, batch_size) for name, array in local.items()
  }


def _to_global(
  array: np.ndarray, name: str, sharding: NamedSharding, indices: np.ndarray, batch_size: int
) -> jax.Array:
  axis = 1 if name in STACKED else 0
  shape = (*array.shape[:axis], batch_size, *array.shape[axis + 1 :])
  assert array.shape[axis] == len(indices), (
    f"{name} has {array.shape[axis]} examples, not {len(indices)}"
  )

  def shard(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None
    start, stop, _ = index[axis].indices(batch_size)
    begin = int(np.searchsorted(indices, start))  # those of one shard are neighbours here too
    return array[(*index[:axis], slice(begin, begin + stop - start))]

  spec = PartitionSpec(*(None,) * axis, *sharding.spec)
  return jax.make_array_from_callback(shape, NamedSharding(sharding.mesh, spec), shard)
