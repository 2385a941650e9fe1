"""Batches: a function of the step alone, every token once an epoch, row ids equal to the hash of
each example, and nothing across documents that should not be."""

import ast
import contextlib
import itertools
import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from engram_jax.config import Config, load_config
from engram_jax.data import pipeline as data_pipeline
from engram_jax.data.corpus import Corpus, deduplicate, is_validation
from engram_jax.data.files import Document
from engram_jax.data.packing import PackedExamples
from engram_jax.data.pipeline import Pipeline, PreparedData, prepare
from engram_jax.errors import ConfigError, StorageError
from engram_jax.memory.hashing import hash_ids_numpy
from engram_jax.memory.vocabulary import check_fingerprint

NAMES = ("tokens", "targets", "mask", "segments", "positions", "source")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """Two files of short documents of many lengths."""
  root = tmp_path_factory.mktemp("run") / "corpus"
  root.mkdir()
  rng = np.random.default_rng(0)
  words = [f"w{i}" for i in range(60)]
  for name in ("books", "web"):
    texts = [" ".join(rng.choice(words, rng.integers(1, 60))) for _ in range(80)]
    lines = [json.dumps({"text": text}) for text in texts]
    (root / f"{name}.jsonl").write_text("\n".join(lines))
  return root


def config(folder: pathlib.Path, **overrides) -> Config:
  settings = {
    "data.source": "jsonl",
    "data.path": str(folder),
    "data.cache": str(folder.parent / "cache"),
    "data.sequence_length": 16,
    "data.validation_fraction": 0.2,
    "model.vocab_size": 320,
    "model.engram.layers": [1, 2],
    "model.engram.heads": 2,
    "model.engram.rows_per_head": 101,
    "train.batch_size": 4,
  }
  return load_config(None, settings | overrides)


def prepare_quietly(cfg: Config) -> PreparedData:
  return prepare(cfg, log=lambda line: None)


@pytest.fixture(scope="module")
def data(folder) -> PreparedData:
  return prepare_quietly(config(folder))


def assert_equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def tiny_corpus(*documents: list[int]) -> Corpus:
  offsets = np.cumsum([0, *map(len, documents)])
  tokens = np.concatenate([np.array(d, np.uint16) for d in documents])
  return Corpus(pathlib.Path("none"), tokens, offsets, np.arange(len(documents), dtype=np.int32))


def test_an_example_by_hand():
  corpus = tiny_corpus([5, 6, 0], [7, 0], [8, 9, 4, 3, 0])
  examples = PackedExamples(corpus, sequence_length=4, row_id_encoder=None)
  assert (len(examples), examples.count_with_tail) == (2, 3)
  batch = examples(np.array([0, 1, 2]))
  expected = {
    "tokens": [[5, 6, 0, 7], [0, 8, 9, 4], [3, 0, 0, 0]],
    "targets": [[6, 0, 7, 0], [8, 9, 4, 3], [0, 0, 0, 0]],
    "mask": [[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 0]],
    "segments": [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]],
    "positions": [[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 2, 3]],
    "source": [[0, 0, 0, 1], [1, 2, 2, 2], [2, 2, 2, 2]],
  }
  assert_equal(batch, {name: np.array(value) for name, value in expected.items()})
  assert all(batch[name].dtype == (bool if name == "mask" else np.int32) for name in NAMES)


def test_corpus_holds_every_document_once_and_ends_each(data, folder):
  texts = {
    json.loads(line)["text"]
    for path in folder.glob("*.jsonl")
    for line in path.read_text().splitlines()
  }
  found = []
  for corpus in (data.training, data.validation):
    for i in range(corpus.document_count):
      ids = corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]].tolist()
      assert ids.count(data.end_id) == 1
      assert ids[-1] == data.end_id
      found.append(data.vocabulary.tokenizer.decode(ids))
  assert sorted(found) == sorted(texts)
  assert data.source_names == ("books", "web")
  assert data.training.tokens.dtype == np.uint16
  total = (
    data.token_bytes[data.training.tokens].sum() + data.token_bytes[data.validation.tokens].sum()
  )
  assert total == sum(len(text.encode()) for text in texts)


def test_row_ids_are_the_hash_of_each_example_alone(data):
  batch = data.training_pipeline().batch_at(3)
  for b in range(4):
    ids_BT = data.vocabulary.compressor(batch["tokens"][b : b + 1])
    for i, layer in enumerate((1, 2)):
      hashed = hash_ids_numpy(data.vocabulary.layout, layer, ids_BT, batch["segments"][b : b + 1])
      rows = hashed + np.array(data.vocabulary.layout.offsets[layer])
      np.testing.assert_array_equal(batch["row_ids"][i, b : b + 1], rows)
  assert batch["row_ids"].shape == (2, 4, 16, 4)
  assert batch["row_ids"].dtype == np.int32
  assert all(
    batch["row_ids"][i].max() < data.vocabulary.layout.rows[layer] for i, layer in enumerate((1, 2))
  )


