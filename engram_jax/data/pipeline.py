"""From a config to batches: `prepare` makes the data ready, a `Pipeline` serves it.

    data = prepare(cfg)
    with contextlib.closing(data.training_pipeline().iterate(step)) as batches:
      for batch in batches: ...

A batch is a function of (config, step) alone: resuming at a step repeats nothing and skips
nothing, and neither threads nor worker processes change it, nor how many processes divide its rows
among them. grain is imported where it is used, because it imports jax, and the worker processes
here need NumPy only.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import tokenizers

from engram_jax.config import Config
from engram_jax.data import sources, tokenizer
from engram_jax.data.byte_counts import check_bytes
from engram_jax.data.corpus import (
  FORMAT_VERSION,
  Corpus,
  HashedDocument,
  deduplicate,
  open_or_build,
  training_texts,
)
from engram_jax.data.download import Log, cache_dir
from engram_jax.data.packing import Batch, BatchSlice, PackedExamples, RowIdEncoder
from engram_jax.errors import ConfigError, StorageError
from engram_jax.memory.compress import tokenizer_digest
from engram_jax.memory.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Batches of packed examples, `batch_size` a step.

  With a seed it gives every complete example once an epoch, in a new order each epoch, endlessly.
  Without one it gives every token once, in order, and stops after `steps_per_epoch` batches;
  examples past the end are masked throughout.
  """

  examples: PackedExamples
  batch_size: int
  seed: int | None
  threads: int = 2
  workers: int = 0

  @property
  def steps_per_epoch(self) -> int:
    """Batches of one pass; with a seed complete ones alone, as a batch may span two epochs."""
    if self.seed is not None:
      return len(self.examples) // self.batch_size
    return -(-self.examples.count_with_tail // self.batch_size)

  def batch_at(self, step: int, batch_rows: np.ndarray | slice | None = None) -> Batch:
    """Makes the batch of a step at once; `PackedExamples.__call__` says what it holds.

    batch_rows: the rows of it to make, in this order; all of them if left out. A row is the same in
    whichever process makes it; a process needs those on its devices (core.mesh.process_indices).
    """
    return self._dataset(batch_rows)[step]

  def iterate(
    self, start_step: int = 0, batch_rows: np.ndarray | slice | None = None
  ) -> Generator[Batch]:
    """Yields the batches from `start_step` on, prefetched by threads or worker processes.

    batch_rows: as in `batch_at`.

    Close it (`contextlib.closing`) to stop them. Worker processes import the main module anew, so
    a script that uses them guards its start with `if __name__ == "__main__"`.
    """
    import grain

    options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
    dataset = self._dataset(batch_rows).slice(slice(start_step, None)).to_iter_dataset(options)
    if self.workers:
      from absl import flags

      if not flags.FLAGS.is_parsed():  # grain reads one and fails: google/grain issue 1355
        flags.FLAGS.mark_as_parsed()
      processes = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2)
      dataset = dataset.mp_prefetch(processes, worker_init_fn=_start_worker)
    batches = iter(dataset)
    try:
      for batch in batches:
        # A copy frees the workers' shared memory for the next batch.
        yield {name: np.array(x) for name, x in batch.items()} if self.workers else batch
    finally:
      batches.close()

  def _dataset(self, batch_rows: np.ndarray | slice | None) -> Any:
    """A grain MapDataset of batches, made from indices of packed examples."""
    import grain

    if self.seed is None:
      indices = grain.MapDataset.range(self.steps_per_epoch * self.batch_size)
    else:
      # Grain adds the epoch to shuffle's own seed, so seeds given to it directly would share
      # orders (seed 0's second epoch is seed 1's first); `.seed` mixes them apart.
      indices = grain.MapDataset.range(len(self.examples)).seed(self.seed).shuffle().repeat()
    make_batch = self.examples if batch_rows is None else BatchSlice(self.examples, batch_rows)
    return indices.batch(self.batch_size, drop_remainder=True).map(make_batch)


