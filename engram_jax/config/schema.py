"""The whole config, and the checks that look across its sections."""

import yaml
from pydantic import model_validator

from engram_jax.config.base import Frozen, require
from engram_jax.config.model import ModelConfig
from engram_jax.config.run import DataConfig, DistributedConfig, MeshConfig, RunConfig, TrainConfig
from engram_jax.errors import ConfigError


class Config(Frozen):
  run: RunConfig = RunConfig()
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()
  distributed: DistributedConfig = DistributedConfig()

  @model_validator(mode="after")
  def _check(self) -> "Config":
    yarn = self.model.attention.yarn
    longest = int(yarn.original_length * yarn.scale)
    if yarn.scale > 1:
      require(
        self.data.sequence_length <= longest,
        f"data.sequence_length={self.data.sequence_length} is above "
        f"yarn.original_length x scale = {longest}",
      )
    if self.data.tokenizer == "bpe":
      require(
        self.model.vocab_size >= 260,
        f"model.vocab_size={self.model.vocab_size} cannot hold a byte-level BPE: at least 260",
      )
    return self

  def mesh_sizes(self, devices: int) -> dict[str, int]:
    """The mesh's axes over that many devices. ConfigError where the model does not divide by it."""
    sizes = self.mesh.sizes(devices)
    shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    micro = self.train.batch_size // self.train.accumulate
    tensor, model = sizes["tensor"], self.model
    experts = model.moe.routed_experts if model.moe.leading_dense_layers < model.layers else 0
    divided = (
      (micro, "train.batch_size / train.accumulate", shards, "mesh.data x fsdp x expert"),
      (experts, "model.moe.routed_experts", sizes["expert"], "mesh.expert"),
      (model.attention.heads, "model.attention.heads", tensor, "mesh.tensor"),
      (self.data.sequence_length, "data.sequence_length", tensor, "mesh.tensor"),
    )
    for number, name, parts, axes in divided:
      if number % parts:
        raise ConfigError(f"{name}={number} does not divide by {axes}={parts}: give a multiple")
    return sizes

  def to_yaml(self) -> str:
    """The resolved config, every field written out; `load_config` reads it back equal."""
    return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
