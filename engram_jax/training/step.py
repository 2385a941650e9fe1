"""Clipping, and what a loss or gradient that is not a number must not touch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from engram_jax.core.mesh import platform
from engram_jax.model.router import updated_bias
from engram_jax.training.loss import cross_entropy_on
from engram_jax.training.state import Recipe, TrainState
from engram_jax.training.touched import Fetched, Summed, expand_rows


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


Batch = dict[str, jax.Array]

# Left to itself the TPU's compiler makes a loop of each product whose result is divided over `fsdp`
# (a weight's gradient), a small product and a permute at a time, instead of one collective: most
# of the program, and of the time to compile it. Common in training on TPUs to switch off.
#
# And with micro-batches it fails on this pass, or miscompiles the embedding's gradient with it
# (https://github.com/openxla/xla/issues/49143).
TPU_OPTIONS = {
  "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
  "xla_disable_hlo_passes": "while-loop-all-reduce-code-motion",
}


def make_train_step(recipe: Recipe) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """`step(state, batch) -> (state, metrics)`, jitted; the state's buffers are donated.

  batch: the pipeline's arrays, each [B, T] int32 or bool, and row_ids int32 [L, B, T, J]; on a mesh
  divided by batch. A loss or gradient that is not finite leaves everything but the counters as it
  was.
  """
  on_tpu = platform(recipe.mesh) == "tpu"
  options = {"compiler_options": TPU_OPTIONS, "out_shardings": (recipe.formats, None)}
  return jax.jit(train_step(recipe), donate_argnums=0, **(options if on_tpu else {}))


def train_step(recipe: Recipe) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """What `make_train_step` compiles."""
  limit, rows = recipe.config.train.optimizer.clip_norm, recipe.rows

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
    fetched, tables, row_states = fetch_rows(recipe, state, batch)
    (grads, d_rows), out = loss_and_grads(recipe, state, fetched, batch)
    summed = collect_rows(recipe, tables, fetched, d_rows)
    norm = global_norm(grads, summed.norm_sq)
    scale = clip_scale(norm, limit)
    ok = jnp.isfinite(out["loss"]) & jnp.isfinite(norm)

    grads = jax.tree.map(lambda g: (scale * g).astype(g.dtype), grads)
    updates, optimizer = recipe.optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    if tables:
      tables, row_states = rows.update(fetched, d_rows, summed, tables, row_states, scale, ok)
    new = TrainState(
      step=state.step + 1,
      params=keep_if(ok, params, state.params),
      biases=keep_if(ok, balanced(recipe, state.biases, out["load"]), state.biases),
      tables=tables,
      optimizer=keep_if(ok, optimizer, state.optimizer),
      row_optimizers=row_states,
      bad_in_row=jnp.where(ok, 0, state.bad_in_row + 1),
      bad_total=state.bad_total + jnp.where(ok, 0, 1),
    )
    return recipe.placed(new), metrics(recipe, new, out, norm, summed, batch)

  return step


def fetch_rows(recipe: Recipe, state: TrainState, batch: Batch) -> tuple[Fetched, tuple, tuple]:
  """The rows of a batch, and the tables and their states once these rows are up to date."""
  if not state.tables:
    return Fetched((), (), ()), (), ()
  return recipe.rows.fetch(state.tables, state.row_optimizers, batch["row_ids"])


def collect_rows(recipe: Recipe, tables: tuple, fetched: Fetched, d_rows: tuple) -> Summed:
  """The rows' gradients where the rows lie."""
  if not tables:
    return Summed((), (), jnp.float32(0), (), jnp.int32(0))
  return recipe.rows.collect(tables, fetched, d_rows)


def loss_and_grads(
  recipe: Recipe, state: TrainState, fetched: Fetched, batch: Batch
) -> tuple[Any, dict]:
  """((d_params, d_rows), out): the mean loss per target token, summed over micro-batches."""
  inputs = {k: batch[k] for k in ("tokens", "targets", "mask", "segments", "positions")}
  inputs["inverses"] = fetched.inverses
  tokens = jnp.maximum(batch["mask"].sum(), 1).astype(jnp.float32)
  grad = jax.value_and_grad(_loss, argnums=(0, 1), has_aux=True)
  run = lambda micro: grad(state.params, fetched.rows, state.biases, micro, tokens, recipe)
  parts = recipe.config.train.accumulate
  if parts == 1:
    (loss, out), grads = run(inputs)
  else:
    split = jax.tree.map(lambda x: _micro_batches(x, parts, recipe.batch_shards), inputs)
    first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, _row(split)))
    total, _ = jax.lax.scan(
      lambda sum_, m: (jax.tree.map(jnp.add, sum_, run(m)), None), first, split
    )
    (loss, out), grads = total
    out = out | {k: jax.tree.map(lambda x: x / parts, out[k]) for k in ("gate", "load")}
  return grads, out | {"loss": loss, "tokens": tokens}


def _micro_batches(x: jax.Array, parts: int, shards: int) -> jax.Array:
  """[B, ...] -> [parts, B / parts, ...]; every device cuts up what it has, so nothing travels."""
  cut = x.reshape(shards, parts, x.shape[0] // (shards * parts), *x.shape[1:])
  return cut.swapaxes(0, 1).reshape(parts, x.shape[0] // parts, *x.shape[1:])


def _row(split: Any) -> Any:
  return jax.tree.map(lambda x: x[0], split)


def _loss(params, rows, biases, batch, tokens, recipe: Recipe) -> tuple[jax.Array, dict]:
  model = recipe.model(params, biases)
  rows_BTM = tuple(
    expand_rows(recipe.spread, r, inverse)
    for r, inverse in zip(rows, batch["inverses"], strict=True)
  )
  hidden_BTD, probes = model(
    batch["tokens"],
    rows_BTM,
    segments_BT=batch["segments"],
    positions_BT=batch["positions"],
    mesh=recipe.mesh,
  )
  train = recipe.config.train
  loss, aux = cross_entropy_on(
    recipe.spread,
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


def metrics(
  recipe: Recipe, state: TrainState, out: dict, norm: jax.Array, summed: Summed, batch: Batch
) -> dict:
  """Scalars of the step just taken. Balance is the busiest expert's load over the mean load."""
  values = {
    "loss": out["nll"],
    "grad_norm": norm,
    "learning_rate": recipe.learning_rate(state.step - 1),
    "tokens": out["tokens"],
    "nonfinite_in_row": state.bad_in_row,
    "nonfinite_total": state.bad_total,
  }
  for layer, gate, count in zip(
    recipe.config.model.engram.layers, out["gate"], summed.count, strict=True
  ):
    values[f"gate_mean/layer_{layer}"] = gate
    values[f"unique_rows/layer_{layer}"] = count / batch["row_ids"][0].size
  if recipe.spread is not None and summed.count:
    values["exchange_rounds"] = summed.rounds
  if "stop" in batch:  # some process was told to stop: all learn it from the same step
    values["stop"] = batch["stop"].max()
  if out["load"]:
    values["expert_balance"] = jnp.stack([x.max() * x.shape[0] for x in out["load"]]).mean()
  return values
