"""Profiling: a trace of a few steps, and the matmul speed that MFU is measured against."""

import contextlib
import pathlib
import time
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

CPU_SIZE = 1024
ACCELERATOR_SIZE = 8192


def matmul_peak(
  dtype: jax.typing.DTypeLike = jnp.float32, size: int | None = None, seconds: float = 0.5
) -> float:
  """FLOP/s of the fastest of repeated square matmuls on one default device, with all its cores.

  The best time, not the mean: other work on the machine only ever slows one down. Precision is the
  default of the platform (on GPU and TPU a float32 product may use fewer bits).

  Args:
    dtype: of the factors, as the model computes.
    size: rows and columns; default 1,024 on CPU, where it is past the caches' ramp, and 8,192
      elsewhere, where a launch then costs nothing beside it.
    seconds: how long to repeat, after compiling; at least three times.
  """
  if size is None:
    size = CPU_SIZE if jax.default_backend() == "cpu" else ACCELERATOR_SIZE
  left, right = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
  multiply = jax.jit(jnp.matmul).lower(left, right).compile()
  multiply(left, right).block_until_ready()
  times: list[float] = []
  end = time.perf_counter() + seconds
  while len(times) < 3 or time.perf_counter() < end:
    start = time.perf_counter()
    multiply(left, right).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2 * size**3 / min(times)


class TraceWindow:
  """A `jax.profiler` trace of the steps `first` to `last`; a context manager.

  XProf and TensorBoard (with its profile plugin) open the folder. Each step is marked by its
  number, and operations carry the named scopes of the model and its tables.
  """

  def __init__(self, window: tuple[int, int] | None, folder: pathlib.Path):
    """Traces nothing for None; else into `folder`, made when the trace begins."""
    self._window, self._folder, self._running = window, folder, False

  def __enter__(self) -> "TraceWindow":
    return self

  def __exit__(self, *_: object) -> None:
    if self._running:
      self._stop()

  @contextlib.contextmanager
  def step(self, step: int) -> Generator[None]:
    """Traces the step that runs inside this context, if it is in the window."""
    if self._window is None or not self._window[0] <= step <= self._window[1]:
      yield
      return
    if not self._running:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      yield

  def end(self, step: int, result: Any) -> bool:
    """Ends the trace after the window's last step, once its `result` is ready.

    Returns True if it did.
    """
    if self._window is None or not self._running or step < self._window[1]:
      return False
    jax.block_until_ready(result)
    self._stop()
    return True

  def _stop(self) -> None:
    self._running = False
    jax.profiler.stop_trace()
