"""Clipping, and what a loss or gradient that is not a number must not touch."""

from typing import Any

import jax
import jax.numpy as jnp


def global_norm(grads: Any, more_sq: jax.typing.ArrayLike = 0.0) -> jax.Array:
  """The float32 L2 norm of a tree; `more_sq`, of the rows' gradients, is added under the root.

  A row gradient summed over its uses has the norm of the dense table gradient it stands for. The
  norm is finite only where every gradient is, so it checks them too.
  """
  squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)]
  return jnp.sqrt(sum(squares, jnp.float32(0)) + more_sq)


def clip_scale(norm: jax.Array, limit: float) -> jax.Array:
  """What to multiply gradients of this norm with to bring it to at most `limit`; 0 is no limit."""
  if limit == 0:
    return jnp.float32(1)
  return jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))


def keep_if(ok: jax.Array, new: Any, old: Any) -> Any:
  """`new` where the bool scalar `ok` holds, else `old`, leaf by leaf; `old` stays bit-identical."""
  return jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)
