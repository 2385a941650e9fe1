"""Everything a training step reads and replaces, and how it is made from a config."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.config import Config
from engram_jax.core.mesh import batch_shards, platform, replicated
from engram_jax.core.rules import state_shardings
from engram_jax.memory.hashing import HashLayout
from engram_jax.memory.table import by_rows, init_table
from engram_jax.model.lm import LM, compute_dtype
from engram_jax.model.router import RouterBias
from engram_jax.model.sharding import param_shardings
from engram_jax.training.optimizer import backbone_optimizer
from engram_jax.training.rows.choose import row_optimizer
from engram_jax.training.rows.form import TouchedRows
from engram_jax.training.schedule import learning_rate
from engram_jax.training.touched import LocalRows, ShardedRows


class TrainState(NamedTuple):
  """A pytree; every leaf goes into a checkpoint.

  step: i32, the number of steps taken (also the next batch's number)
  params, biases: pure nested dicts of the LM's nnx.Param and RouterBias arrays
  tables: one [R_padded, C] array per Engram layer; none where a placement keeps them on the host
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
  rows: LocalRows | ShardedRows
  learning_rate: Any
  mesh: Mesh | None = None
  placements: Any = None  # a NamedSharding per leaf of the TrainState; None without a mesh
  formats: Any = None  # the same, on TPU with the layout of tables; see memory.table.by_rows

  @property
  def spread(self) -> Mesh | None:
    """The mesh if it has more than one device."""
    return self.mesh if self.mesh is not None and self.mesh.size > 1 else None

  @property
  def batch_shards(self) -> int:
    """Parts that the batch is divided into."""
    return 1 if self.mesh is None else batch_shards(self.mesh)

  def model(self, params: Any, biases: Any) -> LM:
    """The LM with these parameters; for use inside jit."""
    return nnx.merge(self.graphdef, nnx.State(params), nnx.State(biases))

  def placed(self, state: TrainState) -> TrainState:
    """The state held where it belongs; for use inside jit."""
    if self.placements is None:
      return state
    return jax.lax.with_sharding_constraint(state, self.placements)


def make_recipe(cfg: Config, layout: HashLayout | None = None, mesh: Mesh | None = None) -> Recipe:
  """The recipe of a config; makes no array.

  Args:
    layout: of the tables; needed on a mesh, to say where each lies.
    mesh: the devices to train on. Default: one device of this process.
  """
  model = nnx.eval_shape(lambda: LM(cfg.model, rngs=nnx.Rngs(0)))
  graphdef, params, _ = nnx.split(model, nnx.Param, RouterBias)
  optimizer = cfg.train.optimizer
  schedule = learning_rate(cfg.train.schedule, optimizer.learning_rate, cfg.train.steps)
  backbone = backbone_optimizer(optimizer, schedule, nnx.to_pure_dict(params), mesh)
  rows = _rows(cfg, row_optimizer(optimizer, schedule), mesh)
  recipe = Recipe(cfg, graphdef, backbone, rows, schedule, mesh)
  if mesh is None:
    return recipe
  # On one device too: arrays without a mesh have another type than those that a step returns, and
  # the step would be compiled once for each.
  shapes = jax.eval_shape(lambda: _initial(recipe, layout, jnp.uint32(0)))
  places = _placements(mesh, shapes)
  formats = jax.tree.map(lambda place, x: by_rows(place, x.ndim), places, shapes)
  own = places._replace(tables=formats.tables, row_optimizers=formats.row_optimizers)
  return recipe._replace(placements=places, formats=own)


def _rows(cfg: Config, optimizer: TouchedRows, mesh: Mesh | None) -> LocalRows | ShardedRows:
  if mesh is None or mesh.size == 1:
    return LocalRows(optimizer)
  # Sinkhorn balances all rows of a step against one another, so they must arrive in one round.
  whole = cfg.train.optimizer.table == "sinkhorn"
  capacity = float(mesh.size) if whole else cfg.model.engram.exchange_capacity
  dtype = compute_dtype(cfg.model.dtype, platform(mesh))
  return ShardedRows(optimizer, mesh, capacity, dtype)


def _placements(mesh: Mesh, shapes: TrainState) -> TrainState:
  """Parameters and their optimizer's state by rule, tables by rows, scalars everywhere."""
  whole, rows = replicated(mesh), NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  per_row = lambda tree: jax.tree.map(lambda x: rows if x.ndim else whole, tree)
  params = param_shardings(shapes.params, mesh)
  return TrainState(
    step=whole,
    params=params,
    biases=jax.tree.map(lambda _: whole, shapes.biases),
    tables=per_row(shapes.tables),
    optimizer=state_shardings(shapes.optimizer, shapes.params, params, mesh),
    row_optimizers=per_row(shapes.row_optimizers),
    bad_in_row=whole,
    bad_total=whole,
  )


def state_shapes(recipe: Recipe, layout: HashLayout | None) -> TrainState:
  """The state as jax.ShapeDtypeStructs, on a mesh with their shardings; makes no array."""
  shapes = jax.eval_shape(lambda: _initial(recipe, layout, jnp.uint32(0)))
  if recipe.placements is None:
    return shapes
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    recipe.formats,
  )


