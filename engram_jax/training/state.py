"""The state of training, and the static setup that a config makes: init, save and restore."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from engram_jax.config import Config
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.mesh import batch_shards, platform, replicated
from engram_jax.core.rules import state_shardings
from engram_jax.core.schedule import learning_rate
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.model.lm import LM
from engram_jax.model.params import param_shardings
from engram_jax.model.router import RouterBias
from engram_jax.tables.base import Tables
from engram_jax.tables.row_checkpoint import stored_tables
from engram_jax.training.optimizer import backbone_optimizer


class TrainState(NamedTuple):
  """A pytree of everything that a step changes.

  Attributes:
    step: int32, steps taken (also the number of the next batch).
    params, biases: pure nested dicts of the LM's nnx.Param and RouterBias arrays.
    tables: the memory tables and their optimizer's states; None in the part without them.
    optimizer: state of the backbone optimizer.
    nonfinite_streak, nonfinite_total: int32, steps whose loss or gradients were not finite.
  """

  step: jax.Array
  params: Any
  biases: Any
  tables: Any  # TableState, or None
  optimizer: Any
  nonfinite_streak: jax.Array
  nonfinite_total: jax.Array


# Names in checkpoints, where they differ; tables have theirs in tables/row_checkpoint.py.
_STORED = {"nonfinite_streak": "bad_in_row", "nonfinite_total": "bad_total"}


class TrainSetup(NamedTuple):
  """The static half of training: config, graph, optimizers, tables, mesh and shardings."""

  config: Config
  graphdef: Any
  optimizer: optax.GradientTransformation
  tables: Tables
  learning_rate: Any
  mesh: Mesh | None = None
  shardings: Any = None  # a NamedSharding per leaf of the state but its tables; None without a mesh

  @property
  def multi_device_mesh(self) -> Mesh | None:
    """The mesh if it has more than one device."""
    return self.mesh if self.mesh is not None and self.mesh.size > 1 else None

  @property
  def batch_shards(self) -> int:
    """Parts that the batch is divided into."""
    return 1 if self.mesh is None else batch_shards(self.mesh)

  def model(self, params: Any, biases: Any) -> LM:
    """Builds the LM with these parameters; for use inside jit."""
    return nnx.merge(self.graphdef, nnx.State(params), nnx.State(biases))

  def constrain(self, state: TrainState) -> TrainState:
    """Constrains a state to its shardings; for use inside jit."""
    if self.shardings is None:
      return state
    # Without a mesh arrays have another type than the outputs of a step on one, and the step would
    # be compiled once for each.
    rest = jax.lax.with_sharding_constraint(state._replace(tables=None), self.shardings)
    return rest._replace(tables=self.tables.constrain(state.tables))

  @property
  def formats(self) -> Any:
    """Shardings and layouts of the state on the mesh; None without one."""
    return self.shardings and self.shardings._replace(tables=self.tables.formats)


def make_setup(
  cfg: Config, layout: HashLayout | None = None, mesh: Mesh | None = None
) -> TrainSetup:
  """Makes the setup of a config, without any array.

  Args:
    layout: hash layout of the tables; None for a model without a memory.
    mesh: the devices to train on. Default: one device of this process.
  """
  model = nnx.eval_shape(lambda: LM(cfg.model, rngs=nnx.Rngs(0)))
  graphdef, params, _ = nnx.split(model, nnx.Param, RouterBias)
  optimizer = cfg.train.optimizer
  schedule = learning_rate(cfg.train.schedule, optimizer.learning_rate, cfg.train.steps)
  backbone = backbone_optimizer(optimizer, schedule, nnx.to_pure_dict(params), mesh)
  setup = TrainSetup(cfg, graphdef, backbone, Tables.of(cfg, layout, mesh), schedule, mesh)
  if mesh is None:
    return setup
  shapes = jax.eval_shape(lambda: _initial(setup, jnp.uint32(0)))
  return setup._replace(shardings=_shardings(mesh, shapes))


def _shardings(mesh: Mesh, shapes: TrainState) -> Any:
  """A state of shardings: parameters and their optimizer's by rule, scalars replicated."""
  on_all: Any = replicated(mesh)
  params = param_shardings(shapes.params, mesh)
  return TrainState(
    step=on_all,
    params=params,
    biases=jax.tree.map(lambda _: on_all, shapes.biases),
    tables=None,
    optimizer=state_shardings(shapes.optimizer, shapes.params, params, mesh),
    nonfinite_streak=on_all,
    nonfinite_total=on_all,
  )