def test_row_ids_cross_documents_only_with_reset_at_documents_off(data, folder):
  crossing = prepare_quietly(config(folder, **{"model.engram.reset_at_documents": False}))
  assert crossing.vocabulary.layout == data.vocabulary.layout
  separate, joined = (d.training_pipeline().batch_at(0) for d in (data, crossing))
  for name in NAMES:
    np.testing.assert_array_equal(separate[name], joined[name])
  differs = (separate["row_ids"] != joined["row_ids"]).any(axis=(0, 3))
  near_start = (separate["segments"] > 0) & (separate["positions"] < 2)
  assert differs.any()
  assert not (differs & ~near_start).any()


def test_controls_address_other_rows(data, folder):
  batch = data.training_pipeline().batch_at(0)
  layout = data.vocabulary.layout
  of = lambda address: prepare_quietly(
    config(folder, **{"model.engram.address": address, "train.sample_tokens": 0})
  )

  one_row = of("one_row").training_pipeline().batch_at(0)
  for ids_BTJ, layer in zip(one_row["row_ids"], layout.layers, strict=True):
    np.testing.assert_array_equal(ids_BTJ, np.broadcast_to(layout.offsets[layer], ids_BTJ.shape))

  token = of("token").training_pipeline().batch_at(0)
  canonical = data.vocabulary.compressor(batch["tokens"])
  for ids_BTJ, layer in zip(token["row_ids"], layout.layers, strict=True):
    alone = hash_ids_numpy(layout, layer, canonical.reshape(-1, 1)) + layout.offsets[layer]
    np.testing.assert_array_equal(ids_BTJ.reshape(alone.shape), alone)

  windows = of("other_window")
  plain, other = data.training_pipeline().examples, windows.training_pipeline().examples
  count = plain.count_with_tail
  np.testing.assert_array_equal(
    other(np.array([1, count - 1]))["row_ids"],
    plain(np.array([1 + count // 2, count - 1 - count + count // 2]))["row_ids"],
  )
  for control in (one_row, token, windows.training_pipeline().batch_at(0)):
    for name in NAMES:
      np.testing.assert_array_equal(control[name], batch[name])
    assert (control["row_ids"] != batch["row_ids"]).any()
  with pytest.raises(ConfigError, match="'other_window' is a control of experiments"):
    windows.vocabulary.row_ids(batch["tokens"])
  with pytest.raises(ConfigError, match=r"give train\.sample_tokens=0"):
    config(folder, **{"model.engram.address": "token"})


def test_shuffled_documents_hold_the_same_tokens_in_another_order(data, folder):
  shuffled = prepare_quietly(config(folder, **{"data.shuffle_tokens": True}))
  again = prepare_quietly(config(folder, **{"data.shuffle_tokens": True}))
  for plain, other in ((data.training, shuffled.training), (data.validation, shuffled.validation)):
    np.testing.assert_array_equal(plain.offsets, other.offsets)
    for begin, end in itertools.pairwise(plain.offsets):
      np.testing.assert_array_equal(
        np.sort(plain.tokens[begin:end]), np.sort(other.tokens[begin:end])
      )
      assert other.tokens[end - 1] == plain.tokens[end - 1]  # the end of the text
    assert (plain.tokens != other.tokens).mean() > 0.5
  np.testing.assert_array_equal(shuffled.training.tokens, again.training.tokens)
  assert shuffled.vocabulary.tokenizer_digest == data.vocabulary.tokenizer_digest


def test_without_compression_the_tokenizers_own_ids_are_hashed(folder):
  data = prepare_quietly(config(folder, **{"model.engram.compress": False}))
  batch = data.validation_pipeline().batch_at(0)
  layout = data.vocabulary.layout
  assert layout.compressed_vocab == 320
  for ids_BTJ, layer in zip(batch["row_ids"], layout.layers, strict=True):
    expected = hash_ids_numpy(layout, layer, batch["tokens"], batch["segments"])
    np.testing.assert_array_equal(ids_BTJ, expected + layout.offsets[layer])


def test_without_a_memory_there_are_no_rows(folder):
  data = prepare_quietly(config(folder, **{"model.engram.layers": []}))
  assert data.vocabulary.layout is None
  assert data.training_pipeline().batch_at(0).keys() == set(NAMES)


def test_qwen_dialect_hashes_raw_ids(folder):
  data = prepare_quietly(
    config(folder, **{"model.engram.dialect": "qwen_ple", "model.engram.pad_id": 0})
  )
  np.testing.assert_array_equal(data.vocabulary.compressor.table, np.arange(320))
  assert (data.vocabulary.layout.compressed_vocab, data.vocabulary.layout.pad_id) == (320, 0)


def test_resuming_repeats_and_skips_nothing(data):
  pipeline = data.training_pipeline()
  start = 3 * pipeline.steps_per_epoch - 2
  with contextlib.closing(pipeline.iterate(start)) as batches:
    for step in range(start, start + 6):
      assert_equal(next(batches), pipeline.batch_at(step))


def test_an_epoch_shows_every_example_once_and_the_next_in_another_order(data):
  examples = data.training_pipeline().examples
  pipeline = Pipeline(examples, batch_size=1, seed=0)
  in_order = examples(np.arange(len(examples)))["tokens"]
  epochs = [
    np.concatenate(
      [pipeline.batch_at(epoch * len(examples) + i)["tokens"] for i in range(len(examples))]
    )
    for epoch in range(2)
  ]
  for tokens in epochs:
    assert sorted(map(tuple, tokens)) == sorted(map(tuple, in_order))
  assert (epochs[0] != epochs[1]).any(axis=1).mean() > 0.9


def test_seeds_do_not_share_orders(data):
  examples = data.training_pipeline().examples
  second_epoch, other_seed = (
    [Pipeline(examples, 1, seed).batch_at(first + i)["tokens"] for i in range(20)]
    for seed, first in ((0, len(examples)), (1, 0))
  )
  assert (np.array(second_epoch) != np.array(other_seed)).any(axis=(1, 2)).mean() > 0.8


def test_threads_change_nothing(data):
  examples = data.training_pipeline().examples
  with contextlib.ExitStack() as stack:
    one, four = (
      stack.enter_context(contextlib.closing(Pipeline(examples, 4, 0, threads=n).iterate(5)))
      for n in (1, 4)
    )
    for _ in range(8):
      assert_equal(next(one), next(four))


def test_workers_change_nothing(data):
  examples = data.training_pipeline().examples
  plain = Pipeline(examples, 4, 0)
  with contextlib.closing(Pipeline(examples, 4, 0, workers=1).iterate(7)) as batches:
    for step in range(7, 10):
      batch = next(batches)
      assert_equal(batch, plain.batch_at(step))
      assert all(type(array) is np.ndarray for array in batch.values())


@pytest.mark.parametrize("slices", [[slice(0, 2), slice(2, 4)], [[0, 3], [1], [2]], [[2, 0, 1, 3]]])
def test_slices_of_a_batch_are_its_rows(data, slices):
  pipeline = data.training_pipeline()
  for rows in (rows if isinstance(rows, slice) else np.array(rows) for rows in slices):
    with contextlib.closing(pipeline.iterate(5, rows)) as batches:
      for step in (5, 6):
        full, part = pipeline.batch_at(step), next(batches)
        expected = {k: x[:, rows] if k == "row_ids" else x[rows] for k, x in full.items()}
        assert_equal(part, expected)
        assert_equal(pipeline.batch_at(step, rows), expected)


def test_workers_make_slices_too(data):
  examples, rows = data.training_pipeline().examples, np.array([1, 3])
  with contextlib.closing(Pipeline(examples, 4, 0, workers=1).iterate(7, rows)) as batches:
    assert_equal(next(batches), Pipeline(examples, 4, 0).batch_at(7, rows))


def test_closing_leaves_no_thread(data):
  before = set(threading.enumerate())
  batches = data.training_pipeline().iterate()
  next(batches)
  assert set(threading.enumerate()) - before
  batches.close()
  for _ in range(100):
    left = [t for t in set(threading.enumerate()) - before if t.name.startswith("grain-prefetch")]
    if not left:
      break
    time.sleep(0.05)
  assert not left


def test_validation_shows_every_target_once(data):
  pipeline = data.validation_pipeline()
  batches = list(pipeline.iterate())
  assert len(batches) == pipeline.steps_per_epoch
  tokens, offsets = data.validation.tokens, data.validation.offsets
  targets = np.concatenate([batch["targets"][batch["mask"]] for batch in batches])
  first_of_each = np.delete(np.arange(len(tokens)), offsets[:-1])
  np.testing.assert_array_equal(targets, tokens[first_of_each])
  assert all(batch["tokens"].shape == (4, 16) for batch in batches)


def test_a_second_start_reads_the_cache_alone(data, folder, monkeypatch):
  def fail(*_):
    raise AssertionError("the corpus was read again")

  monkeypatch.setattr(data_pipeline.sources.files, "read_files", fail)
  again = prepare_quietly(config(folder))
  assert again.vocabulary.tokenizer_digest == data.vocabulary.tokenizer_digest
  assert_equal(again.training_pipeline().batch_at(0), data.training_pipeline().batch_at(0))
  corpora = list((folder.parent / "cache" / "corpora").iterdir())
  assert not [path for path in corpora if path.name.startswith(".part-")]


COLD = """
import sys, time
from engram_jax.config import load_config
from engram_jax.data.pipeline import prepare

cfg = load_config(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
data = prepare(cfg, log=lambda line: None)
vocabulary, training = data.vocabulary, data.training
print(vocabulary.tokenizer_digest, training.digest, vocabulary.compressor.digest, training.path)
"""


def test_processes_that_fill_one_cache_at_once_get_the_same_data(folder, tmp_path):
  cfg = config(folder, **{"data.cache": str(tmp_path / "cache")})
  (tmp_path / "c.yaml").write_text(cfg.to_yaml())
  command = [sys.executable, "-c", COLD, str(tmp_path / "c.yaml")]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  root = pathlib.Path(data_pipeline.__file__).parents[2]
  processes = [subprocess.Popen(command, **pipes, cwd=root) for _ in range(3)]
  assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
  for process in processes:
    process.stdin.write("\n")
    process.stdin.flush()
  outputs = [process.communicate()[0] for process in processes]
  assert len(set(outputs)) == 1
  assert [process.returncode for process in processes] == [0] * 3
  assert not [path for path in (tmp_path / "cache").rglob("*") if ".part-" in path.name]


def test_the_order_of_files_and_lines_changes_nothing(data, folder, tmp_path):
  lines = (folder / "web.jsonl").read_text().splitlines()
  copy = tmp_path / "copy"
  copy.mkdir()
  (copy / "a.jsonl").write_text("\n".join(reversed(lines)))
  (copy / "b.jsonl").write_text((folder / "books.jsonl").read_text())
  other = prepare_quietly(config(copy))
  assert other.vocabulary.tokenizer_digest == data.vocabulary.tokenizer_digest
  np.testing.assert_array_equal(other.training.tokens, data.training.tokens)


def test_corpus_pickles_as_its_path(data):
  pickled = pickle.dumps(data.training)
  assert len(pickled) < 1000
  again = pickle.loads(pickled)
  assert isinstance(again.tokens, np.memmap)
  np.testing.assert_array_equal(again.tokens, data.training.tokens)


def test_a_damaged_token_file_is_named(folder, tmp_path):
  data = prepare_quietly(config(folder, **{"data.cache": str(tmp_path)}))
  path = data.training.path / "tokens.npy"
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(StorageError, match=r"damaged token file.*delete"):
    prepare_quietly(config(folder, **{"data.cache": str(tmp_path)}))


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"train.batch_size": 4096}, r"windows of data\.sequence_length=16, fewer than .*=4096"),
    ({"data.sequence_length": 1 << 20}, "0 windows"),
    (
      {"model.vocab_size": 4096, "model.engram.pad_id": 4095},
      "pad_id=4095 is outside the tokenizer's",
    ),
    (
      {"model.engram.heads": 1, "model.engram.rows_per_head": [2**30, 2**30 - 1]},
      "model.engram: .*no int32 row ids",
    ),
  ],
)
def test_configs_that_do_not_fit_the_corpus_are_refused(folder, overrides, message):
  with pytest.raises(ConfigError, match=message):
    prepare_quietly(config(folder, **overrides)).training_pipeline()


