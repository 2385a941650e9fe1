"""The device mesh: four axes, of which any may have size 1 and then costs nothing.

`data`, `fsdp` and `expert` divide the batch; `fsdp` divides parameters too, `expert` the routed
experts, `tensor` the width of matrices. Memory tables are sharded over all four, flattened.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")


def make_mesh(
  shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh over the devices (default: all), by axis name; axes not named have size 1.

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
  placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis over `data`, `fsdp` and `expert`, whole on each device along `tensor`."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
  """How many parts the batch is divided into."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def platform(mesh: Mesh | None) -> str:
  """What the mesh's devices are, or for None this process's: "cpu", "gpu" or "tpu".

  The devices need not be attached: a topology to compile for has abstract ones.
  """
  return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