def state_shapes(setup: TrainSetup) -> TrainState:
  """The state as jax.ShapeDtypeStructs, on a mesh with their shardings; makes no array."""
  shapes = jax.eval_shape(lambda: _initial(setup, jnp.uint32(0)))
  if setup.shardings is not None:
    shard = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    shapes = jax.tree.map(shard, shapes, setup.shardings)
  return shapes._replace(tables=setup.tables.shapes)


def init_state(setup: TrainSetup) -> TrainState:
  """Makes the state before the first step, sharded; its numbers are equal on any mesh."""
  make = jax.jit(lambda seed: _initial(setup, seed), out_shardings=setup.shardings)
  state = make(jnp.uint32(setup.config.train.seed))
  return state._replace(tables=setup.tables.init(Tables.key(setup.config)))


def with_layout(setup: TrainSetup, state: TrainState) -> TrainState:
  """Puts a state of any program or checkpoint into the layouts that the step takes; donates it.

  Only TPUs have a layout of their own for tables.
  """
  if setup.mesh is None or platform(setup.mesh) != "tpu":
    return state
  return jax.jit(lambda state: state, out_shardings=setup.formats, donate_argnums=0)(state)


def _initial(setup: TrainSetup, seed: jax.Array) -> TrainState:
  """The state before the first step, without tables."""
  key = jax.random.key(seed)
  model = LM(setup.config.model, rngs=nnx.Rngs(jax.random.fold_in(key, 0)))
  _, params, biases = nnx.split(model, nnx.Param, RouterBias)
  params, biases = nnx.to_pure_dict(params), nnx.to_pure_dict(biases)
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=zero,
    params=params,
    biases=biases,
    tables=None,
    optimizer=setup.optimizer.init(params),
    nonfinite_streak=zero,
    nonfinite_total=zero,
  )


def flush(setup: TrainSetup, state: TrainState) -> TrainState:
  """Applies the pending updates of a lazy table optimizer to all rows; donates the state."""
  return state._replace(tables=setup.tables.flush(state.tables))


def save_state(
  checkpoints: Checkpoints, step: int, setup: TrainSetup, state: TrainState, meta: dict[str, Any]
) -> None:
  """Starts to save a state; see `Tables.save`. It is sound outside a streak of non-finite steps."""
  is_sound = int(state.nonfinite_streak) == 0
  setup.tables.save(checkpoints, step, state.tables, _stored(state), meta, is_sound)


def restore_state(checkpoints: Checkpoints, step: int, setup: TrainSetup) -> TrainState:
  """Restores the state of a step, saved under any placement and on any mesh.

  Raises StorageError as `Checkpoints.restore` does.
  """
  like, key = _stored(state_shapes(setup)), Tables.key(setup.config)
  tables, rest = setup.tables.restore(checkpoints, step, like, key)
  names = {_STORED.get(name, name): name for name in TrainState._fields}
  return TrainState(tables=tables, **{names[stored]: x for stored, x in rest.items()})


def stored(state: TrainState) -> dict[str, Any]:
  """The full state under the names that checkpoints have."""
  return stored_tables(state.tables) | _stored(state)


def _stored(state: TrainState) -> dict[str, Any]:
  """The state but its tables, under the names that checkpoints have."""
  fields = state._asdict()
  return {_STORED.get(name, name): x for name, x in fields.items() if name != "tables"}
