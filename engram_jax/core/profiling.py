"""The machine's matrix-multiplication speed, measured: the denominator of MFU."""

import time

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
