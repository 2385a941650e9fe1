"""Runs are exported as safetensors and imported bit for bit; released memories are copied."""

import contextlib
import functools
import hashlib
import json
import operator
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import (
  QWEN,
  qwen_tensors,
  read_folder,
  tokenizer,
  v41_config,
  v41_tensors,
  write_folder,
)

from engram_jax import __main__ as package
from engram_jax.commands.convert_runs import check_export
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.run_directory import open_run
from engram_jax.data.pipeline import prepare
from engram_jax.errors import ConfigError, StorageError
from engram_jax.inference.stores.file import FileRows
from engram_jax.interop.digests import dump_digests
from engram_jax.interop.folder import Folder
from engram_jax.interop.reader import MemoryReader
from engram_jax.memory.codecs import decode, encode
from engram_jax.memory.compress import TokenCompressor
from engram_jax.training.state import flush, make_setup, restore_state

# Rows that lag behind and are stored in two bytes: an export must bring them up to date first.
pytestmark = pytest.mark.usefixtures("beside_the_text")
OPTIONS = ("--train.optimizer.table", "adam_catch_up", "--model.engram.table_dtype", "bfloat16")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def run(lab):
  """The folder of a run whose last checkpoints are of steps 16 and 24."""
  done = lab.training(lab.folder / "runs", *OPTIONS)
  assert done.code == 0, done.err
  return lab.folder / "runs" / "t"


@pytest.fixture(scope="module")
def command(lab):
  """`python -m engram_jax ...` in this process."""
  return lambda *argv: lab.run(package, *argv)


@pytest.fixture(scope="module")
def exported(lab, run, command):
  folder = lab.folder / "exported"
  done = command(
    "convert", "export", "--run", run, "--to", folder, "--shard_bytes", 20_000, "--json"
  )
  assert done.code == 0, done.err
  result = json.loads(done.out)
  assert (result["folder"], result["step"]) == (str(folder), 24)
  return folder


@pytest.fixture(scope="module")
def imported(lab, exported, command):
  folder = lab.folder / "again" / "t"
  done = command("convert", "import", "--from", exported, "--run", folder)
  assert done.code == 0, done.err
  return folder


def load_state(run: pathlib.Path):
  """Loads (state, hash layout) of step 24 as eval.py does."""
  cfg = open_run(run)
  layout = prepare(cfg, lambda _: None).vocabulary.layout
  setup = make_setup(cfg, layout)
  with Checkpoints(run / "checkpoints", keep=None) as checkpoints:
    state = restore_state(checkpoints, 24, setup)
  return flush(setup, state), layout


def bits(tree) -> list[tuple[np.dtype, bytes]]:
  return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def test_parameters_and_tables_come_back_bit_for_bit(run, imported):
  before, _ = load_state(run)
  after, _ = load_state(imported)
  assert jax.tree.structure(before.params) == jax.tree.structure(after.params)
  for part in ("params", "biases", "step"):
    assert bits(getattr(before, part)) == bits(getattr(after, part)), part
  assert before.tables.tables.keys() == after.tables.tables.keys() == {1}
  assert bits(before.tables.tables) == bits(after.tables.tables)
  assert after.tables.tables[1].dtype == "bfloat16"
  assert np.asarray(after.tables.tables[1], np.float32).any()


def test_the_imported_run_evaluates_to_the_same_figures(lab, run, imported):
  argv = ("--json", "--tokens", "4")
  before, after = (lab.evaluation(folder, *argv) for folder in (run, imported))
  assert before.code == after.code == 0, before.err + after.err
  before, after = json.loads(before.out), json.loads(after.out)
  assert before.pop("run") != after.pop("run")
  assert before == after


def test_an_import_of_an_earlier_step_goes_on_training(lab, run, command, tmp_path):
  assert command("convert", "export", "--run", run, "--to", tmp_path / "e", "--step", 16).code == 0
  done = command("convert", "import", "--from", tmp_path / "e", "--run", tmp_path / "runs" / "t")
  assert done.code == 0, done.err
  done = lab.training(tmp_path / "runs", *OPTIONS)
  assert done.code == 0, done.err
  assert "after step 16" in done.err


