"""Several processes, usually one a host: how they start, and how they stay of one mind.

Every process runs the same program on the same config and calls what is here in the same order. JAX
joins them (`jax.distributed`): afterwards `jax.devices()` are those of all, and an array may be
spread over them.

  start(cfg.distributed)              before anything that touches a device
  on_main(lambda: ...)                process 0 does it, every process gets the outcome
  agree(problem)                      a problem of one process is everybody's
  stop_flags(mesh, stop.requested)    for the step to reduce: all see a signal at the same step
"""

import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.config import DistributedConfig
from engram_jax.core.rendezvous import roll_call
from engram_jax.errors import ConfigError, DataError, StorageError

_TOLD = (ConfigError, DataError, StorageError, ValueError)  # raised alike in every process
_LEAST_SECONDS = 10  # for JAX's own start, once everybody is known to be there


class Place(NamedTuple):
  """Where this process stands among all."""

  coordinator: str
  processes: int
  process: int


def start(cfg: DistributedConfig) -> None:
  """Joins this process to the others, or does nothing where it is the only one.

  The others are those that `cfg` names, else those of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
  and JAX_PROCESS_ID, else those of the cluster that JAX finds itself in (SLURM, a Cloud TPU pod
  slice, Open MPI, Kubernetes jobs).

  Raises ConfigError within `cfg.timeout` seconds, in each process, naming who is missing. A process
  that dies later takes the others with it (JAX ends them), after about as long.
  """
  place = find_place(cfg, os.environ)
  if place is None or place.processes == 1:
    return
  begin = time.monotonic()
  roll_call(*place, cfg.timeout)
  left = cfg.timeout - (time.monotonic() - begin)
  jax.distributed.initialize(
    *place,
    initialization_timeout=max(_LEAST_SECONDS, int(left)),
    heartbeat_timeout_seconds=max(_LEAST_SECONDS, cfg.timeout),
    # An exit on one host alone would otherwise wait five minutes for the rest.
    shutdown_timeout_seconds=max(_LEAST_SECONDS, cfg.timeout),
  )


def find_place(cfg: DistributedConfig, environment: dict[str, str] | os._Environ) -> Place | None:
  """What the flags, or else the environment, say; None where they name no other process."""
  address = cfg.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
  if cfg.processes:
    return Place(address or "", cfg.processes, cfg.process)
  if "JAX_NUM_PROCESSES" in environment:
    return _from_variables(address, environment)
  return _from_cluster(address, cfg, environment)


def _from_variables(address: str | None, environment: dict[str, str] | os._Environ) -> Place:
  numbers = []
  for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
    value = environment.get(name, "")
    if not value.isdigit():
      raise ConfigError(f"{name}={value!r} is no number: JAX_NUM_PROCESSES is set, so both count")
    numbers.append(int(value))
  processes, process = numbers
  if process >= processes:
    raise ConfigError(f"JAX_PROCESS_ID={process} is outside JAX_NUM_PROCESSES={processes}")
  if processes > 1 and not address:
    raise ConfigError(
      f"JAX_NUM_PROCESSES={processes} need to find one another: set JAX_COORDINATOR_ADDRESS, or "
      "give distributed.coordinator=HOST:PORT"
    )
  return Place(address or "", processes, process)


def _from_cluster(
  address: str | None, cfg: DistributedConfig, environment: dict[str, str] | os._Environ
) -> Place | None:
  # No public name: JAX's start detects and joins in one go, and aborts where one is missing.
  from jax._src.clusters import ClusterEnv

  for cluster in ClusterEnv._cluster_types:
    if cluster.opt_in_only_method:
      continue
    if cluster.name == "k8s" and "JOB_COMPLETION_INDEX" not in environment:
      continue  # a lone pod
    if cluster.is_env_present():
      port = environment.get("JAX_COORDINATOR_PORT")
      return Place(
        address
        or cluster.get_coordinator_address(
          timeout_secs=cfg.timeout, override_coordinator_port=port
        ),
        cluster.get_process_count(),
        cluster.get_process_id(),
      )
  if address:
    raise ConfigError(
      f"distributed.coordinator={address!r} is given but not how many processes there are, and no "
      "cluster says it: give distributed.processes and distributed.process"
    )
  return None


def several() -> bool:
  """Whether there are other processes; touches no device where `start` found none."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
  """Whether this is process 0, the one that writes and speaks."""
  return not several() or jax.process_index() == 0


def agree(problem: str | None) -> str | None:
  """The first process's problem in all of them, None where none has one; all call it together."""
  if not several():
    return problem
  for process, said in enumerate(_gather((problem or "").encode())):
    if said:
      return f"process {process}: {said.decode()}"
  return None


def on_main(act: Callable[[], Any]) -> Any:
  """What `act` returns in process 0 (JSON values), in every process; all call it together.

  A ConfigError, DataError, StorageError or ValueError of process 0 is raised in every process, and
  any other exception in process 0 while the others get a RuntimeError.
  """
  if not several():
    return act()
  outcome, raised = {}, None
  if is_main():
    try:
      outcome = {"value": act()}
    except Exception as error:
      raised = error
      outcome = {"error": _kind(error), "message": str(error)}
  outcome = json.loads(_gather(json.dumps(outcome).encode() if is_main() else b"")[0])
  if raised is not None:
    raise raised
  if "error" in outcome:
    kinds = {kind.__name__: kind for kind in _TOLD}
    kind = kinds.get(outcome["error"], RuntimeError)
    raise kind(outcome["message"])
  return outcome["value"]


def _kind(error: Exception) -> str:
  return next((kind.__name__ for kind in _TOLD if isinstance(error, kind)), "RuntimeError")


def _gather(said: bytes) -> list[bytes]:
  """What each process says, in every process."""
  sizes = multihost_utils.process_allgather(np.int32(len(said)))
  padded = np.zeros(max(1, int(sizes.max())), np.uint8)
  padded[: len(said)] = np.frombuffer(said, np.uint8)
  everything = multihost_utils.process_allgather(padded)
  return [row[:size].tobytes() for row, size in zip(everything, sizes.tolist(), strict=True)]


@functools.lru_cache(maxsize=8)
def _flags(mesh: Mesh, flag: bool) -> jax.Array:
  axes = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  mine = np.full((1,), flag, np.int32)
  return jax.make_array_from_callback((mesh.size,), axes, lambda _: mine)


def stop_flags(mesh: Mesh, flag: bool) -> jax.Array:
  """int32 [devices], sharded over all of them: 1 on the devices of processes whose flag is set.

  An argument of the train step, which returns its maximum among the metrics: read where those are
  read anyway, it tells all processes of one process's signal at the same step, without another
  synchronisation. Made once for each value; do not donate it.
  """
  return _flags(mesh, bool(flag))
