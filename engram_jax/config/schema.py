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
    self._check_placement()
    return self

  def _check_placement(self) -> None:
    engram, table = self.model.engram, self.train.optimizer.table
    if engram.on_host:
      self._require_one_device({k: n for k, n in self.mesh.model_dump().items() if n})
      processes = self.distributed.processes
      require(
        processes <= 1,
        f"model.engram.placement={engram.placement!r} is for one process, not "
        f"distributed.processes={processes}: give placement=device",
      )
    # Such rows are brought up to date before a table is read whole, which writes all of the file.
    require(
      not engram.on_host or engram.placement != "file" or table != "adam_catch_up",
      "train.optimizer.table='adam_catch_up' moves every row before each evaluation, which "
      "model.engram.placement='file' is there to avoid: give adam, adagrad or sinkhorn, or "
      "placement=host",
    )

  def _require_one_device(self, sizes: dict[str, int]) -> None:
    many = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)
    require(
      not many,
      f"model.engram.placement={self.model.engram.placement!r} keeps the tables beside one device, "
      f"not {many}: give placement=device, or let this process see one device only",
    )

  def mesh_sizes(self, devices: int) -> dict[str, int]:
    """The mesh's axes over that many devices. ConfigError where the model does not divide by it."""
    sizes = self.mesh.sizes(devices)
    if self.model.engram.on_host:
      try:
        self._require_one_device(sizes)
      except ValueError as error:
        raise ConfigError(str(error)) from None
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

  def on_device(self) -> "Config":
    """The same with tables on the devices, for what reads or makes them whole."""
    engram = self.model.engram.model_copy(update={"placement": "device"})
    return self.model_copy(update={"model": self.model.model_copy(update={"engram": engram})})

  def to_yaml(self) -> str:
    """The resolved config, every field written out; `load_config` reads it back equal."""
    return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
