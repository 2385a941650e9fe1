"""The real train step on abstract arrays: to be compiled for devices that are not here."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.config import Config
from engram_jax.core.mesh import BATCH_AXES
from engram_jax.errors import ConfigError
from engram_jax.model.counts import table_layout
from engram_jax.training.state import make_recipe, state_shapes
from engram_jax.training.step import Batch, make_train_step


def lower_train_step(cfg: Config, mesh: Mesh) -> jax.stages.Lowered:
  """The step of `cfg` on `mesh`, lowered for its devices; no array is made."""
  if cfg.model.engram.on_host:
    raise ConfigError(
      f"model.engram.placement={cfg.model.engram.placement!r}: a step is compiled ahead only for "
      "tables on the devices; give placement=device"
    )
  layout = table_layout(cfg.model)
  recipe = make_recipe(cfg, layout, mesh)
  return make_train_step(recipe).lower(state_shapes(recipe, layout), batch_shapes(cfg, mesh))


def batch_shapes(cfg: Config, mesh: Mesh) -> Batch:
  """A batch as the pipeline makes it, as jax.ShapeDtypeStructs divided over the mesh."""
  B, T, engram = cfg.train.batch_size, cfg.data.sequence_length, cfg.model.engram
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  token = lambda dtype: jax.ShapeDtypeStruct((B, T), dtype, sharding=place(BATCH_AXES))
  names = ("tokens", "targets", "segments", "positions", "source")
  batch = {name: token("int32") for name in names} | {"mask": token("bool")}
  if engram.layers:
    shape = (len(engram.layers), B, T, engram.columns)
    batch["row_ids"] = jax.ShapeDtypeStruct(shape, "int32", sharding=place(None, BATCH_AXES))
  return batch
