"""`convert table`: a run's rows as a file, bit for bit, also where a lazy optimizer is behind."""

import contextlib
import dataclasses
import io
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from miniatures import tokenizer

from engram_jax.commands import convert
from engram_jax.config import load_config
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.run_directory import open_run
from engram_jax.core.schedule import learning_rate
from engram_jax.errors import ConfigError, StorageError
from engram_jax.inference.decoder import Weights
from engram_jax.inference.load import LoadedModel, load_model, table_provenance
from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.write import write_table_file
from engram_jax.memory.codecs import decode, encode
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.table import padded_rows
from engram_jax.memory.vocabulary import Vocabulary
from engram_jax.tables import saved_run
from engram_jax.tables.saved_run import load_run
from engram_jax.tables.table_optimizer import table_optimizer
from engram_jax.training.state import flush, make_setup, restore_state

STEP = 6
# A rate that changes at every step, as rows that catch up must notice.
RATE = {"train.optimizer.learning_rate": 0.01, "train.schedule.warmup_steps": 2 * STEP}
OPTIMIZERS = {  # rows that lag behind, in both types, and rows that never do
  "adam_catch_up": {"train.optimizer.table": "adam_catch_up"},
  "adam_catch_up-bf16": {
    "train.optimizer.table": "adam_catch_up",
    "model.engram.table_dtype": "bfloat16",
  },
  "adagrad": {"train.optimizer.table": "adagrad"},
}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def run(request, built, tmp_path_factory):
  """A run with two tables after a few steps of their optimizer, and its rows brought up to date."""
  directory = {"run.root": str(tmp_path_factory.mktemp("runs")), "run.name": "t"}
  cfg = load_config(
    built.config, directory | RATE | OPTIMIZERS[request.param] | {"model.engram.layers": [0, 1]}
  )
  engram, tokens = cfg.model.engram, TokenCompressor.identity(cfg.model.vocab_size)
  hash_sizes = (engram.rows_per_head, engram.max_ngram, engram.heads)
  layout = HashLayout.build(engram.dialect, engram.layers, *hash_sizes, tokens.size, 2)
  peak = cfg.train.optimizer.learning_rate
  schedule = learning_rate(cfg.train.schedule, peak, cfg.train.steps)
  optimizer = table_optimizer(cfg.train.optimizer, schedule)
  cfg.run.directory.mkdir(parents=True)
  (cfg.run.directory / "config.yaml").write_text(cfg.to_yaml())
  vocabulary = Vocabulary(tokenizer(), tokens, layout)
  (cfg.run.directory / "tokenizer.json").write_text(vocabulary.tokenizer.to_str())
  states = train_tables(optimizer, layout, engram)
  with Checkpoints(cfg.run.directory / "checkpoints", keep=2) as checkpoints:
    for step, (tables, moments) in states.items():
      state = {"tables": tables, "row_optimizers": moments}
      checkpoints.save(step, state, vocabulary.fingerprint("1" * 64, "2" * 64))
  tables, moments = states[STEP]
  flushed = [optimizer.flush(t, s)[0] for t, s in zip(tables, moments, strict=True)]
  without_pad_rows = lambda tables: [
    np.asarray(t, np.float32)[: layout.rows[x]] for t, x in zip(tables, layout.layers, strict=True)
  ]
  return types.SimpleNamespace(
    path=cfg.run.directory,
    layout=layout,
    tokens=tokens,
    tables=without_pad_rows(flushed),
    saved=without_pad_rows(tables),
    is_lazy=optimizer.is_lazy,
  )


def train_tables(optimizer, layout, engram):
  """{step: (tables, states)} of a few random steps, each of a few rows."""
  rng, result = np.random.default_rng(0), {}
  update, dtype = jax.jit(optimizer.update), jnp.dtype(engram.table_dtype)
  tables = [
    jnp.asarray(rng.normal(size=(padded_rows(layout.rows[x]), engram.row_width)), dtype)
    for x in layout.layers
  ]
  states = [optimizer.init(table) for table in tables]
  for step in range(1, STEP + 1):
    for i, layer in enumerate(layout.layers):
      ids = rng.choice(layout.rows[layer], 100, replace=False).astype(np.int32)
      grads = rng.normal(size=(100, engram.row_width)).astype(np.float32)
      tables[i], states[i] = update(grads, states[i], tables[i], ids)
    result[step] = (tuple(tables), tuple(states))
  return {step: result[step] for step in (3, STEP)}


def call(*argv):
  out = io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
    code = convert.main(list(map(str, argv)))
  return code, out.getvalue()


def rows_of(path, layout):
  with FileRows(path) as store:
    return [store.fetch_layer(x, np.arange(layout.rows[x])) for x in layout.layers]


