"""Truths about the Engram module: the released demo's numbers, the reference's, causality."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import EngramConfig
from engram_jax.memory.engram import Engram
from engram_jax.memory.engram_ops import gate
from engram_jax.memory.reference import engram_reference

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "module_tiny_hc4.npz"
B, T, D = 2, 12, 8


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
  with np.load(GOLDEN) as arrays:
    return dict(arrays)


def small(branches=2, **fields):
  """An Engram with every parameter random, and its inputs."""
  fields = {"max_ngram": 3, "heads": 2, "row_width": 3, "rows_per_head": 50} | fields
  engram = Engram(EngramConfig(**fields), D, branches, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(engram)
  params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.3 * random(1, x.shape)), params)
  engram = nnx.merge(graphdef, params)
  return engram, random(2, (B, T, branches, D)), random(3, (B, T, engram.cfg.memory_width))


def random(seed, shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def run_split(graphdef, params, *inputs):
  return nnx.merge(graphdef, params)(*inputs)


def run(engram, *inputs):
  """engram(*inputs), compiled."""
  return run_split(*nnx.split(engram), *inputs)


def value_and_grads(call, engram, hidden, rows, weight, segments=None):
  """delta, gate, and the gradients of sum(delta * weight) + sum(gate^2)."""
  graphdef, params = nnx.split(engram)

  def loss(params, hidden, rows):
    delta, probes = call(nnx.merge(graphdef, params), hidden, rows, segments)
    return jnp.sum(delta * weight) + jnp.sum(probes["gate"] ** 2), (delta, probes["gate"])

  grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(params, hidden, rows)
  return out, (nnx.to_pure_dict(grads[0]), *grads[1:])


# Against the released demo


def golden_engram(golden) -> Engram:
  cfg = EngramConfig(max_ngram=3, heads=2, row_width=6, rows_per_head=(101, 131), bias=True)
  engram = Engram(cfg, 16, 4, rngs=nnx.Rngs(0))
  for name, value in from_torch(golden, "param/").items():
    param = getattr(engram, name)
    chex.assert_shape(param[...], value.shape)
    param[...] = jnp.asarray(value)
  return engram


def from_torch(golden, prefix) -> dict[str, np.ndarray]:
  """The demo's arrays (linear weights [out, in], conv [G*D, 1, W]) under this module's names."""
  stack = lambda name: np.stack([golden[f"{prefix}{name.format(g)}"] for g in range(4)])
  return {
    "w_key": stack("key_projs.{}.weight").transpose(2, 0, 1),
    "b_key": stack("key_projs.{}.bias"),
    "w_value": golden[f"{prefix}value_proj.weight"].T,
    "b_value": golden[f"{prefix}value_proj.bias"],
    "g_key": stack("norm1.{}.weight"),
    "g_query": stack("norm2.{}.weight"),
    "g_conv": stack("short_conv.norms.{}.weight"),
    "w_conv": golden[f"{prefix}short_conv.conv.weight"].reshape(4, 16, 4).transpose(2, 0, 1),
  }


@pytest.fixture(scope="module")
def golden_run(golden):
  """delta, gate, and gradients of sum(delta * loss_weight) by parameter, hidden state and table."""
  graphdef, params = nnx.split(golden_engram(golden))
  ids = golden["mid/hash_ids"] + golden["buffer/multi_head_embedding.offsets"]
  table = jnp.asarray(golden["param/multi_head_embedding.embedding.weight"])

  def loss(params, hidden, table):
    delta, probes = nnx.merge(graphdef, params)(hidden, table[ids].reshape(*ids.shape[:2], -1))
    return jnp.sum(delta * golden["loss_weight"]), (delta, probes["gate"])

  grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
  grads, (delta, gates) = grad(params, jnp.asarray(golden["hidden_states"]), table)
  by_name = nnx.to_pure_dict(grads[0]) | {"hidden_states": grads[1], "table": grads[2]}
  return delta, gates, {name: np.asarray(value) for name, value in by_name.items()}


def test_forward_equals_the_demo(golden, golden_run):
  delta, gates, _ = golden_run
  np.testing.assert_allclose(delta, golden["output"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(delta, golden["output_f64"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(gates, golden["mid_f64/gates"][..., 0], rtol=0, atol=1e-6)


def test_gradients_equal_the_demo(golden, golden_run):
  for prefix in ("grad/", "grad_f64/"):
    expected = from_torch(golden, prefix) | {
      "hidden_states": golden[f"{prefix}hidden_states"],
      "table": golden[f"{prefix}multi_head_embedding.embedding.weight"],
    }
    _, _, grads = golden_run
    assert grads.keys() == expected.keys()
    for name, value in expected.items():
      # Where hidden_states is 1e-6 of the rest its gradient is 1e6 of the rest.
      scale = np.abs(value).max(-1, keepdims=True) if name == "hidden_states" else 1
      np.testing.assert_allclose(
        grads[name] / np.maximum(scale, 1), value / np.maximum(scale, 1), 1e-4, 5e-5, err_msg=name
      )


@pytest.mark.parametrize("length", [1, 2, 3])
def test_shorter_than_the_convolution(golden, length):
  rows = golden["mid/embeddings"][:, :length]
  engram = golden_engram(golden)
  hidden = jnp.asarray(golden["hidden_states"][:, :length])
  delta, _ = run(engram, hidden, jnp.asarray(rows))
  np.testing.assert_allclose(delta, golden[f"output_T{length}"], rtol=0, atol=1e-5)


def test_bfloat16_hidden(golden):
  engram = golden_engram(golden)
  hidden = jnp.asarray(golden["hidden_states"], jnp.bfloat16)
  delta, probes = run(engram, hidden, jnp.asarray(golden["mid/embeddings"]))
  assert delta.dtype == jnp.bfloat16
  assert probes["gate"].dtype == jnp.float32
  np.testing.assert_allclose(delta.astype(jnp.float32), golden["output_f64"], rtol=0, atol=0.1)


# Against the reference

VARIANTS = {
  "one branch": {"branches": 1},
  "bias, sigmoid": {"branches": 2, "bias": True, "gate": "sigmoid"},
  "four branches, bigrams": {"branches": 4, "max_ngram": 2, "heads": 3},
  "4-grams, three taps": {"branches": 2, "max_ngram": 4, "heads": 1, "conv_kernel": 3},
  "no convolution": {"branches": 2, "conv_kernel": 0, "bias": True},
  "no gate": {"branches": 2, "gate": "none", "bias": True},
  "rows as they are": {
    "branches": 2,
    "gate": "none",
    "projections": False,
    "conv_kernel": 0,
    "row_width": 2,
  },
  "documents": {"branches": 2, "segments": True},
  "documents ignored": {"branches": 1, "segments": True, "reset_at_documents": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_reference(name):
  fields = dict(VARIANTS[name])
  segments = jnp.asarray([[0] * 4 + [1] * 8, [0] + [1] * 5 + [2] * 6])
  segments = segments if fields.pop("segments", False) else None
  engram, hidden, rows = small(**fields)
  weight = random(4, hidden.shape)
  fast = value_and_grads(Engram.__call__, engram, hidden, rows, weight, segments)
  plain = value_and_grads(engram_reference, engram, hidden, rows, weight, segments)
  # Near s = 0 the square root magnifies rounding, so gradients are held to their largest entry.
  chex.assert_trees_all_equal_structs(fast, plain)
  for ours, theirs in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


# Truths of its own


def test_delta_is_causal():
  engram, hidden, rows = small()

  @jax.jit
  def reaches(t):
    picked = lambda h, r: jnp.sum(engram(h, r)[0][:, t] * random(5, (B, 2, D)))
    return [
      jnp.abs(g).reshape(B, T, -1).sum((0, 2)) for g in jax.grad(picked, (0, 1))(hidden, rows)
    ]

  for t in (0, 5, T - 1):
    by_hidden, by_rows = map(np.asarray, reaches(t))
    taps = [t - j * engram.cfg.max_ngram for j in range(engram.cfg.conv_kernel)]
    expected = [t_ in taps for t_ in range(T)]
    np.testing.assert_array_equal(by_hidden > 0, expected)
    np.testing.assert_array_equal(by_rows > 0, expected)


def test_packed_documents_equal_documents_apart():
  engram, hidden, rows = small(max_ngram=2)
  segments = jnp.asarray([[0] * 3 + [1] * 9] * B)
  documents = (slice(0, 3), slice(3, T))
  apart = [run(engram, hidden[:, part], rows[:, part])[0] for part in documents]
  packed, _ = run(engram, hidden, rows, segments)
  np.testing.assert_allclose(packed, jnp.concatenate(apart, 1), rtol=0, atol=1e-6)


def test_training_starts_without_the_convolution():
  cfg = EngramConfig(max_ngram=3, heads=2, row_width=3)
  engram = Engram(cfg, D, 2, rngs=nnx.Rngs(0))
  without = Engram(cfg.model_copy(update={"conv_kernel": 0}), D, 2, rngs=nnx.Rngs(0))
  _, hidden, rows = small()
  np.testing.assert_allclose(
    run(engram, hidden, rows)[0], run(without, hidden, rows)[0], rtol=0, atol=1e-7
  )


def test_a_zero_hidden_state_opens_the_gate_half():
  engram, hidden, rows = small()
  hidden[0, 2] = 0
  (_, gates), grads = value_and_grads(Engram.__call__, engram, hidden, rows, 1.0)
  np.testing.assert_array_equal(gates[0, 2], 0.5)
  chex.assert_tree_all_finite(grads)


def test_gate_is_flat_below_the_floor_and_finite_everywhere():
  slope = jax.vmap(jax.grad(functools.partial(gate, kind="signed_sqrt")))
  np.testing.assert_array_equal(slope(jnp.asarray([0.0, 1e-7, -1e-7])), 0)
  np.testing.assert_allclose(slope(jnp.asarray([4.0, -4.0])), 0.25 * 0.1049936, rtol=1e-5)


def test_parameters_are_the_ones_named():
  engram, _, _ = small(branches=2, bias=True)
  shapes = {name: value.shape for name, value in nnx.to_pure_dict(nnx.state(engram)).items()}
  M = engram.cfg.memory_width
  assert shapes == {
    "w_key": (M, 2, D),
    "b_key": (2, D),
    "w_value": (M, D),
    "b_value": (D,),
    "g_key": (2, D),
    "g_query": (2, D),
    "g_conv": (2, D),
    "w_conv": (4, 2, D),
  }
  names = lambda engram: set(nnx.to_pure_dict(nnx.state(engram)))
  bare, _, _ = small(conv_kernel=0)
  assert names(bare) == {"w_key", "w_value", "g_key", "g_query"}
  ungated, _, _ = small(conv_kernel=0, gate="none", bias=True)
  assert names(ungated) == {"w_value", "b_value"}


def test_without_gate_projections_and_convolution_the_rows_are_added_to_every_branch():
  engram, hidden, rows = small(gate="none", projections=False, conv_kernel=0, row_width=2)
  delta, probes = run(engram, hidden, rows)
  np.testing.assert_array_equal(delta, np.broadcast_to(rows[:, :, None], delta.shape))
  np.testing.assert_array_equal(probes["gate"], 1.0)
  assert not nnx.to_pure_dict(nnx.state(engram))
  with pytest.raises(ValueError, match="rows of 12 numbers a token are no value of width=8"):
    small(gate="none", projections=False)


def test_rows_by_column_are_taken_too():
  engram, hidden, rows = small()
  by_column = rows.reshape(B, T, engram.cfg.hash_heads, -1)
  np.testing.assert_array_equal(run(engram, hidden, by_column)[0], run(engram, hidden, rows)[0])


def test_shapes_that_do_not_fit_are_refused():
  engram, hidden, rows = small()
  with pytest.raises(ValueError, match=r"hidden has shape .* G=2, D=8"):
    engram(hidden[..., :-1], rows)
  with pytest.raises(ValueError, match=r"rows have shape .* M=12"):
    engram(hidden, rows[..., :-1])
  with pytest.raises(ValueError, match="segments have shape"):
    engram(hidden, rows, jnp.zeros((B, T + 1), jnp.int32))
