"""Manifests with a right digest and wrong content: each is refused in one line, of its kind."""

import json
import os
import pathlib
import shutil

import pytest

from engram_jax.core import manifest
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.manifest import ManifestError, Problem
from engram_jax.errors import StorageError

GOOD = "state/part.bin"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  """A step's folder with one file and a manifest that fits it."""
  folder = tmp_path / "checkpoints" / "step_00000003"
  (folder / "state").mkdir(parents=True)
  (folder / GOOD).write_bytes(b"rows")
  meta = {"hash_layout": None}
  content = manifest.build(folder, step=3, tree={"w": "float32[2,3]", "n": "int32[]"}, meta=meta)
  manifest.write(folder, content)
  return folder


def rewrite(folder: pathlib.Path, change) -> None:
  """Changes the content, or replaces it by what `change` returns, and gives it a right digest."""
  content = manifest.read(folder)
  changed = change(content)
  manifest.write(folder, content if changed is None else changed)


def examine(folder: pathlib.Path) -> Problem:
  """The one problem that reading and verifying find; always in one line, and not a long one."""
  problem = manifest.examine(folder)
  assert problem is not None
  assert manifest.verify(folder) == problem.message
  assert len(problem.message.splitlines()) == 1
  assert len(problem.message) < 500 + len(str(folder))
  assert str(folder) in problem.message
  return problem


def put(*path_and_value):
  """A change: content[a][b] = value."""
  *path, leaf, value = path_and_value

  def change(content) -> None:
    for part in path:
      content = content[part]
    content[leaf] = value

  return change


def lacking(name: str):
  return lambda content: {key: value for key, value in content.items() if key != name}


def named(name: str):
  """A change: the file has another name, at which it may even lie."""
  return lambda content: content | {"files": {name: content["files"][GOOD]}}


