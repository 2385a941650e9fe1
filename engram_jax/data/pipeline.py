"""From a config to batches: `prepare` readies the data, a `Pipeline` serves it.

    data = prepare(cfg)
    with contextlib.closing(data.training_pipeline().iterate(step)) as batches:
      for batch in batches: ...

A batch is a function of (config, step) alone: resuming at a step repeats nothing and skips
nothing, and neither threads nor worker processes change what comes, nor how many processes share
its rows among them. grain is imported where it is used, because it brings jax with it and worker
processes here need NumPy only.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers

from engram_jax.config import Config
from engram_jax.data import sources, tokenizer
from engram_jax.data.corpus import FORMAT, Corpus, Hashed, open_or_build, training_texts, unique
from engram_jax.data.download import Log, cache_dir
from engram_jax.data.packing import Batch, BatchSlice, PackedExamples, RowIdEncoder
from engram_jax.errors import ConfigError, StorageError
from engram_jax.memory.compress import tokenizer_digest
from engram_jax.memory.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Batches of `examples`, `batch_size` a step.

  With a seed: every whole window once an epoch, in an order that is new each epoch, without end.
  Without: every token once, in order, `steps` batches; windows past the end are masked throughout.
  """

  examples: PackedExamples
  batch_size: int
  seed: int | None
  threads: int = 2
  workers: int = 0

  @property
  def steps(self) -> int:
    """Batches of one pass: whole ones when shuffled (epochs run into one another), else all."""
    if self.seed is not None:
      return len(self.examples) // self.batch_size
    return -(-self.examples.with_tail // self.batch_size)

  def batch_at(self, step: int, rows: np.ndarray | slice | None = None) -> Batch:
    """The batch of a step, made here and now; see `PackedExamples.__call__` for what it holds.

    rows: which rows of it to make, in this order; all of them if left out. Whoever makes a row, it
    is the same: a process asks for those that lie on its devices (core.placement.process_rows).
    """
    return self._dataset(rows)[step]

  def iterate(self, start_step: int = 0, rows: np.ndarray | slice | None = None) -> Iterator[Batch]:
    """The batches from `start_step` on, made ahead of time by threads or worker processes.

    rows: as in `batch_at`.

    Close it (`contextlib.closing`) to stop them. Worker processes import the main module anew, so
    a script that uses them keeps its start under `if __name__ == "__main__"`.
    """
    import grain

    ahead = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
    dataset = self._dataset(rows).slice(slice(start_step, None)).to_iter_dataset(ahead)
    if self.workers:
      from absl import flags

      if not flags.FLAGS.is_parsed():  # grain reads one and fails: google/grain issue 1355
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2)
      dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    batches = iter(dataset)
    try:
      for batch in batches:
        # Out of the workers' shared memory, which is then free for the next batch.
        yield {name: np.array(x) for name, x in batch.items()} if self.workers else batch
    finally:
      batches.close()

  def _dataset(self, rows: np.ndarray | slice | None) -> Any:
    """A grain MapDataset of batches over window indices."""
    import grain

    if self.seed is None:
      order = grain.MapDataset.range(self.steps * self.batch_size)
    else:
      # Grain adds the epoch to shuffle's own seed, so seeds given to it directly would share
      # orders (seed 0's second epoch is seed 1's first); `.seed` mixes them apart.
      order = grain.MapDataset.range(len(self.examples)).seed(self.seed).shuffle().repeat()
    make = self.examples if rows is None else BatchSlice(self.examples, rows)
    return order.batch(self.batch_size, drop_remainder=True).map(make)


