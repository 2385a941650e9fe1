"""A small model with every part of the architecture, for tests of inference."""

import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engram_jax.config import ModelConfig
from engram_jax.inference.decoder import Decoder, Weights
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.hashing import hash_ids_numpy
from engram_jax.memory.table import init_table, lookup_reference
from engram_jax.model.lm import LM
from engram_jax.model.router import RouterBias

V = 60
MODEL: dict[str, Any] = {
  "vocab_size": V,
  "width": 16,
  "layers": 3,
  "init_std": 0.2,
  "attention": {"heads": 2, "latent": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8},
  "moe": {
    "routed_experts": 4,
    "top_k": 2,
    "expert_width": 16,
    "dense_width": 32,
    "dispatch": "dense",
  },
  "residual": {"branches": 2, "sinkhorn_iterations": 3},
  "engram": {"layers": [1, 2], "heads": 2, "row_width": 4, "rows_per_head": 101},
}


@dataclasses.dataclass(frozen=True, eq=False)
class SmallModel:
  """A model's parameters and its tables, one float32 [R_padded, C] a memory."""

  weights: Weights
  tables: tuple[jax.Array, ...]

  def logits(self, tokens: list[int]) -> np.ndarray:
    """float32 [T, V] of one full forward pass over a sequence, which every decoder must match.

    Tokens that no earlier position sees fill it up to a multiple of 32, so that sequences of most
    lengths share a program.
    """
    w = self.weights
    tokens_BT = np.array([[*tokens, *[0] * (-len(tokens) % 32)]])
    rows = ()
    if w.layout:
      canonical_BT = w.compressor(tokens_BT)
      ids = [
        hash_ids_numpy(w.layout, layer, canonical_BT)
        + np.asarray(w.layout.offsets[layer], np.int32)
        for layer in w.layout.layers
      ]
      rows = tuple(lookup_reference(t, i) for t, i in zip(self.tables, ids, strict=True))
    return np.asarray(_forward(w.graphdef, w.params, w.biases, tokens_BT, rows))[0, : len(tokens)]


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: Any, params: Any, biases: Any, tokens_BT: Any, rows: Any) -> jax.Array:
  model = nnx.merge(graphdef, nnx.State(params), nnx.State(biases))
  return model.logits(model(tokens_BT, rows)[0])


@functools.cache
def make_small_model(
  *, memory: bool = True, merged_ids: bool = True, dispatch: str = "dense", **engram: Any
) -> SmallModel:
  """Makes a model of random parameters, none of them zero.

  merged_ids: two raw ids share each canonical one. engram: fields of its config that differ from
  `MODEL`.
  """
  engram = MODEL["engram"] | engram if memory else {"layers": []}
  moe = MODEL["moe"] | {"dispatch": dispatch}
  cfg = ModelConfig.model_validate(MODEL | {"engram": engram, "moe": moe})
  graphdef, params, biases = nnx.split(LM(cfg, rngs=nnx.Rngs(0)), nnx.Param, RouterBias)
  keys = iter(jax.random.split(jax.random.key(1), 1000))
  noisy = lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape)
  params, biases = (jax.tree.map(noisy, nnx.to_pure_dict(x)) for x in (params, biases))
  compressor = TokenCompressor.identity(V)
  if merged_ids:
    compressor = TokenCompressor.from_texts([chr(97 + i // 2) for i in range(V)], ["x"] * V)
  layout, tables = None, ()
  if memory:
    e = cfg.engram
    layout = HashLayout.build(
      e.dialect, e.layers, e.rows_per_head, e.max_ngram, e.heads, compressor.size, e.pad_id
    )
    tables = tuple(
      init_table(next(keys), layout.rows[i], e.row_width, std=1.0) for i in layout.layers
    )
  return SmallModel(Weights(cfg, graphdef, params, biases, layout, compressor), tables)


def random_tokens(seed: int, length: int) -> list[int]:
  """Token ids that repeat n-grams now and then."""
  return jnp.asarray(np.random.default_rng(seed).integers(3, 15, length)).tolist()


def with_nan_params(decoder: Decoder) -> Decoder:
  """A copy of the decoder with NaN parameters, as training may leave them."""
  other = copy.copy(decoder)
  params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), decoder.model.params)
  other.model = decoder.model._replace(params=params)
  return other