def test_exporting_the_import_gives_the_same_bytes(exported, imported, command, tmp_path):
  argv = ("--run", imported, "--to", tmp_path / "e", "--shard_bytes", 20_000)
  assert command("convert", "export", *argv).code == 0
  names = {path.name for path in exported.iterdir()}
  assert {path.name for path in (tmp_path / "e").iterdir()} == names
  for name in names:
    assert (tmp_path / "e" / name).read_bytes() == (exported / name).read_bytes(), name


def test_the_safetensors_library_reads_the_state_of_the_export(run, exported):
  state, layout = load_state(run)
  weight_map = json.loads((exported / INDEX).read_text())["weight_map"]
  assert len(set(weight_map.values())) > 2
  expected = {
    "params.blocks.1.engram.w_key": state.params["blocks"][1]["engram"]["w_key"],
    "params.head": state.params["head"],
    "biases.blocks.1.moe.bias": state.biases["blocks"][1]["moe"]["bias"],
    "tables.1.weight": state.tables.tables[1][: layout.rows[1]],
  }
  for name, array in expected.items():
    with safetensors.safe_open(exported / weight_map[name], "np") as file:
      found = file.get_tensor(name)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, np.asarray(array), err_msg=name)


def test_a_reader_of_the_export_finds_what_the_run_holds(run, exported):
  state, layout = load_state(run)
  with MemoryReader(exported) as reader:
    reading = reader.read("def f(x):")
    assert reader.memory.layout == layout
    rows = reader.rows(1, reading.row_ids[1])
    table = np.asarray(state.tables.tables[1], np.float32)
    np.testing.assert_array_equal(rows, table[reading.row_ids[1]])
    module = reader.module(1)
    for name, array in state.params["blocks"][1]["engram"].items():
      np.testing.assert_array_equal(getattr(module, name)[...], array)


def test_nothing_of_the_machine_leaves_with_an_export(lab, run, exported, imported):
  text = lab.config.parent / "text"
  assert open_run(run).data.path == str(text)
  for path in exported.rglob("*.json"):
    for word in (str(lab.folder), str(text.parent), str(pathlib.Path.home())):
      assert word not in path.read_text(), path
  cfg = open_run(imported)
  assert (cfg.data.path, cfg.data.cache) == ("text", None)
  assert cfg.model_copy(update={"data": None, "run": None}) == open_run(run).model_copy(
    update={"data": None, "run": None}
  )


