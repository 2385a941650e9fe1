"""Latent attention against a head-by-head reference; rotary positions, YaRN, and the norm."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import AttentionConfig, YarnConfig
from engram_jax.model.attention_kernels import attention
from engram_jax.model.layers import frequencies, logit_factor, rms_norm, rotate
from engram_jax.model.mla import LatentAttention

T, D, EPS = 7, 6, 1e-6
YARN = YarnConfig(scale=4, alpha=1, beta=8, original_length=32)
CONFIGS = {
  "plain_query": AttentionConfig(heads=2, latent=5, nope_dim=3, rope_dim=4, value_dim=5),
  "latent_query": AttentionConfig(
    heads=3, latent=4, query_latent=5, nope_dim=2, rope_dim=4, value_dim=3, yarn=YARN
  ),
}


def random(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
  """Segments and positions of one window that holds documents of these lengths."""
  segments = np.repeat(np.arange(len(lengths)), lengths)
  return segments, np.concatenate([np.arange(n) for n in lengths])


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, params, x_BTD, segments_BT, positions_BT, dy_BTD):
  call = lambda x: nnx.merge(graphdef, params)(x, segments_BT, positions_BT)
  y_BTD, pullback = jax.vjp(call, x_BTD)
  return y_BTD, pullback(dy_BTD)[0]


class Case:
  """An attention with random parameters; `run` compiles once, for a batch of T windows."""

  def __init__(self, cfg: AttentionConfig):
    self.cfg = cfg
    shapes = nnx.eval_shape(lambda: LatentAttention(cfg, D, 1.0, EPS, rngs=nnx.Rngs(0)))
    self.graphdef, params = nnx.split(shapes)
    self.params = jax.tree.map(lambda p: jnp.asarray(0.7 * random(p.size, *p.shape)), params)

  def run(self, x, segments, positions, dy):
    return _run(self.graphdef, self.params, x, segments, positions, dy)


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request) -> Case:
  return Case(CONFIGS[request.param])


def reference(cfg: AttentionConfig, params: dict, x_TD, segments_T, positions_T) -> np.ndarray:
  """One window: a matrix per head, a sum per position and per earlier position, in float64."""
  p = {name: np.asarray(value, np.float64) for name, value in params.items()}
  x_TD = x_TD.astype(np.float64)
  norm = lambda z, gain: gain * z / np.sqrt(np.mean(z**2, -1, keepdims=True) + EPS)
  turns = frequencies(cfg.rope_dim, cfg.rope_base, cfg.yarn).astype(np.float64)

  def turned(z, position):
    as_complex = (z[: cfg.rope_dim // 2] + 1j * z[cfg.rope_dim // 2 :]) * np.exp(
      1j * position * turns
    )
    return np.concatenate([as_complex.real, as_complex.imag])

  latent = norm(x_TD @ p["w_latent"], p["g_latent"])
  scale = (0.1 * 0.707 * math.log(cfg.yarn.scale) + 1) ** 2 / math.sqrt(cfg.nope_dim + cfg.rope_dim)
  y_TD = np.zeros_like(x_TD)
  for h in range(cfg.heads):
    if cfg.query_latent:
      query = norm(x_TD @ p["w_query_down"], p["g_query"]) @ p["w_query_up"][:, h]
    else:
      query = x_TD @ p["w_query"][:, h]
    key, value = latent @ p["w_key_up"][:, h], latent @ p["w_value_up"][:, h]
    for t in range(len(x_TD)):
      seen = [s for s in range(t + 1) if segments_T[s] == segments_T[t]]
      turned_query = turned(query[t, cfg.nope_dim :], positions_T[t])
      logits = [
        query[t, : cfg.nope_dim] @ key[s]
        + turned_query @ turned(x_TD[s] @ p["w_key_rope"], positions_T[s])
        for s in seen
      ]
      weights = np.exp(scale * np.array(logits))
      y_TD[t] += weights / weights.sum() @ value[seen] @ p["w_out"][h]
  return y_TD


def test_attention_equals_a_reference_of_separate_heads(case):
  x = random(0, T, T, D)
  windows = [packed(*lengths) for lengths in [(7,), (3, 4), (1, 5, 1)] + [(7,)] * (T - 3)]
  segments, positions = (np.stack(arrays) for arrays in zip(*windows, strict=True))
  y, _ = case.run(x, segments, positions, np.zeros_like(x))
  params = nnx.to_pure_dict(case.params)
  for b in range(3):
    want = reference(case.cfg, params, x[b], segments[b], positions[b])
    np.testing.assert_allclose(y[b], want, rtol=1e-4, atol=1e-4)


def test_a_position_depends_on_what_precedes_it_and_on_nothing_after(case):
  segments, positions = (np.tile(a, (T, 1)) for a in packed(T))
  one_position = np.eye(T)[:, :, None] * random(1, T, T, D)  # window t: the gradient of output t
  _, dx = case.run(random(0, T, T, D), segments, positions, one_position.astype(np.float32))
  np.testing.assert_array_equal(np.any(np.asarray(dx) != 0, axis=-1), np.tri(T, dtype=bool))


def test_packed_documents_equal_the_documents_apart(case):
  x = random(0, T, T, D)
  x[1, :3], x[2, :4] = x[0, :3], x[0, 3:]  # what follows them is never seen
  windows = [packed(3, 4)] + [packed(T)] * (T - 1)
  segments, positions = (np.stack(arrays) for arrays in zip(*windows, strict=True))
  y, _ = case.run(x, segments, positions, np.zeros_like(x))
  np.testing.assert_allclose(y[0, :3], y[1, :3], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(y[0, 3:], y[2, :4], rtol=1e-5, atol=1e-5)
  one_document, _ = case.run(x, np.zeros_like(segments), positions, np.zeros_like(x))
  assert np.abs(one_document[0, 3:] - y[0, 3:]).max() > 1e-2


def test_a_position_alone_in_its_document_reads_itself():
  query, key, value = (1e4 * random(seed, 2, T, 3, 4) for seed in range(3))
  segments = np.tile(np.arange(T), (2, 1))
  np.testing.assert_array_equal(jax.jit(attention)(query, key, value, segments, 1.0), value)


def test_rotation_keeps_only_the_distance_of_positions():
  turns = frequencies(8, 100.0, YarnConfig())
  at = lambda z, position: rotate(z[None, :, None], np.asarray([position]), turns)[0, :, 0]
  query, key = random(0, 2, 8)[:, None]
  dot = lambda m, n: float(np.vdot(at(query, [m]), at(key, [n])))
  assert dot(9, 4) == pytest.approx(dot(5, 0), abs=1e-5)
  assert dot(9, 4) != pytest.approx(dot(9, 5), abs=1e-2)
  np.testing.assert_array_equal(at(query, [0]), query)
  assert np.linalg.norm(at(query, [1000])) == pytest.approx(np.linalg.norm(query), rel=1e-5)


def test_frequencies_of_plain_rotary_positions():
  want = [10_000.0 ** (-i / 16) for i in range(0, 16, 2)]
  np.testing.assert_allclose(frequencies(16, 10_000.0, YarnConfig()), want, rtol=1e-6)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
  yarn = YarnConfig(scale=10, alpha=1, beta=32, original_length=4096)
  plain, stretched = frequencies(64, 1e4, YarnConfig()), frequencies(64, 1e4, yarn)
  turns = 4096 * plain / (2 * math.pi)
  fast, slow = turns > 32, turns < 1
  between = ~fast & ~slow
  assert fast.any()
  assert slow.any()
  assert between.any()
  np.testing.assert_array_equal(stretched[fast], plain[fast])
  np.testing.assert_allclose(stretched[slow], plain[slow] / 10, rtol=1e-6)
  share = ((plain - stretched) / (plain - plain / 10))[between]
  np.testing.assert_allclose(share, (32 - turns[between]) / 31, rtol=1e-4)


def test_yarn_scales_logits_only_when_it_stretches():
  assert logit_factor(YarnConfig()) == 1
  want = (0.1 * 0.5 * math.log(10) + 1) ** 2
  assert logit_factor(YarnConfig(scale=10, attention_factor=0.5)) == pytest.approx(want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_and_its_gradients_equal_the_formula(dtype):
  def formula(x, gain):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide**2, -1, keepdims=True)
    return (gain * wide / jnp.sqrt(mean + 1e-2)).astype(x.dtype)

  def value_and_grads(norm, *args):
    y, pullback = jax.vjp(norm, *args)
    return y, *pullback(dy)

  x, gain, dy = jnp.asarray(random(0, 3, 4, D), dtype), random(1, D), random(2, 3, 4, D)
  dy = jnp.asarray(dy, dtype)
  got = jax.jit(functools.partial(value_and_grads, lambda x, g: rms_norm(x, g, 1e-2)))(x, gain)
  want = jax.jit(functools.partial(value_and_grads, formula))(x, gain)
  assert [a.dtype for a in got] == [dtype, dtype, jnp.float32]
  tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
  chex.assert_trees_all_close(got, want, rtol=tolerance, atol=tolerance)


def test_norm_of_zeros_is_zero_with_a_finite_gradient():
  loss = lambda x: jnp.sum(rms_norm(x, jnp.ones(D), 1e-6))
  value, dx = jax.jit(jax.value_and_grad(loss))(jnp.zeros((2, D)))
  assert value == 0
  assert np.isfinite(dx).all()
