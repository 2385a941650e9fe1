"""Continuations of a prompt by a full forward pass for each token.

This is the plain form, without a cache. Ids are hashed on the host and rows are looked up beside
the model.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.core.mesh import replicated
from engram_jax.errors import ConfigError
from engram_jax.memory.token_text import continuation
from engram_jax.memory.vocabulary import Vocabulary, check_prompt, encode_texts
from engram_jax.training.state import TrainSetup, TrainState


def make_next_logits(setup: TrainSetup) -> Callable[..., jax.Array]:
  """Returns jitted `f(params, biases, rows, tokens_BT, last_B) -> logits_BV`, float32.

  Logits are those after positions `last_B`.

  rows: [B, T, J, C] of each memory, in the order of layers. A batch that the mesh's axes do not
  divide is filled up.
  """
  mesh, shards = setup.mesh, setup.batch_shards

  def run(params, biases, rows, tokens_BT, last_B):
    model = setup.model(params, biases)
    B = tokens_BT.shape[0]
    fill = lambda x: jnp.pad(x, [(0, -B % shards)] + [(0, 0)] * (x.ndim - 1))
    tokens_BT, rows, last_B = jax.tree.map(fill, (tokens_BT, rows, last_B))
    hidden_BTD, _ = model(tokens_BT, rows, mesh=mesh)
    last_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    return model.logits(last_B1D)[:B, 0].astype(jnp.float32)

  return jax.jit(run, out_shardings=replicated(mesh) if mesh is not None else None)


def complete(
  next_logits: Callable[..., jax.Array],
  setup: TrainSetup,
  state: TrainState,
  vocabulary: Vocabulary,
  prompts: Sequence[str],
  max_new: int,
  *,
  end_id: int | None = None,
  temperature: float = 0.0,
  seed: int = 0,
) -> list[str]:
  """Continues texts: encodes each prompt, calls `generate`, and decodes the new tokens behind it.

  Raises ConfigError where the tokenizer fails.
  """
  # As text was tokenised for training: with nothing put around it.
  encoded = encode_texts(vocabulary.tokenizer, prompts, "prompt")
  new = generate(
    next_logits,
    setup,
    state,
    vocabulary,
    encoded,
    max_new,
    end_id=end_id,
    temperature=temperature,
    seed=seed,
  )
  pairs = zip(encoded, new, strict=True)
  return [continuation(vocabulary.tokenizer, prompt, ids) for prompt, ids in pairs]


def generate(
  next_logits: Callable[..., jax.Array],
  setup: TrainSetup,
  state: TrainState,
  vocabulary: Vocabulary,
  prompts: Sequence[Sequence[int]],
  max_new: int,
  *,
  end_id: int | None = None,
  temperature: float = 0.0,
  seed: int = 0,
) -> list[list[int]]:
  """Generates token ids after each prompt of token ids; temperature 0 is greedy.

  A text ends at `end_id` (which is not returned) or after `max_new` tokens. Raises ConfigError
  for an empty prompt, an id outside the vocabulary or a negative temperature.
  """
  vocabulary_size = len(vocabulary.compressor.table)
  for prompt in prompts:
    check_prompt(prompt, vocabulary_size)
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
    row_ids = dict(zip(setup.tables.layers, vocabulary.row_ids(tokens_BT), strict=True))
    rows = tuple(setup.tables.lookup(state.tables, row_ids).values())
    last_B = jnp.asarray(ends - 1)
    logits_BV = next_logits(state.params, state.biases, rows, tokens_BT, last_B)
    logits_BV = logits_BV[:, :vocabulary_size]  # the embedding may have ids to spare
    chosen = np.asarray(_choose(logits_BV, temperature, jax.random.fold_in(key, i)))
    done |= chosen == end_id
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