def test_an_imported_run_finds_text_that_lies_elsewhere(lab, run, imported, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  argv = ("--json", "--tokens", "0")
  lost = lab.evaluation(imported, *argv)
  assert lost.code == 2
  assert "data.path='text': no such file or folder" in lost.err
  found = lab.evaluation(imported, *argv, "--data_path", lab.config.parent / "text")
  assert found.code == 0, found.err
  here, there = json.loads(found.out), json.loads(lab.evaluation(run, *argv).out)
  assert here["memory_on"] == there["memory_on"]


def test_a_run_is_not_written_over(run, exported, command):
  before = sorted(path.name for path in exported.parent.iterdir())
  for argv in (
    ("export", "--run", run, "--to", exported),
    ("import", "--from", exported, "--run", run),
    ("memory", "--from", exported, "--to", exported),
  ):
    done = command("convert", *argv)
    assert done.code == 2
    assert "exists already" in done.err
  assert sorted(path.name for path in exported.parent.iterdir()) == before


def edit_config(change):
  def damage(folder: pathlib.Path) -> None:
    tree = json.loads((folder / "config.json").read_text())
    change(tree)
    (folder / "config.json").write_text(json.dumps(tree))

  return damage


def seal(folder: pathlib.Path) -> None:
  """Writes the digests of the files that are there now, as one who edits an export must."""
  (folder / "SHA256SUMS").unlink()
  digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
  text = dump_digests({path.name: digest(path) for path in folder.iterdir()})
  (folder / "SHA256SUMS").write_text(text)


def model(**fields):
  return edit_config(lambda tree: tree["config"]["model"].update(fields))


def engram(**fields):
  return edit_config(lambda tree: tree["config"]["model"]["engram"].update(fields))


def reverse_multipliers(tree: dict) -> None:
  tree["meaning"]["hash_layout"]["multipliers"]["1"].reverse()


def shard_of(folder: pathlib.Path, name: str) -> pathlib.Path:
  return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def truncate_shard(folder: pathlib.Path) -> None:
  path = shard_of(folder, "tables.1.weight")
  path.write_bytes(path.read_bytes()[:-1])


def utf_16(folder: pathlib.Path) -> None:
  path = folder / "config.json"
  path.write_text(path.read_text(), encoding="utf-16")


def other_tokenizer(folder: pathlib.Path) -> None:
  (folder / "tokenizer.json").write_text(tokenizer().to_str())


@pytest.mark.parametrize(
  ("damage", "code", "message"),
  [
    (other_tokenizer, 2, "tokenizer_digest is"),
    (truncate_shard, 5, "is truncated"),
    (lambda f: shard_of(f, "params.head").unlink(), 5, "is missing"),
    (model(width=32), 2, "but the config asks for"),
    (
      model(layers=3),
      2,
      "has no tensor params.blocks.2",
    ),
    (model(layers=1), 2, "layers"),
    (
      engram(heads=3),
      2,
      "hash_layout.heads is 2",
    ),
    (
      edit_config(reverse_multipliers),
      2,
      "multipliers",
    ),
    (
      engram(table_dtype="float32"),
      2,
      "BF16",
    ),
    (edit_config(lambda t: t["config"].update(lyers=3)), 2, "lyers"),
    (edit_config(lambda t: t.update(format=2)), 2, "reads format 1"),
    (edit_config(lambda t: t.update(step="24")), 2, "step is '24'"),
    (edit_config(lambda t: t.update(step=10**12)), 2, "step is 1000000000000"),
    (edit_config(lambda t: t["meaning"].update(hash_layout=[1])), 2, "hash_layout is [1]"),
    (
      edit_config(lambda t: t["meaning"].update(hash_layout=None)),
      2,
      "hash_layout.dialect is missing there",
    ),
    (edit_config(lambda t: t["meaning"].update(hash_layout_digest="")), 2, "digest is  there"),
    (edit_config(lambda t: t["meaning"].update(more=float("nan"))), 2, "cannot be kept"),
    (model(layers=10**9), 2, "model.layers is 1000000000"),
    (utf_16, 5, "is not JSON"),
    (
      edit_config(lambda t: t.update(model_type="llama")),
      2,
      "is not one that",
    ),
  ],
)
def test_exports_that_do_not_fit_are_refused_and_leave_nothing(
  exported, command, tmp_path, damage, code, message
):
  copy = shutil.copytree(exported, tmp_path / "copy")
  damage(copy)
  seal(copy)
  done = command("convert", "import", "--from", copy, "--run", tmp_path / "runs" / "t")
  assert done.code == code, done.err
  assert message in done.err
  assert done.err.startswith("error: ")
  assert done.err.count("\n") == 1
  remaining = list((tmp_path / "runs").iterdir()) if (tmp_path / "runs").exists() else []
  assert remaining == []


def paths_in(tree, path=()):
  """Yields the path of every value in nested dicts and lists."""
  yield path
  for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
    yield from paths_in(tree[key], (*path, key))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_fuzzed_export_config_fits_or_is_refused(exported, tmp_path_factory, data):
  """Exchanges one value for a hostile one."""
  folder = tmp_path_factory.mktemp("fuzz")
  for path in set(exported.iterdir()) - {exported / "SHA256SUMS"}:  # which would refuse all
    (folder / path.name).symlink_to(path)
  tree = {"all": json.loads((exported / "config.json").read_text())}
  *above, last = ("all", *data.draw(st.sampled_from(list(paths_in(tree["all"])))))
  functools.reduce(operator.getitem, above, tree)[last] = data.draw(
    st.sampled_from([None, [], [1], {}, "x", -1, 0, True, 0.5, 10**12, 2**70, float("nan")])
  )
  (folder / "config.json").unlink()
  (folder / "config.json").write_text(json.dumps(tree["all"]))
  with contextlib.suppress(ConfigError, StorageError), Folder(folder) as opened:
    check_export(opened, tmp_path_factory.getbasetemp() / "new" / "t")


def test_a_damaged_run_is_not_exported(run, command, tmp_path):
  copy = shutil.copytree(run, tmp_path / "t")
  (copy / "tokenizer.json").write_text(tokenizer().to_str())
  done = command("convert", "export", "--run", copy, "--to", tmp_path / "e")
  assert done.code == 2
  assert "another tokenizer" in done.err
  shutil.copy(run / "tokenizer.json", copy / "tokenizer.json")
  largest = max(
    (copy / "checkpoints/step_00000024/state").rglob("*"), key=lambda p: p.stat().st_size
  )
  largest.write_bytes(largest.read_bytes()[:-1])
  done = command("convert", "export", "--run", copy, "--to", tmp_path / "e", "--step", 24)
  assert done.code == 5, done.err
  assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]


