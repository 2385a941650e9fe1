"""Memory tables as one object, wherever they lie: made, read by touched rows, updated, saved.

    tables = Tables(cfg, layout, optimizer=adam(1e-3))
    state = tables.init(jax.random.key(0))
    touched = tables.fetch(state, {layer: row_ids_BTJ})
    loss = lambda params, rows: ... touched.expand(rows)[layer] ...          [B, T, J, C]
    d_params, d_rows = jax.grad(loss, argnums=(0, 1))(params, touched.rows)
    state = tables.update(state, touched, d_rows)

Where tables lie on devices (on one, or sharded over a mesh) all of this works under one `jax.jit`,
with the state donated. Where they lie in host memory or in a file it is called outside jit, or by
`Tables.jit`, which reads and writes rows around a jitted step while the step before it runs.
"""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.config import Config, EngramConfig
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.mesh import compute_dtype, platform, replicated
from engram_jax.core.schedule import learning_rate
from engram_jax.memory.compress import check_visible_ids
from engram_jax.memory.hashing import HashLayout
from engram_jax.memory.table import init_table, lookup, padded_rows, row_major
from engram_jax.tables import row_checkpoint
from engram_jax.tables.device import DeviceRows, Fetched, RowGrads
from engram_jax.tables.offload import OffloadedTables
from engram_jax.tables.row_schema import RowSchema
from engram_jax.tables.sharded import ShardedRows
from engram_jax.tables.state import SLOTS, TableState, Touched
from engram_jax.tables.table_optimizer import TableOptimizer, table_optimizer


