"""TPU slices and GPU nodes to compile for without having them: their devices, memory and speed.

Neither compiler needs its devices. A name is GENERATION:SHAPE: of TPUs in chips, as in Cloud TPU's
`--topology` (v5p:4x4x8 is 128 chips), of GPUs as many as a host has (h100:8), before it the hosts
(h100:2x8); the numbers of each GPU stand in aot/gpus.py.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from engram_jax.aot.gpus import GPUS, Gpu, abstract_gpus
from engram_jax.aot.hlo_cost import Rates
from engram_jax.errors import ConfigError

GiB = 2**30
SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
# libtpu asks a metadata server, looks for this machine's place in a slice, and takes a lock that
# one process may hold; a compiler without chips needs none of it.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Generation(NamedTuple):
  """A generation of TPUs."""

  hbm_bytes: int
  """Memory of one device that the compiler lets a program use (a little is reserved)."""
  peak_flops: float
  """bf16 FLOP/s of one device, as published."""
  rates: Rates
  """Rates behind the compiler's `optimal_seconds`: of one matrix product of 8,192 x 8,192, and of
  adding one to such an array."""
  shapes: tuple[str, ...]
  """Shapes, in chips, of the slices that Cloud TPU offers. The compiler takes others too."""
  devices_per_chip: int = 1
  options: Mapping[str, Any] = {}


MEGACORE = {"chip_config_name": "megacore"}  # one device a chip, as JAX has it on a v4
SHAPES_V5P = (*SHAPES_3D, "8x16x16", "16x16x16", "16x16x24")
GENERATIONS = {
  "v4": Generation(
    int(30.75 * GiB), 275e12, Rates(241.2e12, 0.9825e12), SHAPES_3D, options=MEGACORE
  ),
  "v5e": Generation(int(15.75 * GiB), 197e12, Rates(197e12, 0.7377e12), SHAPES_2D),
  "v5p": Generation(int(95.73 * GiB), 459e12, Rates(394e12, 2.3504e12), SHAPES_V5P),
  "v6e": Generation(int(31.24 * GiB), 918e12, Rates(918e12, 1.638e12), SHAPES_2D),
  "tpu7x": Generation(
    int(94.74 * GiB), 1153.5e12, Rates(996e12, 3.686e12), SHAPES_3D, devices_per_chip=2
  ),
}


class Topology(NamedTuple):
  """A slice or a group of nodes: its name, its generation and the number of its devices."""

  name: str
  generation: Generation | Gpu
  devices: int

  @property
  def is_gpu(self) -> bool:
    """Says whether its devices are GPUs."""
    return isinstance(self.generation, Gpu)


def topology(name: str) -> Topology:
  """Parses a name, without the compiler; ConfigError for one that no slice has."""
  kind, _, shape = name.partition(":")
  if kind in GPUS and re.fullmatch(r"([1-9]\d{0,3}x)?[1-9]\d?", shape):
    return Topology(name, GPUS[kind], math.prod(map(int, shape.split("x"))))
  generation = GENERATIONS.get(kind)
  if generation is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
    raise ConfigError(f"topology {name!r} is none of the known ones: {topology_names()}")
  sides = [int(side) for side in shape.split("x")]
  if len(sides) != generation.shapes[0].count("x") + 1:
    raise ConfigError(
      f"topology {name!r} has {len(sides)} dimensions: {kind} comes as "
      f"{', '.join(generation.shapes)}"
    )
  return Topology(name, generation, math.prod(sides) * generation.devices_per_chip)


def topology_names() -> str:
  """The names of all topologies, one generation after the other, for messages."""
  slices = [f"{kind}:{{{','.join(made.shapes)}}}" for kind, made in GENERATIONS.items()]
  return "; ".join([*slices, f"{{{','.join(GPUS)}}}:GPUS or :HOSTSxGPUS, such as h100:2x8"])


def abstract_devices(target: Topology) -> list:
  """Returns the slice's devices, to compile for: `jax.Device`s that hold no array.

  It changes the process's environment (ENVIRONMENT, where unset) and loads libtpu, so it is for a
  command that does nothing else; so does `abstract_gpus`. ConfigError without libtpu, or for a
  shape that it refuses.
  """
  if isinstance(target.generation, Gpu):
    kind, _, shape = target.name.partition(":")
    hosts, _, gpus = shape.rpartition("x")
    return abstract_gpus(kind, int(hosts or 1), int(gpus))
  import jax
  from jax.experimental import topologies

  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  options = dict(target.generation.options)
  if set(target.name.partition(":")[2]) <= set("1x"):  # libtpu 0.0.42 looks for a host of 2x2 chips
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    description = topologies.get_topology_desc(target.name, "tpu", **options)
  except RuntimeError as error:
    if isinstance(error, jax.errors.JaxRuntimeError):
      raise ConfigError(f"topology {target.name!r}: the TPU compiler says {error}") from None
    raise ConfigError(
      f"topology {target.name!r} needs the TPU compiler: pip install 'engram_jax[tpu]'"
    ) from None
  assert len(description.devices) == target.devices, (target, len(description.devices))
  return description.devices
