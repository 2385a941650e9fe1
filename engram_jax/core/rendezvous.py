"""A meeting of all processes before `jax.distributed.initialize`, which names no missing one.

When a process is missing, JAX's own start aborts the others a few seconds after its deadline (no
exception, exit code 134). So the processes first meet on the coordinator's port: each sends process
0 its number, and process 0 answers all of them at once, with no problem or with the numbers that
are missing. The port is free again when JAX binds it.

Tried with jax 0.10.2, to do without:
- `jax.distributed.initialize(initialization_timeout=10)`: after 15 s the others abort, and name
  none ("DEADLINE_EXCEEDED ... RegisterTask"), whether process 0 or another is missing.
- A service of our own with a `cluster_register_timeout` shorter than the clients': its error names
  up to two that are missing, in the text of the same abort.
- A `missed_heartbeat_callback` in place of the abort: std::bad_cast, for its argument has no Python
  type, and so an abort.
- Finding one another in the service's key-value store before `connect`: the service refuses a
  client that is not registered, and the client aborts.
- A barrier with a timeout, whose error does name those that did not come: it needs `connect` first.
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


def rendezvous(address: str, processes: int, process: int, timeout: float) -> None:
  """Returns in every process once all are there.

  Args:
    address: host:port of process 0, which nothing else may be listening on.
    processes: how many there are.
    process: this one's number.
    timeout: seconds, from the start of whichever process came first.

  Raises ConfigError, in every process that is there, naming those that are not, or two that claim
  one number, or different numbers of processes.
  """
  host, port = split_address(address)
  deadline = time.monotonic() + timeout
  if process == 0:
    problem = _coordinate(port, processes, deadline)
  else:
    problem = _join(host, port, {"process": process, "processes": processes}, deadline)
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


def _coordinate(port: int, processes: int, deadline: float) -> str | None:
  """Waits in process 0 for the others, sends them the outcome, and returns the problem, if any."""
  connections: list[tuple[int, socket.socket]] = []
  with contextlib.ExitStack() as stack:
    try:
      server = stack.enter_context(_listen(port))
    except OSError as error:
      return f"process 0 cannot listen on port {port}: {error.strerror}"
    problem = None
    while problem is None and (missing := _missing(connections, processes)):
      remaining = deadline - time.monotonic()
      if remaining <= 0:
        problem = _missing_message(missing, processes)
        break
      server.settimeout(min(remaining, 1.0))
      with contextlib.suppress(TimeoutError):
        connection = stack.enter_context(server.accept()[0])
        if (hello := _receive_hello(connection)) is not None:
          deadline = min(deadline, time.monotonic() + hello["seconds"])
          connections = [(number, other) for number, other in connections if _is_open(other)]
          problem = _conflict(hello, {number for number, _ in connections}, processes)
          connections.append((hello["process"], connection))
    for _, connection in connections:
      with contextlib.suppress(OSError):  # it has gone: JAX will notice
        _send(connection, {"problem": problem})
        _receive(connection)  # until it hangs up first, so that the port is free at once
    return problem


def _missing(connections: list[tuple[int, socket.socket]], processes: int) -> list[int]:
  present = {number for number, connection in connections if _is_open(connection)}
  return sorted(set(range(1, processes)) - present)


def _conflict(hello: dict[str, Any], present: set[int], processes: int) -> str | None:
  number = hello["process"]
  if hello["processes"] != processes:
    return (
      f"process 0 was started with distributed.processes={processes}, process {number} with "
      f"{hello['processes']}: give all of them the same number"
    )
  if number == 0 or number in present:
    return f"two processes were started with distributed.process={number}: numbers are distinct"
  return None


def _join(host: str, port: int, hello: dict[str, int], deadline: float) -> str | None:
  """Reports to process 0 until the deadline, from any other; returns the problem, if any."""
  reason = "no answer"
  while (remaining := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=remaining) as connection:
        _send(connection, hello | {"engram_jax": 1, "seconds": remaining})
        # Process 0 answers at the deadline at the latest.
        if (outcome := _receive(connection, remaining + LINE_SECONDS)) is not None:
          return outcome["problem"]
    except OSError as error:
      reason = str(error)
    time.sleep(RETRY_SECONDS)
  return f"{_missing_message([0], hello['processes'])} ({reason})"


def _missing_message(missing: list[int], processes: int) -> str:
  numbers = ", ".join(map(str, missing[:16])) + (" and more" if len(missing) > 16 else "")
  one = len(missing) == 1
  subject = f"process {numbers} is" if one else f"{len(missing)} processes, {numbers}, are"
  return (
    f"{subject} missing of {processes}; see whether it was started with that distributed.process "
    "and reaches this address, or raise distributed.timeout"
  )


def _listen(port: int) -> socket.socket:
  if socket.has_dualstack_ipv6():
    with contextlib.suppress(OSError):  # IPv6 compiled in and switched off
      return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(("", port))


def _receive_hello(connection: socket.socket) -> dict[str, Any] | None:
  """The first message of a process; None from any other program."""
  try:
    hello = _receive(connection)
  except OSError:
    return None
  if not isinstance(hello, dict) or "engram_jax" not in hello:
    return None
  has_numbers = all(type(hello.get(name)) is int for name in ("process", "processes"))
  seconds = hello.get("seconds")
  has_seconds = type(seconds) in (int, float) and 0 < seconds < math.inf
  return hello if has_numbers and has_seconds else None


def _is_open(connection: socket.socket) -> bool:
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
  """Returns one line of JSON, or None when the other side hung up or sent something else.

  Raises TimeoutError where the line is not complete within `seconds` (default: LINE_SECONDS) in
  all, however slowly it comes.
  """
  received, deadline = b"", time.monotonic() + (LINE_SECONDS if seconds is None else seconds)
  while not received.endswith(b"\n"):
    connection.settimeout(max(deadline - time.monotonic(), 1e-3))
    chunk = connection.recv(LINE_BYTES)
    if time.monotonic() > deadline:
      raise TimeoutError("no line in time")
    received += chunk
    if not chunk or len(received) > LINE_BYTES:
      return None
  try:
    return json.loads(received)
  except ValueError:
    return None
