"""Tokenizers of the makes that published models have, small, trained on a few sentences."""

import functools
import json
import pathlib

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

GOLDEN = pathlib.Path(__file__).parent / "golden" / "tokenizers"
END = "</s>"
TEXTS = [
  "the quick brown fox jumps over the lazy dog, the quickest of them all",
  "it isn't true: 1 + 1 = 2, and the theatre's théâtre is naïve",
  "日本語 and 😀 are some of the many characters\nof the world",
] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _bpe(**options) -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer(models.BPE(**options))


def _trained(tokenizer: tokenizers.Tokenizer, trainer) -> tokenizers.Tokenizer:
  tokenizer.train_from_iterator(TEXTS, trainer)
  return tokenizer


def _sentencepiece_rules(tokenizer: tokenizers.Tokenizer, prefix: bool) -> tokenizers.Tokenizer:
  spaces = normalizers.Replace(" ", "▁")
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  tokenizer.normalizer = spaces
  if prefix:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    steps.append(decoders.Strip(" ", 1, 0))
  tokenizer.decoder = decoders.Sequence(steps)
  return tokenizer


def byte_level(**options) -> tokenizers.Tokenizer:
  tokenizer = _bpe()
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | options))
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  return _trained(
    tokenizer,
    trainers.BpeTrainer(
      vocab_size=330, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    ),
  )


def gemma() -> tokenizers.Tokenizer:
  """Byte fallback, no space before the first word, no pre-tokenizer."""
  tokenizer = _sentencepiece_rules(_bpe(byte_fallback=True, unk_token="<unk>"), prefix=False)
  tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
  trainer = trainers.BpeTrainer(
    vocab_size=420, special_tokens=[END, "<unk>", *BYTES], limit_alphabet=40, show_progress=False
  )
  trained = tokenizers.Tokenizer.from_str(_trained(tokenizer, trainer).to_str())
  return _only_special(trained, [END, "<unk>"])


def _only_special(tokenizer: tokenizers.Tokenizer, names: list[str]) -> tokenizers.Tokenizer:
  """The tokenizer with these as its only added tokens: its byte tokens are ordinary ones."""
  config = json.loads(tokenizer.to_str())
  config["added_tokens"] = [t for t in config["added_tokens"] if t["content"] in names]
  return tokenizers.Tokenizer.from_str(json.dumps(config))


def t5(scheme: str = "always") -> tokenizers.Tokenizer:
  """Unigram with Metaspace."""
  tokenizer = tokenizers.Tokenizer(models.Unigram())
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
  tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
  trainer = trainers.UnigramTrainer(
    vocab_size=150, special_tokens=[END, "<unk>"], unk_token="<unk>", show_progress=False
  )
  return _trained(tokenizer, trainer)


def wordpiece() -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer.from_file(str(GOLDEN / "wordpiece.json"))


def llama() -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer.from_file(str(GOLDEN / "llama.json"))


def no_space_piece() -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer.from_file(str(GOLDEN / "no_space_piece.json"))


def suffixes() -> tokenizers.Tokenizer:
  """Words end in </w>, as the first BPE of 2015 and CLIP's have them."""
  tokenizer = _bpe(unk_token="<unk>", end_of_word_suffix="</w>")
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.decoder = decoders.BPEDecoder("</w>")
  trainer = trainers.BpeTrainer(
    vocab_size=200,
    special_tokens=[END, "<unk>"],
    end_of_word_suffix="</w>",
    show_progress=False,
  )
  return _trained(tokenizer, trainer)


def words() -> tokenizers.Tokenizer:
  """Whole words and no decoder: they are joined by spaces."""
  tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  trainer = trainers.WordLevelTrainer(special_tokens=[END, "<unk>"], show_progress=False)
  return _trained(tokenizer, trainer)


def byte_level_normalizer() -> tokenizers.Tokenizer:
  """Bytes made characters by the normalizer, cut by a regex."""
  tokenizer = _bpe()
  tokenizer.normalizer = normalizers.ByteLevel()
  tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"Ġ?[^Ġ]+|Ġ+"), "isolated")
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  trainer = trainers.BpeTrainer(
    vocab_size=330, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
  )
  return _trained(tokenizer, trainer)


MAKES = {
  "byte_level": byte_level,
  "byte_level_prefix": functools.partial(byte_level, add_prefix_space=True),
  "byte_level_whole": functools.partial(byte_level, use_regex=False),
  "byte_level_normalizer": byte_level_normalizer,
  "llama": llama,
  "gemma": gemma,
  "t5": t5,
  "t5_first": functools.partial(t5, "first"),
  "t5_never": functools.partial(t5, "never"),
  "wordpiece": wordpiece,
  "suffixes": suffixes,
  "words": words,
  "no_space_piece": no_space_piece,
}


@functools.cache
def make(name: str) -> tokenizers.Tokenizer:
  """The tokenizer of a make; text that spells a special token is text to it."""
  tokenizer = MAKES[name]()
  tokenizer.no_truncation()
  tokenizer.no_padding()
  tokenizer.encode_special_tokens = True
  return tokenizer
