"""Runs with tokenizers of other makes, from train.py to eval.py: bytes, ends, samples."""

import json

from tokenizer_makes import GOLDEN, make

from engram_jax.inference.load import load_model

TEXTS = [f"the quick {w}, the lazy dog: {i} of the brown foxes" for i in range(40) for w in "ab"]


def train(lab, tmp_path, tokenizer, *words):
  source = tmp_path / "text.jsonl"
  source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
  data = {"data.source": "jsonl", "data.path": source, "data.tokenizer": tokenizer}
  data |= {"data.validation_fraction": 0.3, "data.cache": tmp_path / "cache"}
  data |= {"train.steps": 2, "train.sample_tokens": 3, "model.vocab_size": 420}
  words = (
    words if "--train.sample_prompt" in words else (*words, "--train.sample_prompt", "the fox")
  )
  return lab.training(tmp_path, *(x for k, v in data.items() for x in (f"--{k}", v)), *words)


def test_without_known_bytes_nothing_is_said_in_bits_per_byte(lab, tmp_path):
  """WordPiece loses what stood between words: "a, the" has one space less than "a , the"."""
  done = train(lab, tmp_path, GOLDEN / "wordpiece.json")
  assert done.code == 0, done.err
  assert "no bits per byte: " in done.err
  assert " bits per byte\n" not in done.err
  (last, *_) = (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()[::-1]
  assert "validation/loss" in json.loads(last)
  assert not [key for key in json.loads(last) if "byte" in key and key.startswith("validation")]
  text = lab.evaluation(tmp_path / "t", "--tokens", 0)
  assert "bits/byte" not in text.out
  assert "no bits per byte: " in text.err
  result = json.loads(lab.evaluation(tmp_path / "t", "--tokens", 0, "--json").out)
  for figures in (result["memory_on"], *result["memory_on"]["by_source"].values()):
    assert figures["bits_per_byte"] is None
    assert figures["bytes"] is None
  scored = tmp_path / "scored.txt"
  for text, is_known in (("the quick fox", True), ("the-quick fox", False)):
    scored.write_text(text)
    done = lab.evaluation(tmp_path / "t", "--score", scored, "--json")
    assert (json.loads(done.out)["bits_per_byte"] is not None) == is_known
    assert ("no bits per byte" in done.err) != is_known


def test_an_end_of_text_of_ones_own(lab, tmp_path):
  tokenizer = json.loads(make("llama").to_str())
  names = {"<unk>": "<what>", "<s>": "<begin>", "</s>": "<fin>"}
  tokenizer["model"]["unk_token"] = "<what>"
  tokenizer["model"]["vocab"] = {names.get(k, k): v for k, v in tokenizer["model"]["vocab"].items()}
  for token in tokenizer["added_tokens"]:
    token["content"] = names[token["content"]]
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(tokenizer))
  done = train(lab, tmp_path, path)
  assert done.code == 2
  assert "name one of its tokens in data.end_of_text: its special tokens are '<what>'" in done.err
  done = train(lab, tmp_path, path, "--data.end_of_text", "<end>")
  assert (done.code, "data.end_of_text='<end>' is no token" in done.err) == (2, True)
  done = train(lab, tmp_path, path, "--data.end_of_text", "<fin>")
  assert done.code == 0, done.err
  assert "bits per byte" in done.err
  assert "no bits per byte" not in done.err
  assert load_model(tmp_path / "t", None, print).end_id == 2
  done = lab.evaluation(tmp_path / "t", "--tokens", 4, "--json", "--prompt", "the quick")
  assert json.loads(done.out)["memory_on"]["bits_per_byte"] > 0


def test_a_prompt_that_the_tokenizer_cannot_read_is_refused_before_training(lab, tmp_path):
  path = tmp_path / "words.json"
  words = sorted({word for text in TEXTS for word in text.split()})
  vocab = {word: i for i, word in enumerate([*words, "</s>"])}
  model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<none>"}
  whole = json.loads(make("words").to_str()) | {"model": model, "added_tokens": []}
  path.write_text(json.dumps(whole))
  done = train(lab, tmp_path, path, "--train.sample_prompt", "unheard")
  assert done.code == 2
  assert "train.sample_prompt='unheard': the tokenizer fails on it" in done.err
  assert not (tmp_path / "t").exists()
