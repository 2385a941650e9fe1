"""Loss over the validation documents, whole and by source, with the memory on or off."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.core.mesh import replicated
from engram_jax.memory.table import lookup
from engram_jax.training.loss import cross_entropy_on
from engram_jax.training.state import Recipe

LN2 = math.log(2)


def make_eval_step(recipe: Recipe, *, memory: bool = True) -> Callable[..., jax.Array]:
  """`nll_BT = step(params, biases, tables, batch)`: each target's loss in nats, 0 where masked.

  memory=False feeds rows of zeros: what the model does when nothing comes back from the tables.
  """
  cfg = recipe.config

  def step(params: Any, biases: Any, tables: tuple, batch: dict) -> jax.Array:
    model = recipe.model(params, biases)
    shape = (*batch["tokens"].shape, cfg.model.engram.memory_width)
    if memory:
      look = functools.partial(
        lookup, mesh=recipe.mesh, capacity=cfg.model.engram.exchange_capacity
      )
      rows = [look(t, batch["row_ids"][i]).reshape(shape) for i, t in enumerate(tables)]
    else:
      rows = [jnp.zeros(shape, t.dtype) for t in tables]
    hidden_BTD, _ = model(
      batch["tokens"],
      tuple(rows),
      segments_BT=batch["segments"],
      positions_BT=batch["positions"],
      mesh=recipe.mesh,
    )
    _, aux = cross_entropy_on(
      recipe.spread,
      hidden_BTD,
      model.head_DV,
      batch["targets"],
      batch["mask"],
      chunk=cfg.train.loss_chunk,
    )
    return jnp.where(batch["mask"], aux["nll_BT"], 0.0)

  whole = None if recipe.spread is None else replicated(recipe.mesh)
  return jax.jit(step, out_shardings=whole)


def evaluate(
  step: Callable[..., jax.Array],
  state: Any,
  batches: Iterable[dict[str, np.ndarray]],
  token_bytes: np.ndarray,
  sources: Sequence[str],
) -> dict[str, Any]:
  """Mean loss (nats a token), perplexity, bits per byte and counts; `by_source` holds each apart.

  Bits per byte divides by the UTF-8 bytes the targets stand for, so it compares tokenizers.
  """
  nll, tokens, size = (np.zeros(len(sources), np.float64) for _ in range(3))
  for batch in batches:
    loss_BT = np.asarray(step(state.params, state.biases, state.tables, batch), np.float64)
    mask = batch["mask"]
    where = batch["source"][mask]
    nll += np.bincount(where, loss_BT[mask], len(sources))
    tokens += np.bincount(where, minlength=len(sources))
    size += np.bincount(where, token_bytes[batch["targets"][mask]], len(sources))
  result = _summary(nll.sum(), tokens.sum(), size.sum())
  seen = [i for i in range(len(sources)) if tokens[i]]
  result["by_source"] = {sources[i]: _summary(nll[i], tokens[i], size[i]) for i in seen}
  return result


def _summary(nll: float, tokens: float, size: float) -> dict[str, float | int]:
  loss = nll / max(tokens, 1)
  return {
    "loss": loss,
    "perplexity": math.exp(min(loss, 700.0)),
    "bits_per_byte": nll / LN2 / max(size, 1),
    "tokens": int(tokens),
    "bytes": int(size),
  }