def test_a_run_without_its_tokenizer_is_refused_with_the_name_of_the_file(run, command, tmp_path):
  copy = shutil.copytree(run, tmp_path / "t")
  (copy / "tokenizer.json").unlink()
  for argv in (
    ("convert", "export", "--run", copy, "--to", tmp_path / "e"),
    ("convert", "table", "--run", copy, "--to", tmp_path / "t.engram"),
    ("generate", "--run", copy, "--prompt", "x"),
  ):
    done = command(*argv)
    assert done.code == 2
    assert f"run {copy}: no tokenizer.json there" in done.err
    assert done.err.count("\n") == 1
  assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["export", "--to", "x"], "--run"),
    (["export", "--run", "nowhere", "--to", "x"], "no config.yaml"),
    (["import", "--from", "nowhere", "--run", "x"], "no config.json"),
    (["exprot"], "cannot convert to 'exprot'"),
  ],
)
def test_bad_options_leave_with_2(command, argv, message):
  done = command("convert", *argv)
  assert done.code == 2
  assert message in done.err + done.out
  assert not pathlib.Path("x").exists()


RELEASED = {
  "v41": (
    v41_config(TokenCompressor.from_tokenizer(tokenizer()).size),
    v41_tensors(),
    lambda name: ".engram." in name,
  ),
  "qwen_bf16": ({"text_config": QWEN}, qwen_tensors(), lambda name: ".ple." in name),
  "qwen_fp8": ({"text_config": QWEN}, qwen_tensors("F8_E4M3"), lambda name: ".ple." in name),
}


@pytest.mark.parametrize("kind", RELEASED)
@pytest.mark.parametrize("shard_bytes", [1, 30_000, 10**9])
def test_a_released_memory_is_copied_byte_for_byte(command, tmp_path, kind, shard_bytes):
  config, tensors, belongs = RELEASED[kind]
  write_folder(tmp_path / "a", config, tensors, shards=3)
  argv = ("--from", tmp_path / "a", "--to", tmp_path / "b", "--shard_bytes", shard_bytes)
  done = command("convert", "memory", *argv)
  assert done.code == 0, done.err
  expected = {name: tensor for name, tensor in tensors.items() if belongs(name)}
  assert read_folder(tmp_path / "b") == expected
  for file in (tmp_path / "b").glob("*.safetensors"):
    data = sum(
      len(expected[n].data) for n, f in weight_map(tmp_path / "b").items() if f == file.name
    )
    assert data <= shard_bytes or list(weight_map(tmp_path / "b").values()).count(file.name) == 1
  with MemoryReader(tmp_path / "a") as there, MemoryReader(tmp_path / "b") as here:
    for layer in there.layers:
      ids = np.arange(there.memory.layout.rows[layer])
      np.testing.assert_array_equal(there.rows(layer, ids), here.rows(layer, ids))


@pytest.mark.parametrize("kind", RELEASED)
@pytest.mark.parametrize("dtype", ["f32", "fp8_e4m3"])
def test_a_table_file_of_a_released_memory_has_its_rows(command, tmp_path, kind, dtype):
  config, tensors, _ = RELEASED[kind]
  write_folder(tmp_path / "a", config, tensors, shards=3)
  argv = ("--from", tmp_path / "a", "--to", tmp_path / "t.engram", "--dtype", dtype)
  done = command("convert", "rows", *argv)
  assert done.code == 0, done.err
  with MemoryReader(tmp_path / "a") as reader, FileRows(tmp_path / "t.engram") as store:
    store.verify()
    store.require(reader.memory.layout, reader.memory.compressor.digest)
    for layer in reader.layers:
      ids = np.arange(reader.memory.layout.rows[layer])
      rows = reader.rows(layer, ids)
      by_blocks = np.concatenate(list(reader.memory.tables[layer].blocks(7)))
      np.testing.assert_array_equal(by_blocks, rows)
      if dtype == "fp8_e4m3" and kind != "v41":  # whose rows have that encoding already
        rows = decode(*encode(rows, dtype), dtype)
      np.testing.assert_array_equal(store.fetch_layer(layer, ids), rows)


