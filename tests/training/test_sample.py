"""Continuations: greedy ones are the full forward's argmax, whatever else is in the batch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from engram_jax.config import load_config
from engram_jax.errors import ConfigError
from engram_jax.inference.completion import encode_prompts
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.table import lookup
from engram_jax.memory.vocabulary import Vocabulary
from engram_jax.training.sample import complete, generate, make_next_logits
from engram_jax.training.state import TrainSetup, TrainState, init_state, make_setup

PROMPTS = ([5, 6, 7], [40, 41, 42, 43, 44, 45, 46, 47, 48], [299])


class Speaker(NamedTuple):
  """A model that continues prompts."""

  setup: TrainSetup
  state: TrainState
  vocabulary: Vocabulary
  next_logits: Callable[..., jax.Array]

  def speak(self, prompts: Sequence[Sequence[int]], max_new: int = 5, **options) -> list[list[int]]:
    return generate(
      self.next_logits, self.setup, self.state, self.vocabulary, prompts, max_new, **options
    )


@pytest.fixture(scope="module")
def speaker(lab):
  """A model with large random parameters, so that its choices are clear and differ."""
  cfg = load_config(lab.config, {"model.init_std": 0.5})
  compressor = TokenCompressor.identity(cfg.model.vocab_size)
  layout = HashLayout.of(cfg.model.engram, compressor)
  setup = make_setup(cfg, layout)
  vocabulary = Vocabulary(word_tokenizer(), compressor, layout)
  return Speaker(setup, init_state(setup), vocabulary, make_next_logits(setup))


def word_tokenizer() -> tokenizers.Tokenizer:
  """Encodes the words "a" and "b", with a token before them that training text has not."""
  pieces = {"a": 5, "b": 6, "<s>": 7, "<unk>": 0}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="<unk>"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 7)]
  )
  return tokenizer


def test_greedy_is_the_argmax_of_the_full_forward(speaker):
  """One forward over prompt and continuation, without padding, gives every choice again."""
  prompt = list(PROMPTS[1])
  new = speaker.speak([prompt], max_new=6)[0]
  tokens_BT = np.array([prompt + new])
  (ids_BTJ,) = speaker.vocabulary.row_ids(tokens_BT)

  @jax.jit
  def choices(state, tokens_BT, ids_BTJ):
    rows_BTM = lookup(state.tables.tables[1], ids_BTJ).reshape(*tokens_BT.shape, -1)
    model = speaker.setup.model(state.params, state.biases)
    hidden_BTD, _ = model(tokens_BT, (rows_BTM,))
    return model.logits(hidden_BTD).argmax(-1)

  chosen_T = np.asarray(choices(speaker.state, tokens_BT, ids_BTJ))[0]
  assert new == chosen_T[len(prompt) - 1 : -1].tolist()


def test_prompts_are_tokenised_as_text_was_for_training(speaker):
  """Whatever a tokenizer would put around them; in both forms of generation."""
  tokenizer = speaker.vocabulary.tokenizer
  assert tokenizer.encode("a b").ids == [7, 5, 6]
  assert encode_prompts(tokenizer, ["a b", "b"]) == [[5, 6], [6]]
  read = []

  def next_logits(params, biases, rows, tokens_BT, last_B):
    read.append(tokens_BT[0, : int(last_B[0]) + 1].tolist())
    return jax.nn.one_hot(jnp.array([5]), 300)

  said = complete(next_logits, *speaker[:3], ["a b"], 1, end_id=0)
  assert said == [" a"]  # as it stands behind "a b"
  assert read == [[5, 6]]


def test_a_batch_of_prompts_says_what_each_says_alone(speaker):
  together = speaker.speak(PROMPTS)
  assert together == [speaker.speak([prompt])[0] for prompt in PROMPTS]
  assert len({tuple(new) for new in together}) > 1


def test_a_prompt_ends_at_the_end_id_and_the_others_go_on(speaker):
  free = speaker.speak(PROMPTS)
  stop = free[0][2]
  stopped = speaker.speak(PROMPTS, end_id=stop)
  cut = [new[: new.index(stop)] if stop in new else new for new in free]
  assert stopped == cut


def test_sampling_follows_its_seed(speaker):
  one, again, other = (speaker.speak(PROMPTS, temperature=2.0, seed=s) for s in (0, 0, 1))
  assert one == again
  assert one != other


def test_ids_that_a_smaller_tokenizer_has_not_are_never_chosen(speaker):
  small = dataclasses.replace(speaker.vocabulary, compressor=TokenCompressor.identity(10))
  speaker = speaker._replace(vocabulary=small)
  assert speaker.speak([[3, 4]], max_new=0) == [[]]
  logits_BV = jax.nn.one_hot(jnp.array([299]), 300)
  new = speaker._replace(next_logits=lambda *_: logits_BV).speak(
    [[3, 4]], max_new=3, temperature=1.0
  )
  assert max(new[0]) < 10


@pytest.mark.parametrize("bad", [-1, 300])
def test_ids_outside_the_vocabulary_are_refused(speaker, bad):
  with pytest.raises(ConfigError, match=rf"token id {bad} .* 0\.\.299") as caught:
    speaker.speak([[1, 2], [3, bad]])
  assert caught.value.exit_code == 2


def test_empty_prompts_and_negative_temperatures_are_refused(speaker):
  with pytest.raises(ConfigError, match="empty"):
    speaker.speak([[1], []])
  with pytest.raises(ConfigError, match=r"temperature=-0\.5"):
    speaker.speak([[1]], temperature=-0.5)