class Tables:
  """The tables of a model: static, and to be closed over by jitted functions.

  A context manager, which ends the threads and files of tables that lie off the devices.

  Attributes:
    cfg, layout, optimizer, mesh: as given. layers: 0-based ids of the blocks with a table, rising.
    row_counts: {layer: R}.
    is_offloaded: the tables lie off the devices. init_std: of the rows at the start.
  """

  def __init__(
    self,
    cfg: EngramConfig,
    layout: HashLayout | None,
    optimizer: TableOptimizer,
    mesh: Mesh | None = None,
    *,
    init_std: float = 0.02,
    exchange_dtype: Any = jnp.float32,
    folder: pathlib.Path | None = None,
  ):
    """Makes no array.

    Args:
      cfg: says the rows' width, the tables' dtype and placement, and the exchange's capacity.
      layout: hash layout of the tables; None for a model without a memory.
      mesh: over whose devices, all axes flattened, the tables are sharded; default: one device.
      init_std: standard deviation of the rows at the start.
      exchange_dtype: in which rows and gradients travel over a mesh.
      folder: for the files of the placement "file"; the system's for temporary files if None.

    Raises ValueError for tables off the devices and a mesh of several.
    """
    self.cfg, self.layout, self.optimizer, self.mesh = cfg, layout, optimizer, mesh
    self.row_counts = dict(layout.rows) if layout else {}
    self.layers = tuple(self.row_counts)
    self.is_offloaded = bool(self.layers) and cfg.placement != "device"
    self.init_std, self._folder = init_std, folder
    self._sharded: Mesh | None = None  # the mesh, if it has several devices
    self._backend: DeviceRows | ShardedRows = DeviceRows(optimizer)
    if mesh is not None and mesh.size > 1:
      if self.is_offloaded:
        raise ValueError(f"placement={cfg.placement!r} is for one device, not for {mesh.size}")
      rows = tuple(padded_rows(R, mesh.size) for R in self.row_counts.values())
      # Rows that are balanced against one another must arrive in one round.
      capacity = float(mesh.size) if optimizer.is_joint else cfg.exchange_capacity
      self._sharded = mesh
      self._backend = ShardedRows(optimizer, mesh, rows, capacity, exchange_dtype)
    self._opened = contextlib.ExitStack()

  @classmethod
  def of(cls, cfg: Config, layout: HashLayout | None, mesh: Mesh | None = None) -> "Tables":
    """The tables of a run's model, with the optimizer and schedule that its config names."""
    optimizer = cfg.train.optimizer
    schedule = learning_rate(cfg.train.schedule, optimizer.learning_rate, cfg.train.steps)
    return cls(
      cfg.model.engram,
      layout,
      table_optimizer(optimizer, schedule),
      mesh,
      init_std=cfg.model.init_std,
      exchange_dtype=compute_dtype(cfg.model.dtype, platform(mesh)),
      folder=cfg.run.directory,
    )

  @staticmethod
  def key(cfg: Config) -> jax.Array:
    """The key that a run's tables are drawn from."""
    return jax.random.key(jnp.uint32(cfg.train.seed))

  def __enter__(self) -> "Tables":
    return self

  def __exit__(self, *_: object) -> None:
    self._opened.close()

  # --- state -------------------------------------------------------------------------------

  def init(self, key: jax.Array) -> TableState:
    """Tables before the first step, made where they lie; the same numbers for every placement.

    On devices this may be called under jit; off them `key` must be concrete.
    """
    if self.is_offloaded:
      folder = self._folder or pathlib.Path(tempfile.gettempdir())
      host = OffloadedTables(
        self.optimizer,
        self.schemas,
        {n: self.key_of(key, n) for n in self.layers},
        init_std=self.init_std,
        folder=folder if self.cfg.placement == "file" else None,
        device=None if self.mesh is None else replicated(self.mesh),
      )
      self._opened.callback(host.close)
      return host.first_state()
    return self._init_program(key)

  @functools.cached_property
  def _init_program(self) -> Callable[[jax.Array], TableState]:
    return jax.jit(self._init, out_shardings=self.formats)

  def _init(self, key: jax.Array) -> TableState:
    make = functools.partial(
      init_table,
      width=self.cfg.row_width,
      std=self.init_std,
      dtype=jnp.dtype(self.cfg.table_dtype),
      mesh=self._sharded,
    )
    tables = {n: make(self.key_of(key, n), R) for n, R in self.row_counts.items()}
    return TableState(tables, {n: self.optimizer.init(t) for n, t in tables.items()})

  def key_of(self, key: jax.Array, layer: int) -> jax.Array:
    """The key of one layer's rows, of the key that `init` was given."""
    return jax.random.fold_in(key, 1 + layer)

  @functools.cached_property
  def schemas(self) -> dict[int, RowSchema]:
    """Records of a row and its optimizer's state, by layer."""
    width, dtype = self.cfg.row_width, jnp.dtype(self.cfg.table_dtype)
    return {
      n: RowSchema.of(self.optimizer, R, padded_rows(R), width, dtype)
      for n, R in self.row_counts.items()
    }

  @functools.cached_property
  def shapes(self) -> TableState:
    """The state on devices as jax.ShapeDtypeStructs, on a mesh with their shardings."""
    shapes = jax.eval_shape(self._init, jax.eval_shape(jax.random.key, 0))
    if self.mesh is None:
      return shapes
    place = lambda x, format_: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=format_)
    return jax.tree.map(place, shapes, self._formats(shapes))

  @functools.cached_property
  def formats(self) -> TableState | None:
    """Shardings of the state on the mesh, on TPU with the layout of its arrays.

    None without a mesh, and for tables off the devices."""
    if self.mesh is None or self.is_offloaded:
      return None
    shapes = jax.eval_shape(self._init, jax.eval_shape(jax.random.key, 0))
    return self._formats(shapes)

  def _formats(self, shapes: TableState) -> TableState:
    place = lambda x: row_major(self._sharding(x.ndim), x.ndim)
    return jax.tree.map(place, shapes)

  def _sharding(self, ndim: int) -> NamedSharding:
    """The sharding of rows over all axes of the mesh, or of a scalar, replicated."""
    assert self.mesh is not None
    return NamedSharding(
      self.mesh, PartitionSpec(self.mesh.axis_names) if ndim else PartitionSpec()
    )

  def constrain(self, state: TableState) -> TableState:
    """The state held where it belongs; for use inside jit."""
    if self.mesh is None or self.is_offloaded:
      return state
    return jax.tree.map(
      lambda x: jax.lax.with_sharding_constraint(x, self._sharding(x.ndim)), state
    )

  # --- a batch's rows ----------------------------------------------------------------------

  def batch_ids(self, batch: Mapping[str, Any]) -> dict[int, Any]:
    """Row ids by layer of a pipeline's batch, for `fetch`; after `prefetch` the slots, positions in
    row buffers, that took their place."""
    if not self.layers:
      return {}
    return self._by_layer(batch[SLOTS] if SLOTS in batch else batch["row_ids"])

  @jax.named_scope("sparse_retrieval")
  def fetch(self, state: TableState, row_ids: Mapping[int, jax.Array]) -> Touched:
    """Reads the distinct rows of a batch, up to date, to be differentiated by.

    Returns `Touched`: `rows` {layer: [U, C]} in the tables' dtype, for U distinct rows at most, and
    `inverses` {layer: int32 [B, T, J]}, the position of each id's row.

    Args:
      row_ids: {layer: int32 [B, T, J]}, offsets included, as `memory.hashing.row_ids` gives them.
        Values of NumPy arrays are checked, and all of them where the tables lie off the devices.
        Inside jit there are none to check: `memory.compress.check_ids` does it before they enter,
        where they come from elsewhere. An id outside the table gives NaN there, or, in a batch that
        has more distinct ids than the table has rows, disturbs those of others.

    Raises ValueError unless there are row ids for each layer with a table, and for no other; for
    other dtypes and shapes; and for an id seen to be outside its table, naming it.
    """
    if set(row_ids) != set(self.layers):
      raise ValueError(f"row ids of layers {sorted(row_ids)}, but the tables are {self.layers}")
    row_ids = self._check_row_ids(row_ids, "BTJ")
    if not self.layers:
      return Touched({}, {}, (), None)
    if state.host is not None:
      buffers, slots = state.host.stage(state, row_ids)
      touched = self._fetch_program(buffers, slots)
      return dataclasses.replace(touched, synced=touched.synced or buffers)
    ids = tuple(row_ids[n] for n in self.layers)
    backend = self._backend_of(state)
    fetched, tables, optimizer_states = backend.fetch(*self._as_tuples(state), ids)
    synced = self._state(state, tables, optimizer_states) if self.optimizer.is_lazy else None
    by_layer = self._by_layer
    return Touched(
      by_layer(fetched.rows), by_layer(fetched.inverses), fetched.residuals, synced, self._sharded
    )

  @jax.named_scope("row_gradients")
  def reduce_grads(self, touched: Touched, d_rows: Mapping[int, jax.Array]) -> RowGrads:
    """The rows' gradients where the rows lie, with their norm, for whoever clips by it.

    On one device nothing is left to do; over a mesh they travel to the rows' owners.
    """
    grads = tuple(d_rows[n] for n in self.layers)
    if not grads:
      return RowGrads((), (), (), jnp.float32(0), (), jnp.int32(0))
    return self._backend.reduce_grads(self._fetched(touched), grads)

  @jax.named_scope("table_update")
  def update(
    self,
    state: TableState,
    touched: Touched,
    grads: Mapping[int, jax.Array] | RowGrads,
    *,
    scale: jax.typing.ArrayLike | None = None,
    grad_scale: jax.typing.ArrayLike = 1.0,
    ok: jax.typing.ArrayLike = True,
  ) -> TableState:
    """The state after one step of the optimizer on the touched rows; no other row is read.

    Off the devices the tables are changed in place, and the state given is used up.

    Args:
      touched: of the same state.
      grads: of `touched.rows`, by layer, or what `reduce_grads` made of them.
      scale: multiplies the learning rate of this step; `adam_catch_up`, whose rows make up for
        missed steps, takes a function of the step as its learning rate instead, and refuses this.
      grad_scale: multiplies the gradients, as a clipping by norm does.
      ok: bool; where False the state comes back as it was, but for rows that `fetch` brought up to
        date.

    Raises ValueError for gradients of other layers, shapes or dtypes than the rows'.
    """
    if not self.layers:
      return state
    if state.host is not None:
      buffers = touched.synced
      if buffers is None or buffers.buffer_ids is None:
        raise ValueError("touched was fetched from other tables than these, which lie on the host")
      ids = {n: np.asarray(x) for n, x in buffers.buffer_ids.items()}
      bare, args = dataclasses.replace(touched, synced=None), (scale, grad_scale, ok)
      new = self._update_program(buffers, bare, grads, *args)
      return state.host.write_back(new, {n: x[x >= 0] for n, x in ids.items()})
    if not isinstance(grads, RowGrads):
      self._check_grads(touched, grads)
      grads = self.reduce_grads(touched, grads)
    state = state if touched.synced is None else touched.synced
    rate = {} if scale is None else {"rate_scale": jnp.float32(scale)}
    tables, optimizer_states = self._backend_of(state).update(
      self._fetched(touched),
      grads,
      *self._as_tuples(state),
      jnp.float32(grad_scale),
      jnp.asarray(ok),
      **rate,
    )
    return self._state(state, tables, optimizer_states)

  def flush(self, state: TableState) -> TableState:
    """The state with every row as its optimizer means it to be now, for reading all of a table.

    Only lazy optimizers have anything to do here; the state given is then used up.
    """
    if state.host is not None:
      return state.host.flush(state)
    return self._flush_program(state) if self.layers and self.optimizer.is_lazy else state

  def lookup(self, state: TableState, row_ids: Mapping[int, Any]) -> dict[int, jax.Array]:
    """Rows [*, C] of row ids [*] by layer, as they are stored: for evaluation and generation.

    A lazy optimizer's rows may be behind: `flush` comes first.

    Raises ValueError as `fetch` does, but takes ids of any shape, and of some layers alone.
    """
    if unknown := set(row_ids) - set(self.layers):
      raise ValueError(f"row ids of layers {sorted(unknown)}, but the tables are {self.layers}")
    row_ids = self._check_row_ids(row_ids)
    if state.host is not None:
      return state.host.lookup(row_ids)
    return self._lookup_program(state.tables, dict(row_ids))

  def save(
    self,
    checkpoints: Checkpoints,
    step: int,
    state: TableState,
    rest: Mapping[str, Any],
    meta: dict[str, Any],
    is_sound: bool = True,
  ) -> None:
    """Starts to save the state as step `step`, with everything else that training changes.

    Args:
      rest: trees of arrays by name, such as {"params": ..., "optimizer": ...}.
      meta: JSON values, which `checkpoints.meta(step)` gives back.
      is_sound: see `Checkpoints.save`.

    Raises as `Checkpoints.save` does.
    """
    row_checkpoint.save(checkpoints, step, state, rest, meta, is_sound)

  def restore(
    self, checkpoints: Checkpoints, step: int, like: Mapping[str, Any], key: jax.Array
  ) -> tuple[TableState, dict[str, Any]]:
    """(state, rest) of a step that was saved under any placement, on any mesh; verified first.

    Args:
      like: the rest, as arrays or jax.ShapeDtypeStructs.
      key: of `init`; rows that no step has written may be drawn from it again.

    Raises StorageError as `Checkpoints.restore` does.
    """
    return row_checkpoint.restore(checkpoints, step, like, self, key)

  # --- a training loop ---------------------------------------------------------------------

  def prefetch(
    self, state: TableState, batches: Iterable[dict[str, Any]]
  ) -> Iterator[dict[str, Any]]:
    """The batches of a pipeline; off the devices the next one's rows are read while a step runs.

    There `row_ids` is replaced by `slots`, and each batch is for one call of a step of `jit`.
    """
    return iter(batches) if state.host is None else state.host.prefetch(batches)

  def jit(self, step: Callable[..., tuple[Any, Any]], **options: Any) -> Callable[..., Any]:
    """`step(state, batch) -> (state, out)` jitted, the state donated, for any placement.

    Args:
      step: may call `fetch` and `update` on `state.tables`, a `TableState` in a NamedTuple. Off the
        devices that holds row buffers, filled before the call and written back after it.
      options: of `jax.jit`.
    """
    program = jax.jit(step, donate_argnums=0, **options)
    if not self.is_offloaded:
      return program

    def run(state: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
      host = state.tables.host
      buffers, ids = host.buffers(state.tables)
      new, out = program(state._replace(tables=buffers), batch)
      return new._replace(tables=host.write_back(new.tables, ids)), out

    return run

  def counts(self, state: TableState) -> dict[str, float]:
    """Metrics of moving rows since the last call; {} on devices."""
    return {} if state.host is None else state.host.counts()

  # --- within ------------------------------------------------------------------------------

  def _backend_of(self, state: TableState) -> DeviceRows | ShardedRows:
    if state.buffer_ids is None:
      return self._backend
    return DeviceRows(self.optimizer, tuple(state.buffer_ids[n] for n in self.layers))

  def _check_row_ids(self, row_ids: Mapping[int, Any], axes: str | None = None) -> dict[int, Any]:
    return {
      n: check_visible_ids(ids, self.row_counts[n], f"layer {n}: row id", axes)
      for n, ids in row_ids.items()
    }

  def _check_grads(self, touched: Touched, grads: Mapping[int, Any]) -> None:
    if set(grads) != set(self.layers):
      raise ValueError(f"gradients of layers {sorted(grads)}, but the tables are {self.layers}")
    for n, rows in touched.rows.items():
      dtype, shape = jnp.result_type(grads[n]), jnp.shape(grads[n])
      if shape != rows.shape or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
          f"layer {n}: gradients are floats of the shape {rows.shape} of touched.rows, "
          f"not {dtype} of shape {shape}"
        )

  def _as_tuples(self, state: TableState) -> tuple[tuple, tuple]:
    return tuple(state.tables[n] for n in self.layers), tuple(
      state.optimizer[n] for n in self.layers
    )

  def _state(self, old: TableState, tables: tuple, states: tuple) -> TableState:
    return old._replace(tables=self._by_layer(tables), optimizer=self._by_layer(states))

  def _fetched(self, touched: Touched) -> Fetched:
    rows, inverses = (tuple(x[n] for n in self.layers) for x in (touched.rows, touched.inverses))
    return Fetched(rows, inverses, touched.residuals)

  def _by_layer(self, values: Any) -> dict[int, Any]:
    return dict(zip(self.layers, values, strict=True))

  @functools.cached_property
  def _fetch_program(self) -> Callable[..., Touched]:
    return jax.jit(self.fetch)

  @functools.cached_property
  def _update_program(self) -> Callable[..., TableState]:
    def run(buffers, touched, grads, scale, grad_scale, ok):
      return self.update(buffers, touched, grads, scale=scale, grad_scale=grad_scale, ok=ok)

    return jax.jit(run)

  @functools.cached_property
  def _flush_program(self) -> Callable[[TableState], TableState]:
    def flush_tables(state: TableState) -> TableState:
      return self._state(state, *self._backend.flush(*self._as_tuples(state)))

    return jax.jit(flush_tables, donate_argnums=0, out_shardings=self.formats)

  @functools.cached_property
  def _lookup_program(self) -> Callable[..., dict[int, jax.Array]]:
    look = functools.partial(lookup, mesh=self._sharded, capacity=self.cfg.exchange_capacity)

    def lookup_tables(tables: dict, row_ids: dict) -> dict[int, jax.Array]:
      return {n: look(tables[n], ids) for n, ids in row_ids.items()}

    return jax.jit(lookup_tables)
