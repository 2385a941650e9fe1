"""Table optimizers as the TPU's compiler sees them; it needs no TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.config import OptimizerConfig
from engram_jax.tables.table_optimizer import table_optimizer

R, C, U = 1 << 22, 128, 1 << 12

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]


@pytest.fixture(scope="module")
def mesh():
  pytest.importorskip("libtpu")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc(topology_name="v5p:2x2x1", platform="tpu")
  return Mesh(np.array(topology.devices), ("rows",))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["adam", "adam_catch_up", "adagrad", "sinkhorn"])
def test_tables_of_both_types_are_updated_in_place(mesh, kind, dtype):
  """Temporaries are as large as a few times the touched rows; a device's share of the table is 256
  times those. (XLA's CPU backend has no scatter of bfloat16 and makes a float32 copy.)"""
  optimizer = table_optimizer(OptimizerConfig(table=kind), lambda step: 2e-3)

  def on_mesh(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

  table = on_mesh((R, C), dtype, "rows")
  state = jax.tree.map(
    lambda x: on_mesh(x.shape, x.dtype, *(["rows"] if x.ndim else [])),
    jax.eval_shape(optimizer.init, table),
  )

  def step(carry, grads, ids, ok):
    first_row = jax.lax.axis_index("rows") * carry[0].shape[0]
    table, state = optimizer.sync(*carry, ids, first_row=first_row)
    return optimizer.update(grads, state, table, ids, ok, first_row=first_row, axes=("rows",))

  carry = (table, state)
  specs = jax.tree.map(lambda x: x.sharding.spec, carry)
  rows, everywhere = PartitionSpec("rows"), PartitionSpec()
  sharded = jax.shard_map(
    step, mesh=mesh, in_specs=(specs, rows, rows, everywhere), out_specs=specs
  )
  ids = on_mesh((U * mesh.size,), jnp.int32, "rows")
  grads, ok = on_mesh((U * mesh.size, C), jnp.float32, "rows"), on_mesh((), jnp.bool_)
  compiled = jax.jit(sharded, donate_argnums=0).lower(carry, grads, ids, ok).compile()

  memory = compiled.memory_analysis()
  held = sum(
    x.size * x.dtype.itemsize // (mesh.size if x.ndim else 1) for x in jax.tree.leaves(carry)
  )
  assert memory.alias_size_in_bytes >= held
  assert memory.temp_size_in_bytes < 10 * U * C * 4
