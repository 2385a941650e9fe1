"""A memory in somebody else's transformer, trained in somebody else's loop.

    python docs/own_loop.py                      on all devices of this process

The transformer and its loop are plain Flax NNX and Optax; lines that the memory adds end in `# *`.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from engram_jax.config import EngramConfig  # *
from engram_jax.core.mesh import batch_sharding, make_mesh, replicated  # *
from engram_jax.memory.compress import TokenCompressor  # *
from engram_jax.memory.engram import Engram  # *
from engram_jax.memory.hashing import HashLayout, row_ids  # *
from engram_jax.tables import Tables, adam  # *

V, D, HEADS, LAYERS, T, B = 256, 64, 4, 4, 64, 16
MEMORY = EngramConfig(layers=(1, 3), heads=4, row_width=16, rows_per_head=5003)  # *


class Block(nnx.Module):
  """Pre-norm attention and feed-forward, with a memory at its entry in some blocks."""

  def __init__(self, layer: int, *, rngs: nnx.Rngs):
    self.layer = layer
    self.memory = Engram(MEMORY, D, 1, rngs=rngs) if layer in MEMORY.layers else None  # *
    self.norm_attention, self.norm_mlp = nnx.LayerNorm(D, rngs=rngs), nnx.LayerNorm(D, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
    self.up, self.down = nnx.Linear(D, 4 * D, rngs=rngs), nnx.Linear(4 * D, D, rngs=rngs)

  def __call__(self, x_BTD, rows, mask):
    if self.memory is not None:  # *
      delta_BTGD, _ = self.memory(x_BTD[:, :, None], rows[self.layer])  # *
      x_BTD = x_BTD + delta_BTGD[:, :, 0]  # *
    x_BTD = x_BTD + self.attention(self.norm_attention(x_BTD), mask=mask)
    return x_BTD + self.down(jax.nn.gelu(self.up(self.norm_mlp(x_BTD))))


class Transformer(nnx.Module):
  """A decoder over bytes; rows: {layer: [B, T, J, C]} of the memories."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.embedding = nnx.Embed(V, D, rngs=rngs)
    self.positions = nnx.Embed(T, D, rngs=rngs)
    self.blocks = nnx.List([Block(layer, rngs=rngs) for layer in range(LAYERS)])
    self.norm = nnx.LayerNorm(D, rngs=rngs)

  def __call__(self, tokens_BT, rows):
    x_BTD = self.embedding(tokens_BT) + self.positions(jnp.arange(tokens_BT.shape[1]))
    mask = nnx.make_causal_mask(tokens_BT)
    for block in self.blocks:
      x_BTD = block(x_BTD, rows, mask)
    return self.embedding.attend(self.norm(x_BTD))


def make_training(mesh, table_optimizer):
  """(state, step): `step(state, tokens) -> (state, loss)` with tokens int32 [B, T + 1]."""
  graphdef, params = nnx.split(Transformer(rngs=nnx.Rngs(0)), nnx.Param)
  optimizer = optax.adamw(1e-3)
  layout = HashLayout.of(MEMORY, TokenCompressor.identity(V))  # *
  tables = Tables(MEMORY, layout, optimizer=table_optimizer, mesh=mesh)  # *
  params, moments = jax.device_put((params, optimizer.init(params)), replicated(mesh))
  state = (params, moments, tables.init(jax.random.key(1)))  # *

  def loss_fn(params, rows, touched, tokens):
    model = nnx.merge(graphdef, params)
    logits_BTV = model(tokens[:, :-1], touched.expand(rows))  # *
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens[:, 1:]).mean()

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, tokens):
    params, moments, memory = state
    ids = {layer: row_ids(layout, layer, tokens[:, :-1]) for layer in MEMORY.layers}  # *
    touched = tables.fetch(memory, ids)  # *
    grad = jax.value_and_grad(loss_fn, argnums=(0, 1))
    loss, (d_params, d_rows) = grad(params, touched.rows, touched, tokens)  # *
    updates, moments = optimizer.update(d_params, moments, params)
    params = optax.apply_updates(params, updates)
    return (params, moments, tables.update(memory, touched, d_rows)), loss  # *

  return state, step


def batches(mesh):
  """Random windows of this repository's README, as bytes; int32 [B, T + 1], divided by batch."""
  text = np.frombuffer((pathlib.Path(__file__).parents[1] / "README.md").read_bytes(), np.uint8)
  random = np.random.default_rng(0)
  while True:
    starts = random.integers(0, len(text) - T - 1, (B, 1))
    tokens = text[starts + np.arange(T + 1)].astype(np.int32)
    yield jax.device_put(tokens, batch_sharding(mesh))


def main(steps: int = 200) -> None:
  mesh = make_mesh()
  state, step = make_training(mesh, adam(1e-2))
  for i, tokens in zip(range(steps), batches(mesh), strict=False):
    state, loss = step(state, tokens)
    if i % 20 == 0 or i == steps - 1:
      print(f"step {i}: loss {loss:.3f}")


if __name__ == "__main__":
  main()
