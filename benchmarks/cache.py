"""Hit rates of row caches by their size, on real text, for tables of several sizes.

    python benchmarks/cache.py [--source wiki stdlib] [--rows-per-head 20000 200000] [--json]

Rows are counted over training documents and looked up by validation documents, which training never
saw. The configuration is configs/tiny.yaml's, with its 16 columns a token: orders 2 and 3, 8 heads.
For each table and each share of its rows that a cache holds:

    fixed      the most frequent rows of the training documents (`hot_ids`), for a device
    adaptive   a HostCache that has read as many training windows first

A hit rate is of rows looked up: `lookups` counts each, `distinct` each once a window of 256 tokens.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator

import numpy as np

from engram_jax.config import load_config
from engram_jax.data.pipeline import Pipeline, PreparedData, prepare
from engram_jax.inference.stores.cache import HostCache
from engram_jax.inference.stores.device_cache import count_ids, hot_ids
from engram_jax.inference.stores.host import HostRows

SHARES = (0.001, 0.003, 0.01, 0.03, 0.1)  # of a table's rows
ENTRY_BYTES = 4 + 41  # bytes of a row of width 1 in a HostCache


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--source", nargs="+", default=["wiki"])
  parser.add_argument("--rows-per-head", type=int, nargs="+", default=[20_000, 200_000, 2_000_000])
  parser.add_argument("--windows", type=int, default=20_000, help="training windows to read")
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  args = parser.parse_args()
  results = [
    result
    for source, rows in itertools.product(args.source, args.rows_per_head)
    for result in measure(source, rows, args.windows)
  ]
  for result in results:
    print(
      "  ".join(
        f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v:,}" if isinstance(v, int) else v
        for k, v in result.items()
      ),
      file=sys.stderr,
    )
  if args.json:
    print(json.dumps({"hit_rates": results}))


def measure(source: str, rows_per_head: int, windows: int) -> list[dict]:
  """Hit rates of one table at each share of its rows."""
  log = lambda text: print(text, file=sys.stderr)
  changes = {"model.engram.heads": 8, "model.engram.rows_per_head": rows_per_head}
  data = prepare(load_config("configs/tiny.yaml", changes | {"data.source": source}), log)
  count = min(windows, len(data.training_pipeline(1).examples))
  training = list(itertools.islice(row_ids(data.training_pipeline(1)), count))
  validation = list(row_ids(data.validation_pipeline(1)))
  counts = count_ids(training, 1)
  layout = data.vocabulary.layout
  assert layout is not None
  rows = layout.rows[layout.layers[0]]
  results = []
  for share in SHARES:
    entries = int(share * rows)
    hot = hot_ids(counts, entries)[0]
    lookups, distinct = fixed(hot, validation)
    results.append(
      {
        "source": source,
        "rows": rows,
        "rows_in_training": len(counts[0].ids),
        "training_tokens": count * 256,
        "share": share,
        "places": entries,
        "fixed_lookups": lookups,
        "fixed_distinct": distinct,
        "adaptive_distinct": adaptive(entries, data, training, validation),
      }
    )
  return results


def row_ids(pipeline: Pipeline) -> Iterator[np.ndarray]:
  """Row ids [1, n, J] of each window's tokens; filling at a corpus' end is left out."""
  for step in itertools.count():
    if pipeline.seed is None and step == pipeline.steps_per_epoch:
      return
    batch = pipeline.batch_at(step)
    yield batch["row_ids"][:, batch["mask"]]


def fixed(hot: np.ndarray, validation: list[np.ndarray]) -> tuple[float, float]:
  """The shares that are among `hot`: of all lookups, and of distinct rows a window."""
  hits = np.zeros(2)
  lookups = np.zeros(2)
  for ids in validation:
    for i, looked_up in enumerate((ids.reshape(-1), np.unique(ids))):
      hits[i] += np.isin(looked_up, hot).sum()
      lookups[i] += looked_up.size
  return tuple((hits / lookups).tolist())


def adaptive(
  entries: int, data: PreparedData, training: list[np.ndarray], validation: list[np.ndarray]
) -> float:
  """The share of distinct rows a window that a HostCache has; rows are one number wide."""
  layout, compressor = data.vocabulary.layout, data.vocabulary.compressor
  assert layout is not None
  tables = [np.zeros((layout.rows[x], 1), np.float32) for x in layout.layers]
  store = HostRows.from_tables(tables, layout, compressor.digest)
  cache = HostCache(store, entries * ENTRY_BYTES)
  for ids in training:
    cache.fetch(ids)
  cache.telemetry.reset()
  for ids in validation:
    cache.fetch(ids)
  return cache.telemetry.as_dict()["hit_rate"]


if __name__ == "__main__":
  main()