def test_empty_corpus_and_one_document_are_refused_and_leave_nothing(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text("\n")
  with pytest.raises(ConfigError, match="empty corpus"):
    prepare_quietly(config(path))
  path.write_text('{"text": "only one"}')
  with pytest.raises(ConfigError, match="both need one"):
    prepare_quietly(config(path))
  assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_data_imports_no_jax():
  folder = pathlib.Path(data_pipeline.__file__).parent
  for path in folder.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
      names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
      assert not [name for name in names if name.split(".")[0] in ("jax", "flax")], path
  paths = [path.relative_to(folder.parents[1]) for path in folder.rglob("[!_]*.py")]
  modules = [".".join(path.with_suffix("").parts) for path in paths]
  code = f"import sys, {', '.join(modules)}; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True, cwd=folder.parents[1])


def test_a_run_knows_its_validation_text(folder, tmp_path):
  before = prepare_quietly(config(folder)).fingerprint()
  more = shutil.copytree(folder, tmp_path / "corpus")
  texts = deduplicate(Document("books", f"another text, number {i}") for i in itertools.count())
  held_out = next(made.text for made in texts if is_validation(made.key, 0.2))
  with open(more / "books.jsonl", "a") as file:
    file.write("\n" + json.dumps({"text": held_out}))
  after = prepare_quietly(config(more)).fingerprint()
  assert {key for key in before if before[key] != after[key]} == {"validation_content_digest"}
  with pytest.raises(ConfigError, match="another validation text"):
    check_fingerprint(before, after, "run")
  older = {key: value for key, value in before.items() if key != "validation_content_digest"}
  check_fingerprint(older, after, "run")
