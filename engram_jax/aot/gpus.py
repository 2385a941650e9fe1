"""NVIDIA GPUs to compile for without having them: what XLA must know of each, and its devices.

The compiler is XLA's CUDA plugin (the extra `gpu-aot`), which needs no driver. It computes what a
GPU would, with one difference: where it measures kernels on the GPU that it has, and takes the
fastest, it takes a default here.
"""

from typing import Any, NamedTuple

from engram_jax.aot.hlo_cost import Rates
from engram_jax.errors import ConfigError

CUDNN = (9, 10, 0)  # the version that programs are compiled for
INSTALL = "pip install 'engram_jax[gpu-aot]'"
# Of all of them.
LIMITS = {
  "threads_per_block_limit": 1024,
  "threads_per_warp": 32,
  "shared_memory_per_block": 49152,
  "block_dim_limit_x": 2147483647,
  "block_dim_limit_y": 65535,
  "block_dim_limit_z": 65535,
  "thread_dim_limit_x": 1024,
  "thread_dim_limit_y": 1024,
  "thread_dim_limit_z": 64,
  "registers_per_core_limit": 65536,
  "registers_per_block_limit": 65536,
}


class Gpu(NamedTuple):
  """A kind of GPU, its numbers as the driver reports them."""

  description: str
  capability: tuple[int, int]
  """Compute capability: 9, 0 of an H100."""
  hbm_bytes: int
  peak_flops: float
  """bf16 FLOP/s without sparsity, as published."""
  bandwidth: float
  """Bytes/s of its memory."""
  cores: int
  """Streaming multiprocessors."""
  fpus: int
  """Units for float32 in each core."""
  ghz: float
  l2_bytes: int
  shared_bytes: int
  """Shared memory of each core; a block takes 1 KiB less at most."""
  threads: int = 2048
  """Threads that a core holds."""

  @property
  def rates(self) -> Rates:
    """FLOP/s and bytes/s of one GPU, for the modelled seconds: its peaks."""
    return Rates(self.peak_flops, self.bandwidth)

  @property
  def target(self) -> str:
    """The text of XLA's GpuTargetConfigProto."""
    major, minor = self.capability
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    capability = f"major: {major} minor: {minor} feature_extension: {feature}"
    numbers = LIMITS | {
      "core_count": self.cores,
      "fpus_per_core": self.fpus,
      "threads_per_core_limit": self.threads,
      "shared_memory_per_core": self.shared_bytes,
      "shared_memory_per_block_optin": self.shared_bytes - 1024,
      "memory_bandwidth": int(self.bandwidth),
      "l2_cache_size": self.l2_bytes,
      "clock_rate_ghz": self.ghz,
      "device_memory_size": self.hbm_bytes,
    }
    # Without `cub_version`, with which sorts are compiled by asking a GPU.
    info = "\n".join(f"  {name}: {value}" for name, value in numbers.items())
    return (
      f"gpu_device_info {{\n{info}\n"
      f"  cuda_compute_capability {{ {capability} }}\n"
      f'  name: "{self.description}" runtime_version: "12.8.0"\n}}\n'
      'platform_name: "CUDA"\n'
      f"dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}\n"
      f'device_description_str: "{self.description}"\n'
    )


MiB = 2**20
GPUS = {
  "a100": Gpu(
    "NVIDIA A100-SXM4-80GB", (8, 0), 85100068864, 312e12, 2.039e12, 108, 64, 1.41, 40 * MiB, 167936
  ),
  "l4": Gpu(
    "NVIDIA L4", (8, 9), 23798611968, 121e12, 0.3e12, 58, 128, 2.04, 48 * MiB, 102400, threads=1536
  ),
  "h100": Gpu(
    "NVIDIA H100 80GB HBM3", (9, 0), 84942979072, 989e12, 3.352e12, 132, 128, 1.98, 50 * MiB, 233472
  ),
  "h200": Gpu(
    "NVIDIA H200 141GB HBM3e",
    (9, 0),
    151397597184,
    989e12,
    4.8e12,
    132,
    128,
    1.98,
    50 * MiB,
    233472,
  ),
  "b200": Gpu(
    "NVIDIA B200", (10, 0), 191514411008, 2250e12, 7.672e12, 148, 128, 1.965, 132644864, 233472
  ),
}


def abstract_gpus(kind: str, hosts: int, gpus: int) -> list[Any]:
  """Returns `jax.Device`s of that many hosts with as many GPUs each; they hold no array.

  It changes what jax says of this process's GPU (`_ask_the_target`), so it is for a command that
  does nothing else. ConfigError without the compiler.
  """
  from jax.experimental import topologies

  gpu = GPUS[kind]
  try:
    description = topologies.get_topology_desc(
      platform="cuda", target_config=gpu.target, topology=f"1x{hosts}x{gpus}"
    )
  except NotImplementedError:  # "topology not implemented for cuda": there is no plugin
    raise ConfigError(f"topology {kind!r} needs the GPU compiler: {INSTALL}") from None
  _ask_the_target(gpu)
  return description.devices


def _ask_the_target(gpu: Gpu) -> None:
  """Lets jax ask the target what cuDNN takes, where it asks this process's GPU, which is none."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  number = lambda text: tuple(int(part) for part in text.split("."))
  replace = {
    "check_compute_capability": lambda wanted: gpu.capability >= number(wanted),
    "is_cuda_compute_capability_equal": lambda wanted: gpu.capability == number(wanted),
    "check_cudnn_version": lambda: CUDNN[0] * 10000 + CUDNN[1] * 100 + CUDNN[2],
  }
  for name, function in replace.items():
    assert hasattr(cudnn, name), name
    setattr(cudnn, name, function)
