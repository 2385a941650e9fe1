"""Is every process there? Asked before `jax.distributed.initialize`, which would not say who.

When a process is missing, JAX's own start aborts the others at its deadline (no exception, exit
code 134) and names nobody. So the processes first meet on the coordinator's port: each tells
process 0 its number, and process 0 answers all of them at once, with nothing wrong or with who did
not come. The port is free again when JAX binds it.
"""

import contextlib
import json
import math
import socket
import time
from typing import Any

from engram_jax.errors import ConfigError

RETRY_SECONDS = 0.2
LINE_SECONDS = 2.0  # for one line over an open connection
LINE_BYTES = 1 << 16


def roll_call(address: str, processes: int, process: int, timeout: float) -> None:
  """Returns in every process once all are there.

  Args:
    address: host:port of process 0, which nothing else may be listening on.
    processes, process: how many there are, and this one's number.
    timeout: seconds, from the start of whichever process came first.

  Raises ConfigError, in every process that is there, naming those that are not, or two that claim
  one number, or different numbers of processes.
  """
  host, port = split_address(address)
  deadline = time.monotonic() + timeout
  if process == 0:
    problem = _ask_all(port, processes, deadline)
  else:
    problem = _answer(host, port, {"process": process, "processes": processes}, deadline)
  if problem:
    raise ConfigError(f"distributed.coordinator={address!r}: {problem}")


def split_address(address: str) -> tuple[str, int]:
  """("host", port) of "host:port" or "[IPv6]:port"; ConfigError for anything else."""
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise ConfigError(
      f"distributed.coordinator={address!r} is no address: give HOST:PORT with a port of 1 to 65535"
    )
  return host.strip("[]"), int(port)


def _ask_all(port: int, processes: int, deadline: float) -> str | None:
  """Process 0: waits for the others, tells them the outcome, and returns what is wrong."""
  guests: list[tuple[int, socket.socket]] = []
  with contextlib.ExitStack() as stack:
    try:
      server = stack.enter_context(_listen(port))
    except OSError as error:
      return f"process 0 cannot listen on port {port}: {error.strerror}"
    problem = None
    while problem is None and (missing := _absent(guests, processes)):
      left = deadline - time.monotonic()
      if left <= 0:
        problem = _missing(missing, processes)
        break
      server.settimeout(min(left, 1.0))
      with contextlib.suppress(TimeoutError):
        connection = stack.enter_context(server.accept()[0])
        if (hello := _hello(connection)) is not None:
          deadline = min(deadline, time.monotonic() + hello["seconds"])
          guests = [guest for guest in guests if _alive(guest[1])]
          problem = _unfit(hello, {number for number, _ in guests}, processes)
          guests.append((hello["process"], connection))
    for _, connection in guests:
      with contextlib.suppress(OSError):  # it has gone: JAX will notice
        _send(connection, {"problem": problem})
        _receive(connection)  # until it hangs up first, so that the port is free at once
    return problem


def _absent(guests: list[tuple[int, socket.socket]], processes: int) -> list[int]:
  here = {number for number, connection in guests if _alive(connection)}
  return sorted(set(range(1, processes)) - here)


def _unfit(hello: dict[str, Any], here: set[int], processes: int) -> str | None:
  number = hello["process"]
  if hello["processes"] != processes:
    return (
      f"process 0 was started with distributed.processes={processes}, process {number} with "
      f"{hello['processes']}: give all of them the same number"
    )
  if number == 0 or number in here:
    return f"two processes were started with distributed.process={number}: numbers are distinct"
  return None


def _answer(host: str, port: int, hello: dict[str, int], deadline: float) -> str | None:
  """Every other process: reports to process 0 until the deadline; returns what is wrong."""
  reason = "no answer"
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=left) as connection:
        _send(connection, hello | {"engram_jax": 1, "seconds": left})
        # Process 0 speaks at the deadline at the latest.
        if (outcome := _receive(connection, left + LINE_SECONDS)) is not None:
          return outcome["problem"]
    except OSError as error:
      reason = str(error)
    time.sleep(RETRY_SECONDS)
  return f"{_missing([0], hello['processes'])} ({reason})"


def _missing(numbers: list[int], processes: int) -> str:
  few = ", ".join(map(str, numbers[:16])) + (" and more" if len(numbers) > 16 else "")
  which = f"process {few} is" if len(numbers) == 1 else f"{len(numbers)} processes, {few}, are"
  return (
    f"{which} missing of {processes}; see whether it was started with that distributed.process "
    "and reaches this address, or raise distributed.timeout"
  )


def _listen(port: int) -> socket.socket:
  if socket.has_dualstack_ipv6():
    with contextlib.suppress(OSError):  # IPv6 compiled in and switched off
      return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(("", port))


def _hello(connection: socket.socket) -> dict[str, Any] | None:
  """What a process says first; None from a stranger."""
  try:
    hello = _receive(connection)
  except OSError:
    return None
  if not isinstance(hello, dict) or "engram_jax" not in hello:
    return None
  numbers = all(type(hello.get(name)) is int for name in ("process", "processes"))
  seconds = hello.get("seconds")
  return hello if numbers and type(seconds) in (int, float) and 0 < seconds < math.inf else None


def _alive(connection: socket.socket) -> bool:
  connection.setblocking(False)
  try:
    return connection.recv(1, socket.MSG_PEEK) != b""
  except BlockingIOError:
    return True
  except OSError:
    return False
  finally:
    connection.settimeout(LINE_SECONDS)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
  connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, seconds: float | None = None) -> Any:
  """One line of JSON within `seconds` (default: LINE_SECONDS) in all, however slowly it comes, or
  TimeoutError; None when the other side hung up or said something else."""
  received, deadline = b"", time.monotonic() + (LINE_SECONDS if seconds is None else seconds)
  while not received.endswith(b"\n"):
    connection.settimeout(max(deadline - time.monotonic(), 1e-3))
    part = connection.recv(LINE_BYTES)
    if time.monotonic() > deadline:
      raise TimeoutError("no line in time")
    received += part
    if not part or len(received) > LINE_BYTES:
      return None
  try:
    return json.loads(received)
  except ValueError:
    return None