@pytest.mark.parametrize("block_bytes", [16 << 20, 7 * 4 * 4], ids=["one block", "blocks of 7"])
def test_f32_rows_are_the_checkpoints_bit_for_bit(run, tmp_path, monkeypatch, block_bytes):
  monkeypatch.setattr(saved_run, "BLOCK_BYTES", block_bytes)
  code, out = call("table", "--run", run.path, "--to", tmp_path / "t", "--dtype", "f32", "--json")
  assert code == 0
  assert out.count("\n") == 1
  for rows, expected in zip(rows_of(tmp_path / "t", run.layout), run.tables, strict=True):
    assert np.array_equal(rows.view(np.uint32), expected.view(np.uint32))
  result = json.loads(out)
  with Checkpoints(run.path / "checkpoints", keep=None) as checkpoints:
    manifest = checkpoints.folder(STEP) / "manifest.json"
  digest = json.loads(manifest.read_text())["digest"]
  assert result["source"] == {"run": "t", "step": 6, "digest": digest}
  assert result["bytes"] == (tmp_path / "t").stat().st_size
  assert result["rows"] == {str(x): run.layout.rows[x] for x in run.layout.layers}


def test_rows_of_a_lazy_optimizer_are_behind_in_the_checkpoint(run):
  """Checks that the test above does test bringing rows up to date."""
  behind = any((a != b).any() for a, b in zip(run.saved, run.tables, strict=True))
  assert behind == run.is_lazy


@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8_e4m3"])
def test_other_encodings_are_of_those_rows(run, tmp_path, kind):
  assert call("table", "--run", run.path, "--to", tmp_path / "t", "--dtype", kind)[0] == 0
  for rows, table in zip(rows_of(tmp_path / "t", run.layout), run.tables, strict=True):
    assert np.array_equal(rows, decode(*encode(table, kind), kind))


def test_an_older_step_can_be_chosen(run, tmp_path):
  options = ("--run", run.path, "--to", tmp_path / "t", "--dtype", "f32")
  assert call("table", *options, "--step", 3, "--json")[0] == 0
  with FileRows(tmp_path / "t") as store:
    assert store.header.source["step"] == 3
  older = rows_of(tmp_path / "t", run.layout)
  assert any((a != b).any() for a, b in zip(older, run.tables, strict=True))


def test_the_file_carries_the_runs_hash_and_tokens(run, tmp_path):
  call("table", "--run", run.path, "--to", tmp_path / "t")
  with FileRows(tmp_path / "t") as store:
    store.require(run.layout, run.tokens.digest)
    assert store.header.kind == "fp8_e4m3"


def load_without_weights(run, step=STEP, width=None):
  """A step of the run as `load_model` loads it, without its weights."""
  cfg = open_run(run.path)
  if width:
    engram = cfg.model.engram.model_copy(update={"row_width": width})
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"engram": engram})})
  with load_run(run.path, step, print) as saved:
    digest = table_provenance(saved)["digest"]
  weights = Weights(cfg.model, None, {}, {}, run.layout, run.tokens)
  return LoadedModel(cfg, step, weights, None, 0, run.path, digest)


def test_a_table_file_is_refused_for_another_step(run, tmp_path):
  call("table", "--run", run.path, "--to", tmp_path / "t", "--step", 3, "--dtype", "f32")
  with load_without_weights(run, 3).open_table_file(tmp_path / "t") as store:
    assert store.rows == tuple(run.layout.rows.values())
  for model, message in (
    (
      load_without_weights(run),
      "holds rows of step 3 of run t, not of step 6 of run t: give its --step, or `con",
    ),
    (
      dataclasses.replace(load_without_weights(run, 3), digest="0" * 64),
      "holds rows of another training of step 3 of run t: `convert table --run .* --step 3 --to",
    ),
    (load_without_weights(run, 3, width=8), "has rows of width 4, and step 3 of run t of 8"),
  ):
    with pytest.raises(ConfigError, match=message) as caught:
      model.open_table_file(tmp_path / "t")
    assert caught.value.exit_code == 2


def test_a_file_of_no_run_is_not_for_a_runs_model(run, tmp_path):
  """Such files are written by `convert rows` of another model's checkpoint."""
  tables = dict(zip(run.layout.layers, run.tables, strict=True))
  write_table_file(
    tmp_path / "t",
    lambda layer: [tables[layer]],
    run.layout,
    run.tokens.digest,
    kind="f32",
    width=4,
    source={"checkpoint": "t", "kind": "deepseek_v41"},
  )
  with pytest.raises(ConfigError, match=r"rows of no run that .* not of step 6 of run t"):
    load_without_weights(run).open_table_file(tmp_path / "t")


