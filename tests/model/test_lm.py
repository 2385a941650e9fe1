"""The language model: causality by gradient, packing, the memory's part, gradients at the start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig, MoEConfig, ResidualConfig
from engram_jax.model.lm import LM
from engram_jax.model.router import RouterBias

T = 8
V = T * T  # in a batch of T windows of distinct tokens, each embedding row is one position
CFG = ModelConfig(
  vocab_size=V,
  width=8,
  layers=2,
  dtype="float32",
  attention=AttentionConfig(heads=2, latent=4, nope_dim=4, rope_dim=4, value_dim=4),
  moe=MoEConfig(routed_experts=3, top_k=2, expert_width=6, leading_dense_layers=1, dense_width=12),
  engram=EngramConfig(
    layers=(0, 1), max_ngram=2, heads=2, row_width=3, rows_per_head=50, conv_kernel=3
  ),
)
ONE_STREAM = CFG.model_copy(update={"residual": ResidualConfig(branches=1)})
M = CFG.engram.memory_width
TOKENS = np.arange(T * T, dtype=np.int32).reshape(T, T)
ONE_DOCUMENT = (np.zeros((T, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (T, 1)))


def random(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


ROWS = (random(1, T, T, M), random(2, T, T, M))
NO_HIDDEN, NO_LOGITS = np.zeros((T, T, CFG.width), np.float32), np.zeros((T, T, V), np.float32)


def random_model(cfg: ModelConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """Every parameter random, convolutions too; drawn here because initialisers take compiling."""
  shapes = nnx.eval_shape(lambda: LM(cfg, rngs=nnx.Rngs(0)))
  graphdef, params, biases = nnx.split(shapes, nnx.Param, RouterBias)
  params = jax.tree.map(lambda p: jnp.asarray(0.4 * random(p.size, *p.shape)), params)
  return graphdef, params, jax.tree.map(lambda b: jnp.zeros(b.shape), biases)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, biases, tokens_BT, rows=()):
  lm = nnx.merge(graphdef, params, biases)
  hidden_BTD, probes = lm(tokens_BT, rows)
  return hidden_BTD, lm.logits(hidden_BTD), probes


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, params, biases, tokens_BT, rows, segments_BT, positions_BT, cotangents):
  def call(params, rows):
    lm = nnx.merge(graphdef, params, biases)
    hidden, probes = lm(tokens_BT, rows, segments_BT=segments_BT, positions_BT=positions_BT)
    return (hidden, lm.logits(hidden)), probes

  (hidden, _), pullback, probes = jax.vjp(call, params, rows, has_aux=True)
  return hidden, probes, pullback(cotangents)


def run(
  model, tokens=TOKENS, rows=ROWS, window=ONE_DOCUMENT, d_hidden=NO_HIDDEN, d_logits=NO_LOGITS
):
  """hidden, probes, and the gradients of (parameters, rows); one program for every test."""
  return _run(*model, tokens, tuple(rows), *window, (d_hidden, d_logits))


@pytest.fixture(scope="module", params=[CFG, ONE_STREAM], ids=["four_streams", "one_stream"])
def either(request):
  return random_model(request.param)


@pytest.fixture(scope="module")
def model():
  return random_model(CFG)


def test_hidden_states_depend_on_the_past_and_on_nothing_later(either):
  d_hidden = np.eye(T, dtype=np.float32)[:, :, None] * random(3, T, T, CFG.width)  # t of window t
  _, _, (dparams, drows) = run(either, d_hidden=d_hidden)
  past = np.tri(T, dtype=bool)
  dtoken = np.asarray(dparams["embedding"][...]).reshape(T, T, CFG.width)
  np.testing.assert_array_equal(np.any(dtoken != 0, axis=-1), past)
  for grad in drows:
    np.testing.assert_array_equal(np.any(np.asarray(grad) != 0, axis=-1), past)


def test_the_convolution_reaches_back_two_dilated_steps(model):
  """Without it, memory 1 would reach position t from t - 4 only through attention."""
  graphdef, params, biases = model
  cut = jax.tree_util.tree_map_with_path(
    lambda path, p: 0 * p if "w_out" in jax.tree_util.keystr(path) else p, params
  )
  d_hidden = np.eye(T, dtype=np.float32)[:, :, None] * random(3, T, T, CFG.width)
  _, _, (_, drows) = run((graphdef, cut, biases), d_hidden=d_hidden)
  taps = np.eye(T, dtype=bool) | np.eye(T, k=-2, dtype=bool) | np.eye(T, k=-4, dtype=bool)
  np.testing.assert_array_equal(np.any(np.asarray(drows[1]) != 0, axis=-1), taps)


def test_packed_documents_equal_the_documents_apart(either):
  rows = [array.copy() for array in ROWS]
  tokens = TOKENS.copy()
  for array in (tokens, *rows):
    array[1, :3], array[2, :5] = array[0, :3], array[0, 3:]  # what follows them is never seen
  segments, positions = (array.copy() for array in ONE_DOCUMENT)
  segments[0, 3:], positions[0, 3:] = 1, np.arange(5)
  hidden, probes, _ = run(either, tokens, rows, (segments, positions))
  for got in (hidden, *probes["gate"], *probes["hidden"]):
    np.testing.assert_allclose(got[0, :3], got[1, :3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[0, 3:], got[2, :5], rtol=1e-4, atol=1e-5)
  one_document, _, _ = run(either, tokens, rows, (ONE_DOCUMENT[0], positions))
  assert np.abs(one_document[0, 3:] - hidden[0, 3:]).max() > 1e-2


@pytest.fixture(scope="module")
def without_memory(model):
  """hidden, logits and probes of the model with its memories cut out, its window by default."""
  graphdef, bare, biases = random_model(CFG.model_copy(update={"engram": EngramConfig()}))
  shared = dict(nnx.to_flat_state(model[1]))
  bare = nnx.from_flat_state([(path, shared[path]) for path, _ in nnx.to_flat_state(bare)])
  return forward(graphdef, bare, biases, TOKENS)


def test_rows_of_zeros_leave_the_model_without_its_memory(model, without_memory):
  want, _, probes = without_memory
  assert probes["gate"] == ()
  zeros, _, _ = run(model, rows=[np.zeros_like(array) for array in ROWS])
  np.testing.assert_allclose(zeros, want, rtol=1e-5, atol=1e-5)
  with_memory, _, _ = run(model)
  assert np.abs(with_memory - want).max() > 1e-2


def test_logits_are_the_hidden_state_times_the_head(model, without_memory):
  hidden, logits, _ = without_memory
  np.testing.assert_allclose(logits, hidden @ model[1]["head"][...], rtol=1e-4, atol=1e-4)


def test_at_the_start_only_the_convolution_norm_has_no_gradient(model):
  def start():
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles faster
    return nnx.split(LM(CFG, rngs=nnx.Rngs(key)), nnx.Param, RouterBias)[1:]

  cotangents = {"d_hidden": random(3, *NO_HIDDEN.shape), "d_logits": random(4, *NO_LOGITS.shape)}
  hidden, _, (dparams, drows) = run((model[0], *jax.jit(start)()), **cotangents)
  assert np.isfinite(hidden).all()
  grads = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(dparams)}
  assert [path for path, grad in grads.items() if not np.isfinite(grad).all()] == []
  zero = {path for path, grad in grads.items() if not grad.any()}
  # g_conv multiplies w_conv, and w_conv starts at zero.
  assert zero == {("blocks", layer, "engram", "g_conv") for layer in (0, 1)}
  for grad in drows:
    assert np.isfinite(grad).all()
    assert np.any(np.asarray(grad) != 0, axis=-1).all()


def test_probes(either):
  hidden, probes, _ = run(either)
  streams = either[1]["blocks"][0]["engram"]["g_key"].shape[0]
  assert set(probes) == {"gate", "load", "hidden"}
  assert [gate.shape for gate in probes["gate"]] == [(T, T, streams)] * 2
  assert all(((gate > 0) & (gate < 1)).all() for gate in probes["gate"])
  (load,) = probes["load"]
  assert (load.shape, load.dtype) == ((3,), jnp.float32)
  np.testing.assert_allclose(load.sum(), 1, rtol=1e-6)
  assert [h.shape for h in probes["hidden"]] == [(T, T, CFG.width)] * 2
  last = np.asarray(probes["hidden"][-1])
  scale = np.sqrt(np.mean(last**2, -1, keepdims=True) + CFG.norm_eps)
  np.testing.assert_allclose(hidden, last / scale * either[1]["g_final"][...], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_rows_than_memories_is_refused(model, count: int):
  with pytest.raises(ValueError, match=rf"{count} arrays of rows for 2 memories"):
    nnx.merge(*model)(TOKENS, (ROWS[0],) * count)


def test_a_tied_head_is_the_embedding():
  tied = nnx.merge(*random_model(CFG.model_copy(update={"tie_embeddings": True})))
  np.testing.assert_array_equal(tied.head_DV, tied.embedding[...].T)
  assert tied.head is None


def test_bfloat16_and_rows_per_column_are_near_float32(model):
  graphdef, _, _ = random_model(CFG.model_copy(update={"dtype": "bfloat16"}))
  columns = tuple(array.reshape(T, T, CFG.engram.hash_heads, -1) for array in ROWS)
  hidden, logits, probes = forward(graphdef, *model[1:], TOKENS, columns)
  want, _, _ = run(model)
  assert hidden.dtype == probes["hidden"][0].dtype == jnp.bfloat16
  assert logits.dtype == probes["gate"][0].dtype == probes["load"][0].dtype == jnp.float32
  error = np.linalg.norm(hidden.astype(jnp.float32) - want, axis=-1) / np.linalg.norm(want, axis=-1)
  assert np.median(error) < 0.05
