"""One training step: gradients with respect to the parameters and the touched rows, then updates.

Rows are gathered once per distinct id, so a table's gradient is as large as the batch's ids and the
step's cost does not depend on the table's size. On a mesh this is one program for all devices.

Local letter: L, memories.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from engram_jax.core.mesh import platform
from engram_jax.model.router import updated_bias
from engram_jax.tables.device import RowGrads
from engram_jax.tables.state import Touched
from engram_jax.training.loss import cross_entropy_on
from engram_jax.training.state import TrainSetup, TrainState

NONFINITE_LEAF = "nonfinite_leaf"  # among the metrics: what `first_nonfinite` found


def squared_norms(grads: Any) -> list[jax.Array]:
  """The float32 squared L2 norm of each leaf, finite only where all of the leaf is."""
  return [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)]


def global_norm(squares: list[jax.Array], more_sq: jax.typing.ArrayLike = 0.0) -> jax.Array:
  """The L2 norm of all leaves; `more_sq`, of the rows' gradients, is added under the root.

  A row gradient summed over its uses has the norm of the dense table gradient it stands for. The
  norm is finite only where every gradient is, so it checks them too.
  """
  return jnp.sqrt(sum(squares, jnp.float32(0)) + more_sq)


def first_nonfinite(squares: list[jax.Array]) -> jax.Array:
  """The index, int32, of the first of these squared norms that is not finite; -1 if all are."""
  bad = ~jnp.isfinite(jnp.stack(squares))
  return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)


def clip_scale(norm: jax.Array, limit: float) -> jax.Array:
  """The factor that brings gradients of this norm to at most `limit`; a limit of 0 is none."""
  if limit == 0:
    return jnp.float32(1)
  return jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))


def where_tree(ok: jax.Array, new: Any, old: Any) -> Any:
  """Selects `new` where the bool scalar `ok` holds, else `old`, leaf by leaf and bit for bit."""
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


def make_train_step(setup: TrainSetup) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """Returns `step(state, batch) -> (state, metrics)`, jitted; the state is donated.

  batch: tokens, targets, segments, positions and source, int32 [B, T]; mask, bool [B, T], True
  where the target counts; row_ids, int32 [L, B, T, J], offsets included, or the slots that
  `Tables.prefetch` has in their place; on a mesh divided by batch. A loss or gradient that is not
  finite leaves everything but the counters unchanged.
  """
  on_tpu = platform(setup.mesh) == "tpu"
  options = {"compiler_options": TPU_OPTIONS, "out_shardings": (setup.formats, None)}
  return setup.tables.jit(train_step(setup), **(options if on_tpu else {}))


def train_step(setup: TrainSetup) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """The function that `make_train_step` compiles."""
  limit, tables = setup.config.train.optimizer.clip_norm, setup.tables

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
    touched = tables.fetch(state.tables, tables.batch_ids(batch))
    (grads, d_rows), out = loss_and_grads(setup, state, touched, batch)
    row_grads = tables.reduce_grads(touched, d_rows)
    squares = squared_norms(grads)
    norm = global_norm(squares, row_grads.norm_sq)
    leaf = first_nonfinite([*squares, row_grads.norm_sq])
    scale = clip_scale(norm, limit)
    ok = jnp.isfinite(out["loss"]) & jnp.isfinite(norm)

    grads = jax.tree.map(lambda g: (scale * g).astype(g.dtype), grads)
    with jax.named_scope("backbone_update"):
      updates, optimizer = setup.optimizer.update(grads, state.optimizer, state.params)
      params = optax.apply_updates(state.params, updates)
    biases = update_router_biases(setup, state.biases, out["load"])
    new = TrainState(
      step=state.step + 1,
      params=where_tree(ok, params, state.params),
      biases=where_tree(ok, biases, state.biases),
      tables=tables.update(state.tables, touched, row_grads, grad_scale=scale, ok=ok),
      optimizer=where_tree(ok, optimizer, state.optimizer),
      nonfinite_streak=jnp.where(ok, 0, state.nonfinite_streak + 1),
      nonfinite_total=state.nonfinite_total + jnp.where(ok, 0, 1),
    )
    return setup.constrain(new), metrics(setup, new, out, norm, leaf, touched, row_grads, batch)

  return step


def loss_and_grads(
  setup: TrainSetup, state: TrainState, touched: Touched, batch: Batch
) -> tuple[Any, dict]:
  """Returns ((d_params, d_rows), out) of the mean loss per target token, over all micro-batches."""
  inputs: dict[str, Any] = {
    k: batch[k] for k in ("tokens", "targets", "mask", "segments", "positions")
  }
  inputs |= {"inverses": touched.inverses}
  tokens = jnp.maximum(batch["mask"].sum(), 1).astype(jnp.float32)
  grad = jax.value_and_grad(_loss, argnums=(0, 1), has_aux=True)
  run = lambda micro: grad(state.params, touched.rows, state.biases, micro, tokens, touched, setup)
  parts = setup.config.train.accumulate
  if parts == 1:
    (loss, out), grads = run(inputs)
  else:
    split = jax.tree.map(lambda x: _micro_batches(x, parts, setup.batch_shards), inputs)
    first = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(run, jax.tree.map(lambda x: x[0], split)),
    )
    total, _ = jax.lax.scan(
      lambda sum_, m: (jax.tree.map(jnp.add, sum_, run(m)), None), first, split
    )
    (loss, out), grads = total
    out = out | {k: jax.tree.map(lambda x: x / parts, out[k]) for k in ("gate", "load")}
  return grads, out | {"loss": loss, "tokens": tokens}


def _micro_batches(x: jax.Array, parts: int, shards: int) -> jax.Array:
  """Splits [B, ...] to [parts, B / parts, ...], each device its own part without communication."""
  cut = x.reshape(shards, parts, x.shape[0] // (shards * parts), *x.shape[1:])
  return cut.swapaxes(0, 1).reshape(parts, x.shape[0] // parts, *x.shape[1:])


def _loss(
  params, rows, biases, batch, tokens, touched: Touched, setup: TrainSetup
) -> tuple[jax.Array, dict]:
  model = setup.model(params, biases)
  rows_BTJC = dataclasses.replace(touched, inverses=batch["inverses"]).expand(rows)
  hidden_BTD, probes = model(
    batch["tokens"],
    tuple(rows_BTJC.values()),
    segments_BT=batch["segments"],
    positions_BT=batch["positions"],
    mesh=setup.mesh,
  )
  train = setup.config.train
  with jax.named_scope("cross_entropy"):
    loss, aux = cross_entropy_on(
      setup.multi_device_mesh,
      hidden_BTD,
      model.head_DV,
      batch["targets"],
      batch["mask"],
      chunk=train.loss_chunk,
      z_loss=train.z_loss,
    )
  gate = tuple(g.mean() for g in probes["gate"])
  return loss / tokens, {"nll": aux["nll_sum"] / tokens, "gate": gate, "load": probes["load"]}


def update_router_biases(setup: TrainSetup, biases: Any, loads: tuple[jax.Array, ...]) -> Any:
  """Moves the routers' biases by one step of loss-free balancing; loads are in order of layers."""
  leaves, tree = jax.tree.flatten(biases)
  move = setup.config.model.moe.bias_step
  return jax.tree.unflatten(
    tree, [updated_bias(b, load, move) for b, load in zip(leaves, loads, strict=True)]
  )


def metrics(
  setup: TrainSetup,
  state: TrainState,
  out: dict,
  norm: jax.Array,
  leaf: jax.Array,
  touched: Touched,
  row_grads: RowGrads,
  batch: Batch,
) -> dict:
  """Scalars of the step just taken; balance is the busiest expert's load over the mean load."""
  values = {
    "loss": out["nll"],
    "grad_norm": norm,
    "learning_rate": setup.learning_rate(state.step - 1),
    "tokens": out["tokens"],
    "nonfinite_in_row": state.nonfinite_streak,
    "nonfinite_total": state.nonfinite_total,
    NONFINITE_LEAF: leaf,
  }
  for layer, gate, count in zip(setup.tables.layers, out["gate"], row_grads.count, strict=True):
    values[f"gate_mean/layer_{layer}"] = gate
    values[f"unique_rows/layer_{layer}"] = count / touched.inverses[layer].size
  if touched.mesh is not None:
    values["exchange_rounds"] = row_grads.rounds
  if "stop" in batch:  # some process got a signal: all see it at the same step
    values["stop"] = batch["stop"].max()
  if out["load"]:
    values["expert_balance"] = jnp.stack([x.max() * x.shape[0] for x in out["load"]]).mean()
  return values
