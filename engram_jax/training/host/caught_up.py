"""Records of rows that lag behind, brought up to date."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.training.host.fetch import filled
from engram_jax.training.host.records import Records
from engram_jax.training.rows.form import TouchedRows


def caught_up(
  optimizer: TouchedRows,
  form: Records,
  scalars: tuple,
  ids_n: np.ndarray,
  records_n: np.ndarray,
  size: int,
) -> np.ndarray:
  """Records [n] as `optimizer.flush` would leave them; n up to `size`, which compiles once.

  ids_n: int32, their rows. scalars: those of the optimizer's state.
  """
  row, *rest = (filled(x, size) for x in form.split(records_n))
  state = form.tree(tuple(rest), scalars)
  places = np.arange(size, dtype=np.int32)
  first_row = filled(ids_n, size).astype(np.uint32) - places.astype(np.uint32)
  row, state = _program(optimizer)(row, state, places, first_row)
  leaves = (row, *form.apart(state)[0])
  return form.join(tuple(np.asarray(x)[: len(ids_n)] for x in leaves))


@functools.lru_cache(maxsize=8)
def _program(optimizer: TouchedRows):
  def prepare(row, state, places, first_row):
    return optimizer.prepare(jnp.asarray(row), state, places, first_row=first_row)

  return jax.jit(prepare)
