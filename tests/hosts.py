"""Several processes on this machine, joined over loopback as several hosts would be."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from conftest import Lab

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

process, processes, port, timeout, heartbeat = map(int, sys.argv[1:6])
arguments = sys.argv[6:]

def main():
  distributed.start(DistributedConfig(
    coordinator=f"127.0.0.1:{port}", processes=processes, process=process, timeout=timeout,
    heartbeat=heartbeat))
  return body()

"""


class ProcessResult(NamedTuple):
  """Exit code, lines of stdout and text of stderr of a process."""

  code: int
  out: list[str]
  err: str


def free_port() -> int:
  """A port of this machine that nothing listened on a moment ago."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def spawn_processes(
  body: str,
  arguments: Sequence[object] = (),
  *,
  processes: int = 2,
  process_ids: Sequence[int] | None = None,
  devices: int = 4,
  timeout: int = 60,
  heartbeat: int = 30,
) -> list[subprocess.Popen]:
  """Starts `def body(): ...` in all processes, or those of `process_ids`, each with its devices."""
  port = free_port()
  script = START + textwrap.dedent(body) + '\nif __name__ == "__main__":\n  run_command(main)\n'
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
  numbers = (processes, port, timeout, heartbeat)
  return [
    subprocess.Popen(
      [sys.executable, "-c", script, *map(str, (process, *numbers, *arguments))],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in (range(processes) if process_ids is None else process_ids)
  ]


def spawn_training(
  lab: Lab, root: pathlib.Path, *options: object, processes: int = 1, devices: int = 8
) -> list[subprocess.Popen]:
  """Starts train.py in all processes of one run, each with its devices."""
  port = free_port()
  flags = f"{lab.environment['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
  environment = lab.environment | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  command = [sys.executable, "train.py", "--config", lab.config, "--run.root", root, *options]
  joined = ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.processes", processes]
  joined.append("--distributed.process")
  return [
    subprocess.Popen(
      [*map(str, [*command, *([*joined, process] if processes > 1 else [])])],
      env=environment,
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in range(processes)
  ]


def wait_for_all(processes: list[subprocess.Popen], seconds: float = 120) -> list[ProcessResult]:
  """Waits until all processes have ended, and kills all of them where one does not."""
  deadline = time.monotonic() + seconds
  results = []
  try:
    for process in processes:
      out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
      lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
      results.append(ProcessResult(process.returncode, lines, err))
  finally:
    for process in processes:
      process.kill()
      process.wait()
  return results


def metrics(root: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of the metrics of run `t` so far; none where it has not begun."""
  path = root / "t" / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith("\n")]


def run_processes(body: str, *arguments: object, **options: int) -> list[list[str]]:
  """Runs processes to their ends, which must be good; the lines that each printed."""
  results = wait_for_all(spawn_processes(body, arguments, **options))
  for result in results:
    assert result.code == 0, result.err[-4000:]
  return [result.out for result in results]