def test_a_single_number_is_copied_too(command, tmp_path):
  config, tensors, _ = RELEASED["qwen_fp8"]
  name = next(name for name in tensors if name.endswith("weight_scale"))
  tensors = tensors | {name: tensors[name]._replace(shape=())}
  write_folder(tmp_path / "a", config, tensors, shards=1)
  done = command("convert", "memory", "--from", tmp_path / "a", "--to", tmp_path / "b")
  assert done.code == 0, done.err
  assert read_folder(tmp_path / "b")[name] == tensors[name]


def weight_map(folder: pathlib.Path) -> dict[str, str]:
  return json.loads((folder / INDEX).read_text())["weight_map"]


def test_inspect_prints_tokens_ids_and_norms(command, tmp_path):
  config, tensors, _ = RELEASED["v41"]
  write_folder(tmp_path / "a", config, tensors, shards=1)
  argv = ("inspect", "--checkpoint", tmp_path / "a", "--text", "The [/horse]")
  done = command(*argv, "--json")
  assert done.code == 0, done.err
  assert done.out.count("\n") == 1
  result = json.loads(done.out)
  assert result["kind"] == "deepseek_v41"
  assert "".join(token["text"] for token in result["tokens"]) == "The [/horse]"
  T, J = len(result["tokens"]), 6
  with MemoryReader(tmp_path / "a") as reader:
    for layer in ("1", "3"):
      assert np.shape(result["row_ids"][layer]) == np.shape(result["row_norms"][layer]) == (T, J)
      rows = reader.rows(int(layer), np.array(result["row_ids"][layer]))
      expected = np.sqrt((rows.astype(np.float64) ** 2).sum(-1))
      np.testing.assert_allclose(result["row_norms"][layer], expected, rtol=1e-6)
  assert all(int(m) % 2 for m in result["multipliers"]["1"])
  text = command(*argv)
  assert text.code == 0, text.err
  assert "'he'" in text.out or "'e'" in text.out
  assert f"{result['rows']['1']:,} rows" in text.out
  assert "row_ids" not in json.loads(
    command("inspect", "--checkpoint", tmp_path / "a", "--json").out
  )
  assert command("inspect", "--checkpoint", tmp_path / "a", "--text", "").code == 2


def test_the_norm_of_a_nan_row_is_null_in_json(command, tmp_path):
  config, tensors, _ = RELEASED["v41"]
  name = "layers.1.engram.embed.weight"
  nan = tensors[name]._replace(data=b"\x7f" * len(tensors[name].data))
  write_folder(tmp_path / "a", config, tensors | {name: nan}, shards=1)
  argv = ("inspect", "--checkpoint", tmp_path / "a", "--text", "horse")
  result = json.loads(command(*argv, "--json").out, parse_constant=pytest.fail)
  assert {norm for norms in result["row_norms"]["1"] for norm in norms} == {None}
  assert "nan" in command(*argv).out


def drop_byte(folder: pathlib.Path) -> None:
  path = shard_of(folder, "layers.1.engram.embed.weight")
  path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("argv", [("inspect", "--checkpoint"), ("convert", "memory", "--from")])
@pytest.mark.parametrize(
  ("damage", "code"),
  [
    (drop_byte, 5),
    (lambda f: shard_of(f, "layers.1.engram.embed.weight").unlink(), 5),
    (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}'), 2),
    (edit_config(lambda t: t["text_config"].update(engram_vocab_size=59)), 2),
  ],
)
def test_a_damaged_release_is_one_line_and_a_code(command, tmp_path, argv, damage, code):
  config, tensors, _ = RELEASED["v41"]
  write_folder(tmp_path / "a", config, tensors, shards=3)
  damage(tmp_path / "a")
  to = ("--to", tmp_path / "b") if "memory" in argv else ()
  done = command(*argv, tmp_path / "a", *to)
  assert (done.code, done.out) == (code, "")
  assert done.err.startswith("error: ")
  assert done.err.count("\n") == 1
  assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_inspect_refuses_a_folder_that_is_no_checkpoint(command, tmp_path):
  assert command("inspect", "--checkpoint", tmp_path).code == 2
