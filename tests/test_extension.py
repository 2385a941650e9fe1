"""A table optimizer and a hash dialect are a new file each, and nothing else of the source."""

import pathlib
import shutil
import subprocess
import sys

import yaml

import engram_jax

OPTIMIZER = '''"""Gradient descent on touched rows."""

from engram_jax.tables.table_optimizer import TableOptimizer, put, rate_at, take, writable


def from_config(cfg, learning_rate):
  return sgd(learning_rate)


def sgd(learning_rate):
  def init(table_RC):
    return ()

  def update(grads_UC, state, table_RC, ids_U, ok=True, *, first_row=0, axes=(), rate_scale=None):
    ids_U = writable(ids_U, table_RC.shape[0], ok)
    rows_UC = take(table_RC, ids_U) - rate_at(learning_rate, 0, rate_scale) * grads_UC
    return put(table_RC, ids_U, rows_UC), state

  return TableOptimizer(init, update)
'''
DIALECT = '''"""Odd numbers in order."""

from engram_jax.memory.hash_layout import Dialect

DIALECT = Dialect(lambda layout, layer: tuple(2 * i + 3 for i in range(layout.max_ngram)))
'''


def test_a_new_optimizer_and_a_new_dialect_are_a_file_each(lab, tmp_path):
  package = pathlib.Path(engram_jax.__file__).parent
  shutil.copytree(package, tmp_path / "engram_jax", ignore=shutil.ignore_patterns("__pycache__"))
  (tmp_path / "engram_jax" / "tables" / "optimizers" / "sgd.py").write_text(OPTIMIZER)
  (tmp_path / "engram_jax" / "memory" / "dialects" / "odd.py").write_text(DIALECT)
  shutil.copy(package.parent / "train.py", tmp_path)
  words = [sys.executable, "train.py", "--config", lab.config, "--run.root", tmp_path / "runs"]
  words += ["--train.steps", 2, "--train.sample_tokens", 0, "--train.checkpoint_every", 2]
  words += ["--train.optimizer.table", "sgd", "--model.engram.dialect", "odd"]
  environment = lab.environment | {"PYTHONPATH": str(tmp_path)}
  done = subprocess.run(
    [str(word) for word in words], cwd=tmp_path, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  config = yaml.safe_load((tmp_path / "runs" / "t" / "config.yaml").read_text())
  assert config["train"]["optimizer"]["table"] == "sgd"
  assert config["model"]["engram"]["dialect"] == "odd"