def test_rows_on_the_host_are_those_of_the_step_in_their_dtype(run, tmp_path):
  model = load_without_weights(run)
  store = model.host_store()
  assert store.kind == ("bf16" if model.config.model.engram.table_dtype == "bfloat16" else "f32")
  call("table", "--run", run.path, "--to", tmp_path / "t", "--dtype", "int8")
  with model.open_table_file(tmp_path / "t") as file:
    encoded = file.in_memory()
  for layer, table in zip(run.layout.layers, run.tables, strict=True):
    all_ids = np.arange(run.layout.rows[layer])
    assert np.array_equal(store.fetch_layer(layer, all_ids), table)
    assert np.array_equal(
      encoded.fetch_layer(layer, all_ids), decode(*encode(table, "int8"), "int8")
    )


def test_bf16_rows_that_were_trained_in_a_file_convert(lab, tmp_path):
  """Their checkpoint holds only the rows that were written, in bfloat16."""
  options = ("--model.engram.placement", "file", "--model.engram.table_dtype", "bfloat16")
  short = ("--train.steps", 3, "--train.optimizer.table", "adam")
  assert lab.training(lab.folder / "file", *options, *short).code == 0
  model = load_model(lab.folder / "file" / "t", None, print)
  (table,), store = model.tables(), model.host_store()
  assert store.kind == "bf16"
  for kind in ("f32", "bf16"):
    assert call("table", "--run", model.run, "--to", tmp_path / kind, "--dtype", kind)[0] == 0
    with model.open_table_file(tmp_path / kind) as file:
      for rows in (file, store):
        all_ids = np.arange(rows.rows[0])
        assert np.array_equal(
          rows.fetch(all_ids[None])[0], table[: len(all_ids)].astype(np.float32)
        )


def test_verify_says_whether_a_file_is_sound(run, tmp_path):
  path = tmp_path / "t"
  call("table", "--run", run.path, "--to", path)
  code, out = call("verify", "--file", path)
  assert code == 0
  assert "fp8_e4m3 rows of width 4, run t, step 6, " in out
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  with pytest.raises(StorageError, match="checksums have changed"):
    call("verify", "--file", path)


def test_nothing_is_overwritten_or_left_behind(run, tmp_path):
  path = tmp_path / "t"
  path.write_text("other")
  with pytest.raises(ConfigError, match="exists and is not overwritten"):
    call("table", "--run", run.path, "--to", path)
  assert path.read_text() == "other"
  with pytest.raises(ConfigError, match="--step 5 is not saved"):
    call("table", "--run", run.path, "--to", tmp_path / "u", "--step", 5)
  with pytest.raises(ConfigError, match=r"no config\.yaml"):
    call("table", "--run", tmp_path, "--to", tmp_path / "u")
  assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_damaged_checkpoint_is_not_converted(run, tmp_path):
  copy = shutil.copytree(run.path, tmp_path / "run")
  for data in (copy / "checkpoints" / "step_00000006" / "state").rglob("d/*"):
    data.write_bytes(data.read_bytes()[:-1] + b"?")
  with pytest.raises(StorageError, match="checkpoint of step 6 cannot be used"):
    call("table", "--run", copy, "--to", tmp_path / "t", "--step", 6)
  assert not (tmp_path / "t").exists()
  code, out = call("table", "--run", copy, "--to", tmp_path / "t", "--json")  # the one before it
  assert (code, json.loads(out)["source"]["step"]) == (0, 3)


def test_unknown_kinds_and_options_leave_with_2(capsys):
  assert convert.main(["tabel"]) == 2
  assert "there are: table" in capsys.readouterr().err
  assert call("--help")[0] == 0
  with pytest.raises(SystemExit) as stopped:
    call("table", "--run", "r", "--to", "t", "--dtype", "fp4")
  assert stopped.value.code == 2


def test_a_trained_run_converts_to_what_evaluation_reads(lab, tmp_path):
  assert lab.training(lab.folder / "runs").code == 0
  path = lab.folder / "runs" / "t"
  assert call("table", "--run", path, "--to", tmp_path / "t", "--dtype", "f32")[0] == 0
  with Checkpoints(path / "checkpoints", keep=None) as checkpoints:
    meta = checkpoints.meta(24)
    layout = HashLayout.from_description(meta["hash_layout"])
    setup = make_setup(open_run(path), layout)
    state = flush(setup, restore_state(checkpoints, 24, setup))
  with FileRows(tmp_path / "t") as store:
    store.require(layout, meta["token_map_digest"])
  for rows, layer in zip(rows_of(tmp_path / "t", layout), layout.layers, strict=True):
    assert np.array_equal(rows, np.asarray(state.tables.tables[layer])[: len(rows)])
