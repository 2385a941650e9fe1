"""Several processes, usually one a host: how they start, and how they stay in step.

Every process runs the same program on the same config and calls these functions in the same order.
JAX joins them (`jax.distributed`): afterwards `jax.devices()` are those of all processes, and an
array may be sharded over them.

  start(cfg.distributed)              before anything that touches a device
  on_main(lambda: ...)                process 0 runs it, every process gets the result
  first_error(message)                an error of one process is raised in all
  stop_flags(mesh, stop.requested)    for the step to reduce: all see a signal at the same step
  keep_stacks_in(folder)              where a survivor of a lost process writes what it was doing

Local letter: P, devices of the mesh.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.config import DistributedConfig
from engram_jax.core import watchdog
from engram_jax.core.rendezvous import rendezvous
from engram_jax.core.watchdog import keep_stacks_in as keep_stacks_in
from engram_jax.errors import ConfigError, DataError, NoUsableCheckpoint, StorageError

# Raised alike in every process; a kind stands before one that it is of.
_SHARED_ERRORS = (ConfigError, DataError, NoUsableCheckpoint, StorageError, ValueError)
_MIN_SECONDS = 10  # for JAX's own start, once every process is known to be there


class ClusterSpec(NamedTuple):
  """This process's number and those of the others, as `jax.distributed.initialize` takes them."""

  coordinator_address: str
  num_processes: int
  process_id: int


def start(cfg: DistributedConfig) -> None:
  """Joins this process to the others, or does nothing where it is the only one.

  The others are those that `cfg` names, else those of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
  and JAX_PROCESS_ID, else those of the cluster that JAX finds itself in (SLURM, a Cloud TPU pod
  slice, Open MPI, Kubernetes jobs).

  Raises ConfigError within `cfg.timeout` seconds, in each process, naming those that are missing.
  Where a process is lost later, the others leave with code 6 within `cfg.heartbeat` seconds, and
  say which (engram_jax.core.watchdog).
  """
  cluster = find_cluster(cfg, os.environ)
  if cluster is None or cluster.num_processes == 1:
    return
  begin = time.monotonic()
  rendezvous(*cluster, cfg.timeout)
  remaining = cfg.timeout - (time.monotonic() - begin)
  jax.distributed.initialize(
    *cluster,
    initialization_timeout=max(_MIN_SECONDS, int(remaining)),
    # JAX's own watch, which aborts, is for when ours fails.
    heartbeat_timeout_seconds=max(_MIN_SECONDS, 3 * cfg.heartbeat),
    # An exit on one host alone would otherwise wait five minutes for the rest.
    shutdown_timeout_seconds=max(_MIN_SECONDS, cfg.timeout),
  )
  from jax._src.distributed import global_state  # no public name for the key-value store

  watchdog.start(
    global_state.client,
    cluster.process_id,
    cluster.num_processes,
    cfg.heartbeat,
    jax.distributed.shutdown,
  )


def find_cluster(cfg: DistributedConfig, environment: Mapping[str, str]) -> ClusterSpec | None:
  """The cluster that the flags, or else the environment, name; None for a process by itself.

  Raises ConfigError where only a part of it is named.
  """
  address = cfg.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
  if cfg.processes:
    return ClusterSpec(address or "", cfg.processes, cfg.process)
  if "JAX_NUM_PROCESSES" in environment:
    return _from_variables(address, environment)
  return _from_cluster_manager(address, cfg, environment)


def _from_variables(address: str | None, environment: Mapping[str, str]) -> ClusterSpec:
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
  return ClusterSpec(address or "", processes, process)


def _from_cluster_manager(
  address: str | None, cfg: DistributedConfig, environment: Mapping[str, str]
) -> ClusterSpec | None:
  # No public name: JAX's start detects and joins in one go, and aborts where one is missing.
  from jax._src.clusters import ClusterEnv

  for cluster in ClusterEnv._cluster_types:
    if cluster.opt_in_only_method:
      continue
    if cluster.name == "k8s" and "JOB_COMPLETION_INDEX" not in environment:
      continue  # a lone pod
    if cluster.is_env_present():
      port = environment.get("JAX_COORDINATOR_PORT")
      return ClusterSpec(
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


def is_multiprocess() -> bool:
  """Says whether there are other processes; touches no device where `start` found none."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
  """Says whether this is process 0, which writes files and logs."""
  return not is_multiprocess() or jax.process_index() == 0


def first_error(message: str | None) -> str | None:
  """Returns the first process's error message in all of them, or None where there is none.

  All processes call it together.
  """
  if not is_multiprocess():
    return message
  for process, encoded in enumerate(_allgather((message or "").encode())):
    if encoded:
      return f"process {process}: {encoded.decode()}"
  return None


def on_main(function: Callable[[], Any]) -> Any:
  """Runs a function in process 0 and returns its result (JSON values) in every process.

  All processes call it together. A ConfigError, DataError, StorageError or ValueError of process 0
  is raised in every process, and any other exception in process 0 while the others get a
  RuntimeError.
  """
  if not is_multiprocess():
    return function()
  outcome, raised = {}, None
  if is_main():
    try:
      outcome = {"value": function()}
    except Exception as error:
      raised = error
      outcome = {"error": _shared_type(error), "message": str(error)}
  outcome = json.loads(_allgather(json.dumps(outcome).encode() if is_main() else b"")[0])
  if raised is not None:
    raise raised
  if "error" in outcome:
    error_types = {error_type.__name__: error_type for error_type in _SHARED_ERRORS}
    raise error_types.get(outcome["error"], RuntimeError)(outcome["message"])
  return outcome["value"]


def _shared_type(error: Exception) -> str:
  names = (kind.__name__ for kind in _SHARED_ERRORS if isinstance(error, kind))
  return next(names, "RuntimeError")


def _allgather(payload: bytes) -> list[bytes]:
  """Every process's payload, in every process."""
  sizes = multihost_utils.process_allgather(np.int32(len(payload)))
  padded = np.zeros(max(1, int(sizes.max())), np.uint8)
  padded[: len(payload)] = np.frombuffer(payload, np.uint8)
  gathered = multihost_utils.process_allgather(padded)
  return [row[:size].tobytes() for row, size in zip(gathered, sizes.tolist(), strict=True)]


@functools.lru_cache(maxsize=8)
def _stop_flags(mesh: Mesh, flag: bool) -> jax.Array:
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  local_flag = np.full((1,), flag, np.int32)
  return jax.make_array_from_callback((mesh.size,), sharding, lambda _: local_flag)


def stop_flags(mesh: Mesh, flag: bool) -> jax.Array:
  """int32 [P], an entry on each device: 1 on the devices of processes whose flag is set.

  It is an argument of the train step, which returns its maximum among the metrics: read where those
  are read anyway, it shows all processes one process's signal at the same step, without another
  synchronisation. It is made once for each value; do not donate it.
  """
  return _stop_flags(mesh, bool(flag))