WRONG = {
  "null": lambda _: [],
  "a list": lambda content: [content],
  "a text": lambda _: "content",
  "no format": lacking("format"),
  "format true": put("format", True),
  "format 1.0": put("format", 1.0),
  "format a list": put("format", [1]),
  "no step": lacking("step"),
  "step below zero": put("step", -3),
  "step true": put("step", True),
  "step 3.0": put("step", 3.0),
  "step a text": put("step", "3"),
  "step of many digits": put("step", 10**4000),
  "versions a list": put("versions", ["jax"]),
  "a version a number": put("versions", "jax", 10),
  "no meta": lacking("meta"),
  "meta null": put("meta", None),
  "meta a list": put("meta", [1]),
  "no tree": lacking("tree"),
  "tree a list": put("tree", ["w"]),
  "a signature a list": put("tree", "w", ["float32", 2, 3]),
  "a signature without a shape": put("tree", "w", "float32"),
  "a signature with a negative size": put("tree", "w", "float32[-1]"),
  "a signature with more behind": put("tree", "w", "float32[2,3]\n"),
  "a signature of other digits": put("tree", "w", "float32[٣]"),
  "a signature of a huge size": put("tree", "w", f"float32[{'9' * 5000}]"),
  "no files": lacking("files"),
  "files a list": put("files", [GOOD]),
  "a file null": put("files", GOOD, None),
  "a file a text": put("files", GOOD, "f" * 64),
  "a file without bytes": put("files", GOOD, {"sha256": "f" * 64}),
  "bytes a text": put("files", GOOD, "bytes", "4"),
  "bytes below zero": put("files", GOOD, "bytes", -1),
  "bytes 4.0": put("files", GOOD, "bytes", 4.0),
  "bytes above any file": put("files", GOOD, "bytes", 2**64),
  "sha256 a number": put("files", GOOD, "sha256", 5),
  "sha256 too short": put("files", GOOD, "sha256", "f" * 63),
  "sha256 in capitals": put("files", GOOD, "sha256", "F" * 64),
  "a name without letters": named(""),
  "a name above": named("../state/part.bin"),
  "a name above, later": named("state/../../step_00000003/state/part.bin"),
  "an absolute name": named("/etc/passwd"),
  "a name with a dot": named("./state/part.bin"),
  "a name with two slashes": named("state//part.bin"),
  "a name of the folder": named("state/"),
  "a name with NUL": named("state/part\0.bin"),
  "a name with half a pair": named("state/\ud800"),
  "a name of many letters": named("x" * 5000),
  "a huge value": put("step", "3" * 100_000),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_content_with_a_right_digest_is_damage(folder, change):
  rewrite(folder, change)
  assert examine(folder).kind == "damaged"


@pytest.mark.parametrize(
  "text",
  [
    b"",
    b"null",
    b"[]",
    b'{"digest": 1}',
    b'{"digest": "", "content": {}',
    b"\xff\xfe{\0}\0",
    b'{"digest": "", "content": NaN}',
    b'{"digest": "", "content": ' + b"9" * 10_000 + b"}",
    b'{"digest": "", "content": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"digest": [], "content": {}}',
    "\N{BYTE ORDER MARK}{}".encode(),
  ],
)
def test_what_is_no_manifest_is_damage(folder, text):
  (folder / manifest.NAME).write_bytes(text)
  assert examine(folder).kind == "damaged"
  with pytest.raises(ManifestError, match="is damaged") as caught:
    manifest.read(folder)
  assert isinstance(caught.value, StorageError)
  assert caught.value.problem.kind == "damaged"


def test_a_manifest_without_end_is_not_read(folder):
  (folder / manifest.NAME).unlink()
  (folder / manifest.NAME).symlink_to("/dev/zero")
  assert examine(folder) == Problem(
    "damaged", f"{folder / manifest.NAME} is damaged: it is a device, not a file"
  )
  (folder / manifest.NAME).unlink()
  with open(folder / manifest.NAME, "wb") as file:
    file.truncate(1 << 40)
  assert examine(folder).kind == "damaged"


@pytest.mark.parametrize("name", [manifest.NAME, GOOD])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_damage(folder, name):
  (folder / name).unlink()
  os.mkfifo(folder / name)
  assert examine(folder).kind == "damaged"
  (folder / name).unlink()
  (folder / name).mkdir()
  assert examine(folder).kind == "damaged"


def test_what_is_not_there_is_missing(folder):
  assert manifest.examine(folder) is None
  (folder / GOOD).unlink()
  assert examine(folder) == Problem("missing", f"{folder / GOOD} is missing")
  (folder / manifest.NAME).unlink()
  assert examine(folder).kind == "missing"
  shutil.rmtree(folder)
  assert examine(folder).kind == "missing"


@pytest.mark.parametrize("number", ["EACCES", "EPERM", "EIO", "ESTALE", "EMFILE", "EINTR"])
@pytest.mark.parametrize("name", [manifest.NAME, GOOD])
def test_what_the_system_cannot_read_is_not_called_damaged(folder, monkeypatch, name, number):
  code = getattr(__import__("errno"), number)
  opening, stating = os.open, pathlib.Path.stat

  def fail(path, *args, **options):
    if pathlib.Path(path) == folder / name:
      raise OSError(code, os.strerror(code))
    return opening(path, *args, **options)

  def fail_stat(path, **options):
    if path == folder / name:
      raise OSError(code, os.strerror(code))
    return stating(path, **options)

  monkeypatch.setattr(os, "open", fail)
  monkeypatch.setattr(pathlib.Path, "stat", fail_stat)
  problem = examine(folder)
  assert problem.kind == "unreadable"
  assert os.strerror(code) in problem.message


def test_a_format_of_another_version_is_not_called_damaged(folder):
  rewrite(folder, put("format", 2))
  problem = examine(folder)
  assert problem.kind == "unreadable"
  assert "has format 2; this version reads 1" in problem.message


@pytest.mark.parametrize("change", [put("step", "3"), put("files", GOOD, "bytes", None)])
def test_such_a_checkpoint_is_not_used(folder, change):
  rewrite(folder, change)
  with Checkpoints(folder.parent, keep=None) as checkpoints:
    with pytest.raises(StorageError, match=r"step 3: .* is damaged"):
      checkpoints.newest_valid(pytest.fail)
    with pytest.raises(StorageError, match="damaged"):
      checkpoints.meta(3)


def test_what_the_caller_adds_is_kept(folder):
  rewrite(folder, put("meta", {"position": [3, 4], "text": "ü", "none": None}))
  rewrite(folder, put("later", {"a": 1}))
  content = manifest.read(folder)
  assert content["meta"] == {"position": [3, 4], "text": "ü", "none": None}
  assert json.loads((folder / manifest.NAME).read_text())["content"] == content