def _start_worker(index: int, count: int) -> None:
  """Leaves signals to the main process, and leaves when that one has gone, even by a kill -9."""
  del index, count
  for name in (signal.SIGINT, signal.SIGTERM):
    signal.signal(name, signal.SIG_IGN)
  threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None, "only worker processes run this"
  parent.join()
  os._exit(1)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """Everything a run knows about its data.

  Attributes:
    vocabulary: its tokenizer encodes text that spells a special token as ordinary text.
    training, validation: the two corpora.
    sources: names that a batch's `source` indexes.
    token_bytes: int32 [V], UTF-8 bytes each id stands for; special tokens 0.
    end_id: the id that ends a document.
    description: lines for people: where the text came from and how much it is.
  """

  cfg: Config
  vocabulary: Vocabulary
  training: Corpus
  validation: Corpus
  sources: tuple[str, ...]
  token_bytes: np.ndarray
  end_id: int
  description: tuple[str, ...]

  def training_pipeline(self, batch_size: int | None = None) -> Pipeline:
    """Shuffled, endless training batches of `cfg.train.batch_size` windows unless said otherwise.

    Raises ConfigError where the corpus has fewer windows than one batch takes.
    """
    data = self.cfg.data
    size = batch_size or self.cfg.train.batch_size
    examples = self._examples(self.training)
    if len(examples) < size:
      raise ConfigError(
        f"the training documents hold {len(self.training.tokens):,} tokens: {len(examples)} "
        f"windows "
        f"of data.sequence_length={data.sequence_length}, fewer than train.batch_size={size}; "
        f"lower either, or give more text"
      )
    return Pipeline(examples, size, data.seed, data.threads, data.workers)

  def validation_pipeline(self, batch_size: int | None = None) -> Pipeline:
    """The validation documents once, in order, every token of them, by threads alone."""
    size = batch_size or self.cfg.train.batch_size
    return Pipeline(self._examples(self.validation), size, None, self.cfg.data.threads)

  def _examples(self, corpus: Corpus) -> PackedExamples:
    layout, compressor = self.vocabulary.layout, self.vocabulary.compressor
    resets = self.cfg.model.engram.reset_at_documents
    encoder = layout and RowIdEncoder(layout, compressor, resets)
    return PackedExamples(corpus, self.cfg.data.sequence_length, encoder)

  def fingerprint(self) -> dict[str, Any]:
    """What a checkpoint trained on this data carries; see `Vocabulary.fingerprint`."""
    return self.vocabulary.fingerprint(self.training.digest)


def prepare(cfg: Config, log: Log = print) -> Prepared:
  """Fetches, tokenises and maps the data of a config, or finds it in the cache.

  Raises ConfigError (missing path, empty corpus, a tokenizer that does not fit), DataError (what
  cannot be fetched or read), StorageError (a cache folder that cannot be written).
  """
  try:
    return _prepare(cfg, log)
  except OSError as error:
    raise StorageError(f"data.cache={str(cache_dir(cfg.data))!r}: {error}") from error


def _prepare(cfg: Config, log: Log) -> Prepared:
  cache = cache_dir(cfg.data)
  corpus = _digest(sources.fingerprint(cfg.data), cfg.data.validation_fraction, FORMAT)

  def documents() -> Iterator[Hashed]:
    return unique(sources.documents(cfg.data, log))

  text_tokenizer = tokenizer.load_or_train(
    cfg, corpus, lambda: training_texts(documents(), cfg.data), log
  )
  digest = tokenizer_digest(text_tokenizer)
  end_id = tokenizer.end_of_text_id(text_tokenizer)
  folder = cache / "corpora" / _digest(corpus, digest)
  training, validation, names = open_or_build(
    folder, documents(), text_tokenizer, end_id, cfg.data, log
  )
  return Prepared(
    cfg=cfg,
    vocabulary=Vocabulary.build(cfg.model, text_tokenizer, cache / "token_maps"),
    training=training,
    validation=validation,
    sources=names,
    token_bytes=tokenizer.token_bytes(text_tokenizer),
    end_id=end_id,
    description=_description(cfg, text_tokenizer, digest, training, validation),
  )


def _description(
  cfg: Config,
  text_tokenizer: tokenizers.Tokenizer,
  digest: str,
  training: Corpus,
  validation: Corpus,
) -> tuple[str, ...]:
  return (
    f"text: {sources.describe(cfg.data)}",
    f"tokenizer: {cfg.data.tokenizer}, {tokenizer.vocabulary_size(text_tokenizer):,} ids, "
    f"digest {digest[:12]}",
    f"training: {training.documents:,} documents, {len(training.tokens):,} tokens",
    f"validation: {validation.documents:,} documents, {len(validation.tokens):,} tokens",
  )


def _digest(*parts: Any) -> str:
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
