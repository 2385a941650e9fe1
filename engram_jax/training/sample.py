"""Continuations of a prompt by running the whole window again for each token.

The plain form: no cache, so what it says is what a full forward pass says. Ids are hashed on the
host and rows looked up beside the model, like everywhere else.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from jax.sharding import Mesh

from engram_jax.config import ModelConfig
from engram_jax.core.mesh import batch_shards, replicated
from engram_jax.errors import ConfigError
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hashing import HashLayout, hash_ids_numpy
from engram_jax.memory.table import lookup


class Vocabulary(Protocol):
  """What stands between text and rows; a run's prepared data has it, and so can anything else."""

  tokenizer: tokenizers.Tokenizer
  compressor: TokenCompressor
  layout: HashLayout | None
  eos_id: int


def row_ids(
  layout: HashLayout | None, compressor: TokenCompressor, tokens_BT: np.ndarray
) -> np.ndarray:
  """Row ids int32 [L, B, T, J] of raw token ids, one leading entry per Engram layer."""
  if layout is None:
    return np.zeros((0, *tokens_BT.shape, 0), np.int32)
  canonical_BT = compressor(tokens_BT)
  return np.stack(
    [
      hash_ids_numpy(layout, layer, canonical_BT) + np.asarray(layout.offsets[layer], np.int32)
      for layer in layout.layers
    ]
  )


def make_next_logits(
  graphdef: Any, cfg: ModelConfig, mesh: Mesh | None = None
) -> Callable[..., jax.Array]:
  """`logits_BV = f(params, biases, tables, tokens_BT, row_ids, last_B)`, after `last_B`.

  mesh: where parameters and tables lie; a batch that its axes do not divide is filled up.
  """
  shards = 1 if mesh is None else batch_shards(mesh)

  def run(params, biases, tables, tokens_BT, row_ids_LBTJ, last_B):
    model = nnx.merge(graphdef, nnx.State(params), nnx.State(biases))
    B = tokens_BT.shape[0]
    fill = lambda x, axis: jnp.pad(x, [(0, -B % shards * (i == axis)) for i in range(x.ndim)])
    tokens_BT, row_ids_LBTJ, last_B = fill(tokens_BT, 0), fill(row_ids_LBTJ, 1), fill(last_B, 0)
    shape = (*tokens_BT.shape, cfg.engram.memory_width)
    rows = tuple(lookup(t, row_ids_LBTJ[i], mesh=mesh).reshape(shape) for i, t in enumerate(tables))
    hidden_BTD, _ = model(tokens_BT, rows, mesh=mesh)
    last_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    return model.logits(last_B1D)[:B, 0].astype(jnp.float32)

  return jax.jit(run, out_shardings=replicated(mesh) if mesh is not None else None)


def complete(
  next_logits: Callable[..., jax.Array],
  state: Any,
  data: "Vocabulary",
  prompts: Sequence[str],
  max_new: int,
  *,
  temperature: float = 0.0,
  seed: int = 0,
) -> list[str]:
  """The text that follows each prompt; `generate` between encoding and decoding."""
  # As text was tokenised for training: with nothing put around it.
  batch = data.tokenizer.encode_batch(list(prompts), add_special_tokens=False)
  new = generate(
    next_logits,
    state,
    [encoding.ids for encoding in batch],
    layout=data.layout,
    compressor=data.compressor,
    max_new=max_new,
    temperature=temperature,
    seed=seed,
    stop_id=data.eos_id,
  )
  return data.tokenizer.decode_batch(new)


def generate(
  next_logits: Callable[..., jax.Array],
  state: Any,
  prompts: Sequence[Sequence[int]],
  *,
  layout: HashLayout | None,
  compressor: TokenCompressor,
  max_new: int,
  temperature: float = 0.0,
  seed: int = 0,
  stop_id: int | None = None,
) -> list[list[int]]:
  """New token ids for each prompt (token ids); temperature 0 is greedy.

  A prompt ends at `stop_id` (which is not returned) or after `max_new` tokens. Raises ConfigError
  for an empty prompt, an id outside the vocabulary or a negative temperature.
  """
  if any(len(p) == 0 for p in prompts):
    raise ConfigError("prompt: an empty prompt has nothing to continue; give at least one token")
  ids = len(compressor.table)
  for i in (i for prompt in prompts for i in prompt if not 0 <= i < ids):
    raise ConfigError(f"prompt: token id {i} is outside the vocabulary: 0..{ids - 1}")
  if temperature < 0:
    raise ConfigError(f"temperature={temperature} must be 0 (greedy) or above")
  lengths = np.array([len(p) for p in prompts])
  total = -(-(lengths.max() + max_new) // 32) * 32  # few shapes, few compilations
  tokens_BT = np.zeros((len(prompts), total), np.int32)
  for row, prompt in zip(tokens_BT, prompts, strict=True):
    row[: len(prompt)] = prompt
  done = np.zeros(len(prompts), bool)
  ends = lengths.copy()
  key = jax.random.key(seed)
  for i in range(max_new):
    ids = row_ids(layout, compressor, tokens_BT)
    last_B = jnp.asarray(ends - 1)
    logits_BV = next_logits(state.params, state.biases, state.tables, tokens_BT, ids, last_B)
    logits_BV = logits_BV[:, : len(compressor.table)]  # the embedding may have ids to spare
    chosen = np.asarray(_choose(logits_BV, temperature, jax.random.fold_in(key, i)))
    done |= chosen == stop_id
    live = np.flatnonzero(~done)
    if not live.size:
      break
    tokens_BT[live, ends[live]] = chosen[live]
    ends[live] += 1
  return [row[n:end].tolist() for row, n, end in zip(tokens_BT, lengths, ends, strict=True)]


def _choose(logits_BV: jax.Array, temperature: float, key: jax.Array) -> jax.Array:
  if temperature == 0:
    return logits_BV.argmax(-1)
  return jax.random.categorical(key, logits_BV / temperature)
