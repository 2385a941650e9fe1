"""Loss over the validation documents, together and by source, with the memory on or off.

Local letter: L, memories.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.core.mesh import replicated
from engram_jax.memory.compress import as_integers, check_ids
from engram_jax.training.loss import cross_entropy_on
from engram_jax.training.state import TrainSetup, TrainState

LN2 = math.log(2)


def make_eval_step(setup: TrainSetup) -> Callable[..., jax.Array]:
  """Returns jitted `step(params, biases, rows, batch) -> nll_BT`, nats per target, 0 where masked.

  rows: [B, T, J, C] of each memory, in the order of layers.
  """
  cfg = setup.config

  def eval_step(params: Any, biases: Any, rows: tuple, batch: dict) -> jax.Array:
    model = setup.model(params, biases)
    hidden_BTD, _ = model(
      batch["tokens"],
      rows,
      segments_BT=batch["segments"],
      positions_BT=batch["positions"],
      mesh=setup.mesh,
    )
    _, aux = cross_entropy_on(
      setup.multi_device_mesh,
      hidden_BTD,
      model.head_DV,
      batch["targets"],
      batch["mask"],
      chunk=cfg.train.loss_chunk,
    )
    return jnp.where(batch["mask"], aux["nll_BT"], 0.0)

  mesh = setup.multi_device_mesh
  return jax.jit(eval_step, out_shardings=None if mesh is None else replicated(mesh))


def evaluate(
  step: Callable[..., jax.Array],
  setup: TrainSetup,
  state: TrainState,
  batches: Iterable[dict[str, np.ndarray]],
  token_bytes: np.ndarray,
  sources: Sequence[str],
  *,
  memory: bool = True,
  exact_bytes: bool = True,
) -> dict[str, Any]:
  """Computes mean loss (nats per token), perplexity, bits per byte and counts, also by source.

  step: of `make_eval_step`. memory: False replaces the tables' rows by zeros.

  Bits per byte divides by the UTF-8 bytes of the targets, so it compares tokenizers. It and the
  bytes are None without `exact_bytes`: where `token_bytes` does not add up to the text's.

  Raises ValueError, before the step is called, for a batch whose arrays are not [B, T] of their
  dtypes, and for a token, target, source or row id outside its range, naming it.
  """
  nll, tokens, size = (np.zeros(len(sources), np.float64) for _ in range(3))
  for batch in batches:
    batch = dict(batch)
    _check_batch(batch, setup, len(token_bytes), len(sources))
    rows = _rows(setup, state, batch.pop("row_ids", None), memory)
    loss_BT = np.asarray(step(state.params, state.biases, rows, batch), np.float64)
    mask = batch["mask"]
    source = batch["source"][mask]
    nll += np.bincount(source, loss_BT[mask], len(sources))
    tokens += np.bincount(source, minlength=len(sources))
    size += np.bincount(source, token_bytes[batch["targets"][mask]], len(sources))
  known = lambda size: size if exact_bytes else None
  result: dict[str, Any] = _summary(nll.sum(), tokens.sum(), known(size.sum()))
  seen = [i for i in range(len(sources)) if tokens[i]]
  result["by_source"] = {sources[i]: _summary(nll[i], tokens[i], known(size[i])) for i in seen}
  return result


def _check_batch(batch: dict[str, Any], setup: TrainSetup, targets: int, sources: int) -> None:
  """ValueError unless a batch's arrays fit together and their ids are ids: the step clamps others,
  and NumPy counts negative ones from the end."""
  tokens_BT = check_ids(batch["tokens"], setup.config.model.vocab_size, "token id", "BT")
  shape, mask = tokens_BT.shape, np.asarray(batch["mask"])
  if mask.dtype != bool or mask.shape != shape:
    raise ValueError(f"mask is bool of shape {shape}, not {mask.dtype} of shape {mask.shape}")
  for name, size in (("target", targets), ("source", sources), ("segment", 0), ("position", 0)):
    key = name if name == "source" else f"{name}s"
    ids = as_integers(batch[key], size or None, f"{name} id")
    if ids.shape != shape:
      raise ValueError(f"{key} are of shape {shape}, as the tokens, not {ids.shape}")
    if size:
      check_ids(ids[mask], size, f"{name} id")  # what is masked counts for nothing
  layers, layout = setup.tables.layers, setup.tables.layout
  if layout is not None:
    ids = as_integers(batch.get("row_ids"), max(layout.rows.values()), "row id")
    expected = (len(layers), *shape, layout.hash_heads)
    if ids.shape != expected:
      raise ValueError(f"row_ids are [L, B, T, J]: of shape {expected}, not {ids.shape}")


def _rows(
  setup: TrainSetup, state: TrainState, row_ids_LBTJ: np.ndarray | None, memory: bool
) -> tuple[jax.Array, ...]:
  """Rows [B, T, J, C] of each memory."""
  tables = setup.tables
  row_ids = dict(zip(tables.layers, () if row_ids_LBTJ is None else row_ids_LBTJ, strict=True))
  if memory:
    return tuple(tables.lookup(state.tables, row_ids).values())
  width, dtype = tables.cfg.row_width, jnp.dtype(tables.cfg.table_dtype)
  return tuple(jnp.zeros((*ids.shape, width), dtype) for ids in row_ids.values())


def _summary(nll: float, tokens: float, size: float | None) -> dict[str, float | int | None]:
  loss = nll / max(tokens, 1)
  return {
    "loss": loss,
    "perplexity": math.exp(min(loss, 700.0)),
    "bits_per_byte": None if size is None else nll / LN2 / max(size, 1),
    "tokens": int(tokens),
    "bytes": None if size is None else int(size),
  }
