"""All settings of a run: frozen pydantic models, read from YAML files that extend one another.

    cfg = load_config("configs/tiny.yaml", overrides={"train.steps": 20})

A config file is YAML; `extends: other.yaml` names the file it differs from, so a file is the
experiment. Keys that are not known are refused with the nearest known one; contradictory sizes are
refused with both numbers. Loading a config runs no code and touches no device.
"""

from engram_jax.config.load import build, explain, fields, load_config, nearest
from engram_jax.config.model import (
  DIALECTS,
  MAX_ROWS,
  TABLE_OPTIMIZERS,
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
  ResidualConfig,
  YarnConfig,
)
from engram_jax.config.run import (
  FILE_SOURCES,
  NAMED_TOKENIZERS,
  Config,
  DataConfig,
  DistributedConfig,
  MeshConfig,
  OptimizerConfig,
  RunConfig,
  ScheduleConfig,
  TrainConfig,
)

__all__ = [
  "DIALECTS",
  "FILE_SOURCES",
  "MAX_ROWS",
  "NAMED_TOKENIZERS",
  "TABLE_OPTIMIZERS",
  "AttentionConfig",
  "Config",
  "DataConfig",
  "DistributedConfig",
  "EngramConfig",
  "MeshConfig",
  "MoEConfig",
  "ModelConfig",
  "OptimizerConfig",
  "ResidualConfig",
  "RunConfig",
  "ScheduleConfig",
  "TrainConfig",
  "YarnConfig",
  "build",
  "explain",
  "fields",
  "load_config",
  "nearest",
]
