"""Flash kernels against the plain form, as far as a CPU can run them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.model import attention_kernels
from engram_jax.model.attention_kernels import (
  attend,
  attention,
  cudnn_attention,
  splash_attention,
)

SCALE = 0.3


def arrays(T: int, dtype=jnp.float32, B: int = 2, H: int = 2, K: int = 24, V: int = 16):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  segments = np.sort(rng.integers(0, 3, (B, T), dtype=np.int32), axis=1)
  return normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), segments


@functools.partial(jax.jit, static_argnums=0)
def value_and_grads(kernel, query, key, value, segments):
  mixed, pullback = jax.vjp(lambda *qkv: kernel(*qkv, segments, scale=SCALE), query, key, value)
  return mixed, *pullback(jnp.cos(jnp.arange(mixed.size, dtype=mixed.dtype)).reshape(mixed.shape))


@pytest.mark.slow  # interpreting the kernel, forward and twice backward
def test_splash_equals_plain_in_value_and_gradients():
  args = arrays(T=256)
  got = value_and_grads(functools.partial(splash_attention, interpret=True), *args)
  chex.assert_trees_all_close(got, value_and_grads(attention, *args), rtol=1e-4, atol=1e-4)


def test_what_cudnn_is_asked_for_equals_plain():
  args = arrays(T=10)
  got = value_and_grads(functools.partial(cudnn_attention, implementation="xla"), *args)
  chex.assert_trees_all_close(got, value_and_grads(attention, *args), rtol=1e-4, atol=1e-4)


def test_auto_is_plain_on_cpu():
  args = arrays(T=128)
  np.testing.assert_array_equal(attend("auto", *args, SCALE), attention(*args, SCALE))


def test_flash_is_refused_on_cpu():
  with pytest.raises(ValueError, match="kernel='flash': there is no flash kernel for cpu"):
    attend("flash", *arrays(T=128), SCALE)


@pytest.mark.parametrize(
  ("where", "capability", "shape", "dtype", "reason"),
  [
    ("tpu", None, {"T": 100}, "bfloat16", "a multiple of 128 positions, not 100"),
    ("gpu", 9.0, {"T": 128}, "float32", "16-bit numbers, not float32"),
    ("gpu", 9.0, {"T": 128, "K": 20}, "bfloat16", "a multiple of 8 up to 256, .*not 20"),
    ("gpu", 9.0, {"T": 128, "V": 32}, "bfloat16", "no narrower than the value's 32, not 24"),
    ("gpu", 8.0, {"T": 128, "K": 192}, "bfloat16", "8.0 query heads of .* up to 128, .*not 192"),
    ("gpu", 8.9, {"T": 128, "K": 192}, "bfloat16", "8.9 query heads of .* up to 128, .*not 192"),
    ("gpu", 10.0, {"T": 128, "K": 192}, "bfloat16", "10.0 query heads of .* up to 128, .*not 192"),
    ("gpu", 7.5, {"T": 128}, "bfloat16", "compute capability 8.0 and later, not one of 7.5"),
    ("gpu", None, {"T": 128}, "bfloat16", "not another maker's GPU"),
  ],
)
def test_flash_says_what_a_kernel_does_not_take_and_auto_does_without(
  monkeypatch, where, capability, shape, dtype, reason
):
  monkeypatch.setattr(attention_kernels, "platform", lambda mesh: where)
  monkeypatch.setattr(attention_kernels, "compute_capability", lambda mesh: capability)
  args = arrays(dtype=dtype, **shape)
  with pytest.raises(ValueError, match=reason):
    attend("flash", *args, SCALE)
  np.testing.assert_array_equal(attend("auto", *args, SCALE), attention(*args, SCALE))


@pytest.mark.parametrize(("capability", "width"), [(8.0, 128), (8.9, 64), (9.0, 256), (10.0, 128)])
def test_flash_on_gpus_is_cudnn(monkeypatch, capability, width):
  monkeypatch.setattr(attention_kernels, "platform", lambda mesh: "gpu")
  monkeypatch.setattr(attention_kernels, "compute_capability", lambda mesh: capability)
  monkeypatch.setattr(attention_kernels, "cudnn_attention", lambda *args, scale: "cuDNN")
  for kernel in ("auto", "flash"):
    assert attend(kernel, *arrays(dtype="bfloat16", T=128, K=width), SCALE) == "cuDNN"


@pytest.mark.parametrize(
  ("T", "block"), [(128, 128), (256, 256), (384, 384), (640, 128), (4096, 512)]
)
def test_blocks_divide_the_sequence(T, block):
  sizes = attention_kernels._block_sizes(T)
  assert sizes.block_q == sizes.block_kv_dkv == block
