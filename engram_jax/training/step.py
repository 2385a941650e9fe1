"""One training step: gradients with respect to the parameters and the touched rows, then updates.

Rows are gathered once per distinct id, so a table's gradient is as large as the batch's ids and the
step's cost does not depend on the table's size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from engram_jax.memory.unique import expand, take_rows, unique_rows
from engram_jax.model.moe import updated_bias
from engram_jax.training.loss import chunked_cross_entropy
from engram_jax.training.nonfinite import clip_by_global_norm, keep_if
from engram_jax.training.state import Recipe, TrainState

Batch = dict[str, jax.Array]


def make_train_step(recipe: Recipe) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """`step(state, batch) -> (state, metrics)`, jitted; the state's buffers are donated.

  batch: the pipeline's arrays, each [B, T] int32 or bool, and row_ids int32 [L, B, T, J].
  A loss or gradient that is not finite leaves everything but the counters as it was.
  """
  train = recipe.config.train

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
    ids = [unique_rows(row_ids, t.shape[0]) for row_ids, t in zip_rows(batch, state.tables)]
    rows = tuple(take_rows(t, i.ids_U) for t, i in zip(state.tables, ids, strict=True))
    inverses = tuple(i.inverse for i in ids)

    grads, out = loss_and_grads(recipe, state, rows, inverses, batch)
    grads, norm = clip_by_global_norm(grads, train.optimizer.clip_norm)
    ok = jnp.isfinite(out["loss"]) & jnp.isfinite(norm)

    updates, optimizer = recipe.optimizer.update(grads[0], state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    updated = [
      recipe.row_optimizer.update(g, s, t, i.ids_U, ok)
      for g, s, t, i in zip(grads[1], state.row_optimizers, state.tables, ids, strict=True)
    ]
    new = TrainState(
      step=state.step + 1,
      params=keep_if(ok, params, state.params),
      biases=keep_if(ok, balanced(recipe, state.biases, out["load"]), state.biases),
      tables=tuple(table for table, _ in updated),
      optimizer=keep_if(ok, optimizer, state.optimizer),
      row_optimizers=tuple(row_state for _, row_state in updated),
      bad_in_row=jnp.where(ok, 0, state.bad_in_row + 1),
      bad_total=state.bad_total + jnp.where(ok, 0, 1),
    )
    return new, metrics(recipe, new, out, norm, ids)

  return jax.jit(step, donate_argnums=0)


def zip_rows(batch: Batch, tables: tuple) -> list[tuple[jax.Array, jax.Array]]:
  """(row_ids_BTJ, table_RC) of each Engram layer."""
  return [(batch["row_ids"][i], table) for i, table in enumerate(tables)]


def loss_and_grads(
  recipe: Recipe, state: TrainState, rows: tuple, inverses: tuple, batch: Batch
) -> tuple[Any, dict]:
  """((d_params, d_rows), out): the mean loss per target token, summed over micro-batches."""
  inputs = {k: batch[k] for k in ("tokens", "targets", "mask", "segments", "positions")}
  inputs["inverses"] = inverses
  tokens = jnp.maximum(batch["mask"].sum(), 1).astype(jnp.float32)
  grad = jax.value_and_grad(_loss, argnums=(0, 1), has_aux=True)
  run = lambda micro: grad(state.params, rows, state.biases, micro, tokens, recipe)
  parts = recipe.config.train.accumulate
  if parts == 1:
    (loss, out), grads = run(inputs)
  else:
    split = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), inputs)
    first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, _row(split)))
    total, _ = jax.lax.scan(
      lambda sum_, m: (jax.tree.map(jnp.add, sum_, run(m)), None), first, split
    )
    (loss, out), grads = total
    out = out | {k: jax.tree.map(lambda x: x / parts, out[k]) for k in ("gate", "load")}
  return grads, out | {"loss": loss, "tokens": tokens}


def _row(split: Any) -> Any:
  return jax.tree.map(lambda x: x[0], split)


def _loss(params, rows, biases, batch, tokens, recipe: Recipe) -> tuple[jax.Array, dict]:
  model = recipe.model(params, biases)
  rows_BTM = tuple(expand(r, inv) for r, inv in zip(rows, batch["inverses"], strict=True))
  hidden_BTD, probes = model(
    batch["tokens"], rows_BTM, segments_BT=batch["segments"], positions_BT=batch["positions"]
  )
  train = recipe.config.train
  loss, aux = chunked_cross_entropy(
    hidden_BTD,
    model.head_DV,
    batch["targets"],
    batch["mask"],
    chunk=train.loss_chunk,
    z_loss=train.z_loss,
  )
  gate = tuple(g.mean() for g in probes["gate"])
  return loss / tokens, {"nll": aux["nll_sum"] / tokens, "gate": gate, "load": probes["load"]}


def balanced(recipe: Recipe, biases: Any, loads: tuple[jax.Array, ...]) -> Any:
  """The routers' biases after one loss-free balancing move; loads come in the order of layers."""
  leaves, tree = jax.tree.flatten(biases)
  move = recipe.config.model.moe.bias_step
  return jax.tree.unflatten(
    tree, [updated_bias(b, load, move) for b, load in zip(leaves, loads, strict=True)]
  )


def metrics(recipe: Recipe, state: TrainState, out: dict, norm: jax.Array, ids: list) -> dict:
  """Scalars of the step just taken. Balance is the busiest expert's load over the mean load."""
  values = {
    "loss": out["nll"],
    "grad_norm": norm,
    "learning_rate": recipe.learning_rate(state.step - 1),
    "tokens": out["tokens"],
    "nonfinite_in_row": state.bad_in_row,
    "nonfinite_total": state.bad_total,
  }
  for layer, gate, unique in zip(recipe.config.model.engram.layers, out["gate"], ids, strict=True):
    values[f"gate_mean/layer_{layer}"] = gate
    values[f"unique_rows/layer_{layer}"] = unique.count / unique.inverse.size
  if out["load"]:
    values["expert_balance"] = jnp.stack([x.max() * x.shape[0] for x in out["load"]]).mean()
  return values
