"""The chunked loss is the plain one: values, gradients, masks, dtypes, and what it never makes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.training.loss import chunked_cross_entropy, cross_entropy_reference

B, T, D, V = 2, 7, 8, 19


def _inputs(dtype=jnp.float32, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  hidden = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
  head = 0.5 * jax.random.normal(keys[1], (D, V))
  targets = jax.random.randint(keys[2], (B, T), 0, V)
  return hidden, head, targets, jax.random.bernoulli(keys[3], 0.7, (B, T))


@functools.partial(jax.jit, static_argnames=("loss", "chunk", "z_loss"))
def _grads(loss, hidden, head, targets, mask, chunk=4, z_loss=0.0):
  def mean(hidden, head):
    total, aux = loss(hidden, head, targets, mask, chunk=chunk, z_loss=z_loss)
    return total / jnp.maximum(aux["tokens"], 1.0), aux

  return jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(hidden, head)


@pytest.mark.parametrize(("chunk", "z_loss"), [(1, 0.1), (4, 0.0), (6, 0.1), (1000, 0.0)])
def test_equals_the_reference_in_value_and_gradient(chunk, z_loss):
  inputs = _inputs()
  ours = _grads(chunked_cross_entropy, *inputs, chunk=chunk, z_loss=z_loss)
  plain = _grads(cross_entropy_reference, *inputs, z_loss=z_loss)
  chex.assert_trees_all_close(ours, plain, rtol=1e-5, atol=1e-6)
  assert ours[0][1]["tokens"] == inputs[3].sum()
  assert (ours[0][1]["z_sum"] > 0) == (z_loss > 0)


def test_evaluation_equals_training():
  """The primal alone (no gradient work) and the differentiated forward give the same numbers."""
  inputs = _inputs()
  total, aux = jax.jit(chunked_cross_entropy, static_argnames=("chunk", "z_loss"))(
    *inputs, chunk=6, z_loss=0.1
  )
  (mean, trained), _ = _grads(chunked_cross_entropy, *inputs, chunk=6, z_loss=0.1)
  chex.assert_trees_all_close((total / aux["tokens"], aux), (mean, trained), rtol=1e-6)
  np.testing.assert_allclose(aux["nll_BT"].sum(), aux["nll_sum"], rtol=1e-6)
  np.testing.assert_allclose(total, aux["nll_sum"] + aux["z_sum"], rtol=1e-6)


def test_bfloat16_hidden_accumulates_in_float32():
  hidden, head, targets, mask = _inputs(jnp.bfloat16)
  (ours, aux), (d_hidden, d_head) = _grads(chunked_cross_entropy, hidden, head, targets, mask)
  (plain, _), (e_hidden, e_head) = _grads(
    cross_entropy_reference, hidden.astype(jnp.float32), head, targets, mask
  )
  assert ours.dtype == aux["nll_BT"].dtype == jnp.float32
  assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(ours, plain, rtol=1e-2)
  np.testing.assert_allclose(d_hidden.astype(jnp.float32), e_hidden, atol=2e-3)
  np.testing.assert_allclose(d_head, e_head, atol=2e-3)


def test_masked_tokens_carry_no_gradient_and_their_targets_are_not_read():
  hidden, head, targets, mask = _inputs()
  (loss, aux), (d_hidden, d_head) = _grads(
    chunked_cross_entropy, hidden, head, targets, mask, chunk=6, z_loss=0.1
  )
  seen, d_hidden_BTD = np.asarray(mask), np.asarray(d_hidden)
  assert (d_hidden_BTD[~seen] == 0).all()
  assert (d_hidden_BTD[seen] != 0).any(axis=-1).all()
  assert (np.asarray(aux["nll_BT"])[~seen] == 0).all()
  other = jnp.where(mask, targets, V + 5)
  again = _grads(chunked_cross_entropy, hidden, head, other, mask, chunk=6, z_loss=0.1)
  chex.assert_trees_all_equal(((loss, aux), (d_hidden, d_head)), again)


def test_a_window_without_targets_is_finite():
  hidden, head, targets, _ = _inputs()
  nothing = jnp.zeros((B, T), bool)
  (loss, aux), grads = _grads(chunked_cross_entropy, hidden, head, targets, nothing)
  assert loss == 0
  assert aux["tokens"] == 0
  chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


def test_extreme_logits_stay_finite():
  hidden, head, targets, mask = _inputs()
  out = _grads(chunked_cross_entropy, 1e4 * hidden, 1e4 * head, targets, mask)
  chex.assert_tree_all_finite(out)


def test_an_unmasked_target_outside_the_vocabulary_is_not_silent():
  hidden, head, targets, _ = _inputs()
  everything = jnp.ones((B, T), bool)
  (loss, _), _ = _grads(chunked_cross_entropy, hidden, head, targets.at[0, 0].set(V), everything)
  assert np.isnan(loss)


def test_aux_carries_no_gradient():
  hidden, head, targets, mask = _inputs()
  d_head = jax.grad(
    lambda head: chunked_cross_entropy(hidden, head, targets, mask, chunk=4)[1]["nll_BT"].sum()
  )(head)
  assert (d_head == 0).all()


def test_three_products_a_chunk_in_training_and_one_in_evaluation():
  """Nothing is computed twice, and no array holds the logits of more than a chunk."""
  inputs = _inputs()
  evaluation = jax.make_jaxpr(lambda *a: chunked_cross_entropy(*a, chunk=4))(*inputs)
  training = jax.make_jaxpr(lambda *a: _grads(chunked_cross_entropy, *a, chunk=4))(*inputs)
  assert str(evaluation).count("dot_general") == 1
  assert str(training).count("dot_general") == 3
  for jaxpr in (evaluation, training):
    assert f"{B},2,{V}]" in str(jaxpr)
    assert f"{B},{T},{V}]" not in str(jaxpr)


def test_chunk_must_hold_a_token():
  with pytest.raises(ValueError, match="chunk=0"):
    chunked_cross_entropy(*_inputs(), chunk=0)