def _start_worker(index: int, count: int) -> None:
  """Leaves signals to the main process, and exits when that one has exited, even by kill -9."""
  del index, count
  for name in (signal.SIGINT, signal.SIGTERM):
    signal.signal(name, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None, "only worker processes run this"
  parent.join()
  os._exit(1)


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedData:
  """The data of a run: two corpora with their vocabulary.

  Attributes:
    vocabulary: its tokenizer encodes text that spells a special token as ordinary text.
    training, validation: the two corpora.
    source_names: names that a batch's `source` indexes.
    token_bytes: int32 [V], UTF-8 bytes of each id's text; 0 for special tokens.
    bits_per_byte_problem: why those do not add up to the validation text's, so that nothing can be
      said in bits per byte; None where they do.
    end_id: the id that ends a document.
    description: lines for people: the origin of the text, and how much it is.
  """

  cfg: Config
  vocabulary: Vocabulary
  training: Corpus
  validation: Corpus
  source_names: tuple[str, ...]
  token_bytes: np.ndarray
  end_id: int
  description: tuple[str, ...]
  bits_per_byte_problem: str | None = None

  def training_pipeline(self, batch_size: int | None = None) -> Pipeline:
    """Shuffled, endless training batches.

    batch_size: packed examples of each; `cfg.train.batch_size` if left out.

    Raises ConfigError where the corpus has fewer packed examples than one batch takes.
    """
    data = self.cfg.data
    size = batch_size or self.cfg.train.batch_size
    examples = self._examples(self.training)
    if len(examples) < size:
      raise ConfigError(
        f"the training documents hold {len(self.training.tokens):,} tokens: {len(examples)} "
        f"windows of data.sequence_length={data.sequence_length}, fewer than "
        f"train.batch_size={size}; lower either, or give more text"
      )
    return Pipeline(examples, size, data.seed, data.threads, data.workers)

  def validation_pipeline(self, batch_size: int | None = None) -> Pipeline:
    """Batches of every token of the validation documents, once and in order, made by threads."""
    size = batch_size or self.cfg.train.batch_size
    return Pipeline(self._examples(self.validation), size, None, self.cfg.data.threads)

  def _examples(self, corpus: Corpus) -> PackedExamples:
    layout, encoder = self.vocabulary.layout, None
    if layout is not None:
      resets = self.cfg.model.engram.reset_at_documents
      compressor, address = self.vocabulary.compressor, self.vocabulary.address
      encoder = RowIdEncoder(layout, compressor, resets, address)
    size = self.vocabulary.compressor.table.size
    return PackedExamples(corpus, self.cfg.data.sequence_length, encoder, size)

  def fingerprint(self) -> dict[str, Any]:
    """The fingerprint that checkpoints on this data hold; see `Vocabulary.fingerprint`."""
    training, validation = self.training, self.validation
    texts = {"validation_content_digest": validation.content_digest}
    return self.vocabulary.fingerprint(training.digest, training.content_digest) | texts


def prepare(cfg: Config, log: Log = print) -> PreparedData:
  """Downloads, tokenises and maps the data of a config, or finds it in the cache.

  Raises ConfigError (missing path or package, empty corpus, a tokenizer that does not fit),
  DataError (a file that cannot be downloaded or read), StorageError (a cache folder that cannot be
  written).
  """
  try:
    return _prepare(cfg, log)
  except OSError as error:
    raise StorageError(f"data.cache={str(cache_dir(cfg.data))!r}: {error}") from error


def _prepare(cfg: Config, log: Log) -> PreparedData:
  sources.require_packages(cfg.data)
  for line in sources.survey(cfg.data):
    log(line)
  cache = cache_dir(cfg.data)
  source_id = sources.fingerprint(cfg.data, log)
  corpus_id = _digest(source_id, cfg.data.validation_fraction, FORMAT_VERSION)

  said: set[str] = set()

  def log_once(line: str) -> None:  # documents are read twice, for the tokenizer and for the tokens
    if line not in said:
      said.add(line)
      log(line)

  def documents() -> Iterator[HashedDocument]:
    return deduplicate(sources.read_documents(cfg.data, log_once))

  text_tokenizer = tokenizer.load_or_train(
    cfg, corpus_id, lambda: training_texts(documents(), cfg.data), log
  )
  digest = tokenizer_digest(text_tokenizer)
  end_id = tokenizer.end_of_text_id(text_tokenizer, cfg.data.end_of_text)
  others = ["shuffled"] if cfg.data.shuffle_tokens else []
  others += [f"ends {end_id}"] if cfg.data.end_of_text else []
  folder = cache / "corpora" / _digest(corpus_id, digest, *others)
  training, validation, names = open_or_build(
    folder, documents(), text_tokenizer, end_id, cfg.data, log
  )
  counts = tokenizer.token_bytes(text_tokenizer)
  problem = None
  if cfg.data.tokenizer != "bpe":  # our own stands for each byte of a text by construction
    problem = check_bytes(folder, text_tokenizer, counts, documents, cfg.data.validation_fraction)
  return PreparedData(
    cfg=cfg,
    vocabulary=Vocabulary.build(cfg.model, text_tokenizer, cache / "token_maps"),
    training=training,
    validation=validation,
    source_names=names,
    token_bytes=counts,
    end_id=end_id,
    description=_description(cfg, text_tokenizer, digest, training, validation, problem),
    bits_per_byte_problem=problem,
  )


def _description(
  cfg: Config,
  text_tokenizer: tokenizers.Tokenizer,
  digest: str,
  training: Corpus,
  validation: Corpus,
  bits_per_byte_problem: str | None,
) -> tuple[str, ...]:
  lines = (
    f"text: {sources.describe(cfg.data)}",
    f"tokenizer: {cfg.data.tokenizer}, {tokenizer.vocabulary_size(text_tokenizer):,} ids, "
    f"digest {digest[:12]}",
    f"training: {training.document_count:,} documents, {len(training.tokens):,} tokens",
    f"validation: {validation.document_count:,} documents, {len(validation.tokens):,} tokens",
  )
  return (
    lines
    if bits_per_byte_problem is None
    else (*lines, f"no bits per byte: {bits_per_byte_problem}")
  )


def _digest(*parts: Any) -> str:
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
