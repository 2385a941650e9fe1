"""Several real processes on this machine, joined over loopback, as several hosts would be."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import NamedTuple

import engram_jax

ROOT = pathlib.Path(engram_jax.__file__).parents[1]

START = """
import os
import sys
# The C++ side of collectives writes to descriptor 1 in the middle of our lines: send it to 2.
sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from engram_jax.cli import run_command
from engram_jax.config import DistributedConfig
from engram_jax.core import distributed
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.mesh import make_mesh

process, processes, port, timeout = map(int, sys.argv[1:5])
arguments = sys.argv[5:]

def main():
  distributed.start(DistributedConfig(
    coordinator=f"127.0.0.1:{port}", processes=processes, process=process, timeout=timeout))
  return body()

"""


class Ended(NamedTuple):
  code: int
  out: list[str]
  err: str


def free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def spawn(
  body: str,
  arguments: Sequence[object] = (),
  *,
  processes: int = 2,
  started: Sequence[int] | None = None,
  devices: int = 4,
  timeout: int = 60,
) -> list[subprocess.Popen]:
  """Starts `def body(): ...` in all processes, or those of `started`, each with its devices."""
  port = free_port()
  script = START + textwrap.dedent(body) + '\nif __name__ == "__main__":\n  run_command(main)\n'
  flags = f"--xla_force_host_platform_device_count={devices}"
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
  words = [*map(str, arguments)]
  return [
    subprocess.Popen(
      [sys.executable, "-c", script, *map(str, (number, processes, port, timeout)), *words],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in (range(processes) if started is None else started)
  ]


def ended(running: list[subprocess.Popen], seconds: float = 120) -> list[Ended]:
  """How each ended; kills all of them where one does not."""
  deadline = time.monotonic() + seconds
  results = []
  try:
    for process in running:
      out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
      lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
      results.append(Ended(process.returncode, lines, err))
  finally:
    for process in running:
      process.kill()
      process.wait()
  return results


def together(body: str, *arguments: object, **options: int) -> list[list[str]]:
  """What each process printed; all of them must end well."""
  results = ended(spawn(body, arguments, **options))
  for result in results:
    assert result.code == 0, result.err[-4000:]
  return [result.out for result in results]
