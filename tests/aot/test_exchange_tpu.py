"""Arrays that the exchange of rows moves and makes, read from the program of a TPU's compiler.

tests/eight/test_lookup.py reads the same contracts from a program for eight simulated devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from engram_jax.aot.collectives import (
  Collective,
  collectives,
  compile_with_text,
  has_array_with_rows,
  makers,
)
from engram_jax.aot.hlo_text import Array
from engram_jax.aot.topology import abstract_devices, topology
from engram_jax.core.mesh import make_mesh
from engram_jax.memory.table import row_major, table_sharding
from engram_jax.tables.optimizers.adam import adam
from engram_jax.tables.sharded import ShardedRows
from engram_jax.tables.state import expand_rows

ROWS, C, IDS = 1 << 21, 80, 1 << 12  # rows of the table; row ids that one device looks up
D = 8
SHARD_BYTES = ROWS // D * (3 * C + 1) * 4  # bytes of one device's rows and their optimizer's state

pytestmark = pytest.mark.slow  # a compilation of a minute


class Program(NamedTuple):
  text: str
  moved: list[Collective]
  temporaries: int


@pytest.fixture(scope="module")
def program(optimized) -> Program:
  """Rows fetched, their gradients returned, the table updated: the memory's part of a step."""
  pytest.importorskip("libtpu")
  mesh = make_mesh({"fsdp": D}, abstract_devices(topology("v5p:2x2x2")))
  rows = ShardedRows(adam(0.1), mesh, (ROWS,), 1.25, jnp.bfloat16)
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  table = jax.ShapeDtypeStruct((ROWS, C), jnp.float32, sharding=row_major(table_sharding(mesh), 2))
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=row_major(place(mesh.axis_names) if x.ndim else place(), x.ndim)
    ),
    jax.eval_shape(rows.optimizer.init, table),
  )
  ids = jax.ShapeDtypeStruct((D, IDS // 4, 4), jnp.int32, sharding=place("fsdp"))
  weights = jax.ShapeDtypeStruct((D, IDS // 4, 4, C), jnp.bfloat16, sharding=place("fsdp"))

  def step(table, state, ids, weights):
    fetched, tables, states = rows.fetch((table,), (state,), (ids,))
    given, transpose = jax.vjp(lambda r: expand_rows(mesh, r, fetched.inverses[0]), fetched.rows[0])
    grads = transpose(weights * given)
    row_grads = rows.reduce_grads(fetched, grads)
    return rows.update(fetched, row_grads, tables, states, jnp.float32(1), jnp.bool_(True))

  home = jax.tree.map(lambda x: x.format, ((table,), (state,)))
  step = jax.jit(step, donate_argnums=(0, 1), out_shardings=home)
  lowered = step.lower(table, state, ids, weights)
  compiled, text = compile_with_text(lowered, {"xla_optimization_level": "EFFORT_O1"})
  return Program(text, collectives(text), compiled.memory_analysis().temp_size_in_bytes)


def test_no_part_of_the_table_travels(program):
  assert {c.kind for c in program.moved} == {"all-to-all", "all-reduce"}
  assert all(a.bytes <= 64 for c in program.moved if c.kind == "all-reduce" for a in c.shapes)
  assert not any({ROWS, ROWS // D} & set(a.dims) for c in program.moved for a in c.shapes)
  assert not has_array_with_rows(program.text, ROWS)


def test_no_gradient_of_the_tables_size_is_made(program):
  """Rows are written in place; a gradient would be a broadcast of zeros, and memory."""
  assert "broadcast" not in {made.opcode for made in makers(program.text, ROWS // D)}
  assert program.temporaries < SHARD_BYTES / 2


def test_little_more_travels_than_the_distinct_rows(program):
  """Uniform ids are nearly all distinct; in both directions together, twice their bytes."""
  distinct = IDS * (1 - IDS * D / ROWS / 2)
  assert sum(c.bytes for c in program.moved) < 1.5 * 2 * distinct * Array("bf16", (C,)).bytes
