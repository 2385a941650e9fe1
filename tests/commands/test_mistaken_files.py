"""A common mistake is named: a file that git-lfs did not fetch, a folder of another kind."""

import json
import pathlib
import shutil
import subprocess

import pytest

from engram_jax.commands import analyze, convert, generate, inspect, serve
from engram_jax.core import manifest
from engram_jax.core.run_directory import open_run
from engram_jax.core.step_folders import StepFolders
from engram_jax.errors import ConfigError, EngramError, StorageError
from engram_jax.inference.load import PlacementArgs
from engram_jax.inference.stores.file import FileRows
from engram_jax.interop.digests import require_digest
from engram_jax.interop.safetensors import SafetensorsFile
from engram_jax.memory.vocabulary import read_tokenizer

POINTER = (
  "version https://git-lfs.github.com/spec/v1\n"
  "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
NAMED = r"is a git-lfs pointer: the file itself was not fetched; `git lfs pull` fetches it"


def point(path: pathlib.Path) -> pathlib.Path:
  path.write_text(POINTER)
  return path


@pytest.mark.parametrize(
  "read",
  [
    SafetensorsFile,
    FileRows,
    read_tokenizer,
    lambda path: require_digest(path, "0" * 64),
    lambda path: manifest.read(path.parent),
  ],
)
def test_a_pointer_is_named_whoever_reads_it(tmp_path, read):
  path = point(tmp_path / manifest.NAME)
  with pytest.raises(EngramError, match=NAMED) as caught:
    read(path)
  assert str(path) in str(caught.value)


@pytest.mark.parametrize(
  ("content", "what"),
  [
    (b"<!DOCTYPE html><html><body>Access denied", "an HTML page"),
    (b"\n<html lang=en>" + bytes(300), "an HTML page"),
    (b"PK\x03\x04\x14\0\0\0\x08\0" + bytes(300), "a zip archive"),
    (b"\x28\xb5\x2f\xfd" + b"\xff" * 300, "Zstandard data"),
  ],
)
@pytest.mark.parametrize("read", [SafetensorsFile, FileRows])
def test_other_files_are_named(tmp_path, content, what, read):
  (tmp_path / "x").write_bytes(content + bytes(40))
  with pytest.raises(StorageError, match=rf"x is {what}"):
    read(tmp_path / "x")


@pytest.fixture(scope="module")
def export(trained, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("export") / "out"
  assert convert.main(["export", "--run", str(trained), "--to", str(folder)]) == 0
  return folder


EXPORTED = ["config.json", "tokenizer.json", "*.safetensors", "SHA256SUMS"]


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("verify", [True, False])
def test_pointers_in_an_export_are_named(export, tmp_path, name, verify):
  folder = tmp_path / "out"
  shutil.copytree(export, folder)
  path = point(next(folder.glob(name)))
  words = ["import", "--from", str(folder), "--run", str(tmp_path / "run")]
  if name == "SHA256SUMS" and not verify:
    pytest.skip("it is not read")
  with pytest.raises(StorageError, match=NAMED) as caught:
    convert.main(words if verify else [*words, "--no-verify"])
  assert str(path) in str(caught.value)


def test_pointers_in_a_checkpoint_are_no_damage(trained, tmp_path):
  run = tmp_path / "t"
  shutil.copytree(trained, run)
  folders = StepFolders(run / "checkpoints")
  for step in folders.steps():
    for path in folders.path(step).rglob("*"):
      if path.is_file() and path.name != manifest.NAME and path.stat().st_size > 1000:
        point(path)
  with pytest.raises(StorageError, match=rf"\(unreadable\): step 24: .*{NAMED}"):
    folders.newest_valid(print)
  point(run / "checkpoints.json")
  with pytest.raises(StorageError, match=rf"checkpoints\.json {NAMED}"):
    folders.newest_valid(print)
  point(run / "config.yaml")
  with pytest.raises(ConfigError, match=NAMED):
    open_run(run)


def commands(path: pathlib.Path, lab, to: pathlib.Path) -> dict:
  """Commands that take a run, each as a function without arguments."""
  run = ("--run", str(path))
  return {
    "generate": lambda: generate.main([*run, "--prompt", "a"]),
    "serve": lambda: serve.main(run),
    "analyze": lambda: analyze.main(["gates", *run, "--text", "a"]),
    "table": lambda: convert.main(["table", *run, "--to", str(to)]),
    "export": lambda: convert.main(["export", *run, "--to", str(to)]),
  }


@pytest.mark.parametrize("command", ["generate", "serve", "analyze", "table", "export", "eval"])
def test_an_export_names_convert_import(export, lab, tmp_path, command):
  advice = f"convert import --from {export} --run runs/NAME"
  if command == "eval":
    done = lab.evaluation(export)
    assert (done.code, advice in done.err) == (2, True), done.err
    return
  with pytest.raises(ConfigError, match="it is an export") as caught:
    commands(export, lab, tmp_path / "to")[command]()
  assert advice in str(caught.value)


@pytest.mark.parametrize(
  ("files", "says"),
  [
    ({"config.json": {"model_type": "llama"}}, r"a model folder \(model_type 'llama'\)"),
    ({"config.json": {"architectures": []}}, "a model folder, not a run"),
    ({"config.json": ["?"], "model.safetensors": {}}, "a model folder, not a run"),
    ({"model-00001-of-00002.safetensors": {}}, "a model folder, not a run"),
  ],
)
def test_a_model_folder_names_convert_import_too(tmp_path, files, says):
  for name, content in files.items():
    (tmp_path / name).write_text(json.dumps(content))
  with pytest.raises(ConfigError, match=rf"{says}.*`convert import` makes a run of") as caught:
    open_run(tmp_path)
  assert "None" not in str(caught.value)


def test_folders_near_a_run_name_it(tmp_path):
  with pytest.raises(ConfigError, match=r"no config\.yaml there; no such folder"):
    open_run(tmp_path / "nothing")
  with pytest.raises(ConfigError, match=r"give a folder that train\.py wrote"):
    open_run(tmp_path)
  run = tmp_path / "runs" / "tiny"
  (run / "checkpoints" / "step_00000001").mkdir(parents=True)
  (run / "config.yaml").write_text("")
  with pytest.raises(ConfigError, match="it holds runs: give one of tiny in it"):
    open_run(tmp_path / "runs")
  for inner in (run / "checkpoints", run / "checkpoints" / "step_00000001"):
    with pytest.raises(ConfigError, match=rf"it lies in the run {run}: give that folder"):
      open_run(inner)
  with pytest.raises(ConfigError, match="it is a file"):
    open_run(run / "config.yaml")
  with pytest.raises(ConfigError, match=rf"it is a run: `convert export --run {run}"):
    inspect.main(["--checkpoint", str(run)])


def test_no_table_is_said_in_words():
  with pytest.raises(ConfigError, match="--placement file without --table: a file of") as caught:
    PlacementArgs(placement="file").check()
  assert "None" not in str(caught.value)


def test_a_real_pointer_is_known(tmp_path):
  """One that git-lfs made, where it is installed."""
  if shutil.which("git-lfs") is None:
    pytest.skip("git-lfs is not installed")
  (tmp_path / "x").write_bytes(b"some content")
  done = subprocess.run(["git-lfs", "pointer", "--file", tmp_path / "x"], capture_output=True)
  (tmp_path / "p").write_bytes(done.stdout)
  with pytest.raises(ConfigError, match=NAMED):
    read_tokenizer(tmp_path / "p")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_pointer_in_place_of_a_template_is_named(tmp_path, name):
  point(tmp_path / name)
  with pytest.raises(ConfigError, match=rf"{name}: {NAMED}"):
    serve.read_template(tmp_path)


def test_a_warm_start_from_an_export_names_convert_import(export, lab, tmp_path):
  for words in ((), ("--config", lab.config)):
    done = lab.run(lab.train, *words, "--run.root", tmp_path, "--train.init_from", export)
    assert done.code == 2
    assert f"convert import --from {export} --run runs/NAME" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["x" * 5000, "a/" * 3000, "nul\0"])
def test_a_path_that_cannot_be_is_no_run(path):
  with pytest.raises(ConfigError, match=r"no config\.yaml there; ") as caught:
    open_run(path)
  assert len(str(caught.value)) < 1200
