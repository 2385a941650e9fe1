"""Everything a training step reads and replaces, and how it is made from a config."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from engram_jax.config import Config
from engram_jax.memory.hashing import HashLayout
from engram_jax.memory.table import init_table
from engram_jax.model.lm import LM
from engram_jax.model.moe import RouterBias
from engram_jax.training.optimizer import backbone_optimizer
from engram_jax.training.rows.choose import row_optimizer
from engram_jax.training.rows.form import TouchedRows
from engram_jax.training.schedule import learning_rate


class TrainState(NamedTuple):
  """A pytree; every leaf goes into a checkpoint.

  step: i32, the number of steps taken (also the next batch's number)
  params, biases: pure nested dicts of the LM's nnx.Param and RouterBias arrays
  tables: one [R_padded, C] array per Engram layer
  optimizer, row_optimizers: the optimizers' states
  bad_in_row, bad_total: i32, steps whose loss or gradients were not finite
  """

  step: jax.Array
  params: Any
  biases: Any
  tables: tuple[jax.Array, ...]
  optimizer: Any
  row_optimizers: tuple[Any, ...]
  bad_in_row: jax.Array
  bad_total: jax.Array


class Recipe(NamedTuple):
  """The static half of training: what `TrainState` is transformed with."""

  config: Config
  graphdef: Any
  optimizer: optax.GradientTransformation
  row_optimizer: TouchedRows
  learning_rate: Any

  def model(self, params: Any, biases: Any) -> LM:
    """The LM with these parameters; for use inside jit."""
    return nnx.merge(self.graphdef, nnx.State(params), nnx.State(biases))


def make_recipe(cfg: Config) -> Recipe:
  """The recipe of a config; makes no array."""
  model = nnx.eval_shape(lambda: LM(cfg.model, rngs=nnx.Rngs(0)))
  graphdef, params, _ = nnx.split(model, nnx.Param, RouterBias)
  optimizer = cfg.train.optimizer
  schedule = learning_rate(cfg.train.schedule, optimizer.learning_rate, cfg.train.steps)
  rows = row_optimizer(optimizer, schedule)
  backbone = backbone_optimizer(optimizer, schedule, nnx.to_pure_dict(params))
  return Recipe(cfg, graphdef, backbone, rows, schedule)


def init_state(recipe: Recipe, layout: HashLayout | None) -> TrainState:
  """The state before the first step; one jitted program, so nothing is made twice."""
  cfg = recipe.config

  def init(seed: jax.Array) -> TrainState:
    key = jax.random.key(seed)
    model = LM(cfg.model, rngs=nnx.Rngs(jax.random.fold_in(key, 0)))
    _, params, biases = nnx.split(model, nnx.Param, RouterBias)
    params, biases = nnx.to_pure_dict(params), nnx.to_pure_dict(biases)
    tables = tuple(
      init_table(
        jax.random.fold_in(key, 1 + layer),
        layout.rows[layer],
        cfg.model.engram.row_width,
        std=cfg.model.init_std,
      )
      for layer in cfg.model.engram.layers
    )
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
      step=zero,
      params=params,
      biases=biases,
      tables=tables,
      optimizer=recipe.optimizer.init(params),
      row_optimizers=tuple(recipe.row_optimizer.init(table) for table in tables),
      bad_in_row=zero,
      bad_total=zero,
    )

  return jax.jit(init)(jnp.uint32(cfg.train.seed))