def init_state(recipe: Recipe, layout: HashLayout | None) -> TrainState:
  """The state before the first step, made where it lies by one jitted program.

  The same numbers on any mesh.
  """
  make = lambda seed: _initial(recipe, layout, seed)
  return jax.jit(make, out_shardings=recipe.formats)(jnp.uint32(recipe.config.train.seed))


def laid_out(recipe: Recipe, state: TrainState) -> TrainState:
  """The state as the step wants it, given as any program or a checkpoint left it; used up, as by a
  step. Only TPUs have a layout of their own for tables."""
  if recipe.mesh is None or platform(recipe.mesh) != "tpu":
    return state
  return jax.jit(lambda state: state, out_shardings=recipe.formats, donate_argnums=0)(state)


def _initial(recipe: Recipe, layout: HashLayout | None, seed: jax.Array) -> TrainState:
  cfg, engram = recipe.config, recipe.config.model.engram
  key = jax.random.key(seed)
  model = LM(cfg.model, rngs=nnx.Rngs(jax.random.fold_in(key, 0)))
  _, params, biases = nnx.split(model, nnx.Param, RouterBias)
  params, biases = nnx.to_pure_dict(params), nnx.to_pure_dict(biases)
  tables = tuple(
    init_table(
      jax.random.fold_in(key, 1 + layer),
      layout.rows[layer],
      engram.row_width,
      std=cfg.model.init_std,
      dtype=jnp.dtype(engram.table_dtype),
      mesh=recipe.spread,
    )
    for layer in (() if engram.on_host else engram.layers)  # training/host has them
  )
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=zero,
    params=params,
    biases=biases,
    tables=tables,
    optimizer=recipe.optimizer.init(params),
    row_optimizers=tuple(recipe.rows.optimizer.init(table) for table in tables),
    bad_in_row=zero,
    bad_total=zero,
  )


def logical_rows(layout: HashLayout | None) -> dict[str, int]:
  """{path in the TrainState: rows} of tables and their optimizers' states.

  What follows those rows is padding, of which a mesh whose devices do not divide 1,024 has more.
  """
  if layout is None:
    return {}
  tables = [(i, layout.rows[layer]) for i, layer in enumerate(layout.layers)]
  return {f"{part}/{i}": n for part in ("tables", "row_optimizers") for i, n in tables}


def up_to_date(recipe: Recipe, state: TrainState) -> TrainState:
  """The state with every row as its optimizer means it to be now, for reading all of a table.

  Only optimizers that catch up with missed steps when a row is read have anything to do here; the
  state given is then used up, as by a step.
  """
  if not state.tables or not recipe.rows.optimizer.lags:
    return state
  flush = jax.jit(lambda tables, states: recipe.rows.flush(tables, states), donate_argnums=(0, 1))
  tables, states = flush(state.tables, state.row_optimizers)
  return state._replace(tables=tables, row_optimizers=states)
