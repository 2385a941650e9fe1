"""Clipping, and what a loss or gradient that is not a number must not touch."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def clip_by_global_norm(grads: Any, limit: float) -> tuple[Any, jax.Array]:
  """The gradients scaled to a global L2 norm of at most `limit`, and the float32 norm they had.

  `grads` is any tree: pass the backbone's and the tables' row gradients together. A row gradient
  summed over its uses has the norm of the dense table gradient it stands for. `limit` 0 leaves
  them as they are. The norm is finite only where every gradient is, so it checks them too.
  """
  norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), grads))
  if limit == 0:
    return grads, norm
  scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
  return jax.tree.map(lambda x: (scale * x).astype(x.dtype), grads), norm


def keep_if(ok: jax.Array, new: Any, old: Any) -> Any:
  """`new` where the bool scalar `ok` holds, else `old`, leaf by leaf; `old` stays bit-identical."""
  return jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)
