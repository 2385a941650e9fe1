"""Nothing of a damaged export is used: its import raises StorageError and leaves no run behind."""

import collections
import contextlib
import hashlib
import io
import json
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from engram_jax import __main__ as package
from engram_jax.commands import convert
from engram_jax.errors import ConfigError, StorageError
from engram_jax.interop.digests import NAME as DIGESTS
from engram_jax.interop.folder import Folder
from engram_jax.interop.reader import MemoryReader

PAGE = 4096


@pytest.fixture(scope="module")
def command(lab):
  """`python -m engram_jax ...` in this process."""
  return lambda *argv: lab.run(package, *argv)


@pytest.fixture(scope="module")
def exported(lab, command) -> pathlib.Path:
  assert lab.training(lab.folder / "runs").code == 0
  folder = lab.folder / "exported"
  argv = ("--run", lab.folder / "runs" / "t", "--to", folder, "--shard_bytes", 20_000)
  done = command("convert", "export", *argv)
  assert done.code == 0, done.err
  return folder


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def damage(rng: np.random.Generator, folder: pathlib.Path) -> tuple[str, set[str]]:
  """(kind of damage, names of the files it touched) of a copy; it differs from the export."""
  names = sorted(path.name for path in folder.iterdir())
  kind = rng.choice(["bit", "cut", "grown", "zeros", "noise", "swapped", "missing", "added"])
  name, other = (str(name) for name in rng.choice(names, 2, replace=False))
  data = bytearray((folder / name).read_bytes())
  at = int(rng.integers(len(data)))
  if kind == "bit":
    data[at] ^= 1 << int(rng.integers(8))
  elif kind == "cut":
    del data[at:]
  elif kind == "grown":
    data += rng.bytes(int(rng.integers(1, PAGE)))
  elif kind == "zeros":
    at -= at % PAGE
    data[at : at + PAGE] = bytes(len(data[at : at + PAGE]))
  elif kind == "noise":
    size = min(int(rng.integers(1, PAGE)), len(data) - at)
    data[at : at + size] = rng.bytes(size)
  elif kind == "swapped":
    data = bytearray((folder / other).read_bytes())
    (folder / other).write_bytes((folder / name).read_bytes())
    (folder / name).write_bytes(data)
    return kind, {name, other}
  elif kind == "missing":
    if name == DIGESTS:  # another test's: without it nothing is verified, which is said
      return damage(rng, folder)
    (folder / name).unlink()
    return kind, {name}
  else:
    name = str(rng.choice(["model.safetensors", "notes.txt", "config.json.orig", "more"]))
    (folder / name).write_bytes(rng.bytes(10))
    return kind, {name}
  if data == (folder / name).read_bytes():
    return damage(rng, folder)
  (folder / name).write_bytes(data)
  return kind, {name}


def imported(folder: pathlib.Path, run: pathlib.Path) -> str:
  """The outcome of importing a folder: "raised" if it was refused as it must be, or "used"."""
  try:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      convert.main(["import", "--from", str(folder), "--run", str(run)])
  except StorageError as error:
    return "raised" if str(folder) in str(error) and "\n" not in str(error) else str(error)
  return "used"


def damage_all(exported: pathlib.Path, folder: pathlib.Path, times: int) -> None:
  """Damages exports `times` times; prints what became of them, and asserts that none was used."""
  rng, counts = np.random.default_rng(times), collections.Counter()
  sound = contents(exported)
  for _ in range(times):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(exported, folder / "e")
    kind, _ = damage(rng, folder / "e")
    left = contents(folder / "e")
    same = left.keys() == sound.keys() and all(
      left[name] == data for name, data in sound.items() if name != DIGESTS
    )
    outcome = imported(folder / "e", folder / "runs" / "t")
    if same and outcome == "used":  # SHA256SUMS changed, and says the same
      outcome = "right"
    counts[kind, outcome] += 1
    assert outcome == "right" or not list(folder.glob("runs/*")), outcome
  for (kind, outcome), n in sorted(counts.items()):
    print(f"{kind:9} {outcome} {n:,}")
  used = sum(n for (_, outcome), n in counts.items() if outcome not in ("raised", "right"))
  print(f"{times} damaged exports: {used} were imported")
  assert counts.total() == times
  assert used == 0


def test_no_damaged_export_is_imported(exported, tmp_path):
  damage_all(exported, tmp_path / "copies", 100)


@pytest.mark.slow
def test_none_of_a_thousand_damaged_exports_is_imported(exported, tmp_path):
  damage_all(exported, tmp_path / "copies", 1000)


def readings(folder: pathlib.Path, to: pathlib.Path) -> tuple[tuple, ...]:
  """The commands that read an exported folder, writing below `to`."""
  return (
    ("convert", "import", "--from", folder, "--run", to / "runs" / "t"),
    ("convert", "memory", "--from", folder, "--to", to / "memory"),
    ("convert", "rows", "--from", folder, "--to", to / "t.engram"),
    ("inspect", "--checkpoint", folder),
  )


def test_an_export_says_the_digest_of_every_file(exported, tmp_path, command):
  """As sha256sum -c reads it; and so does a memory that was copied."""
  done = command("convert", "memory", "--from", exported, "--to", tmp_path / "memory")
  assert done.code == 0, done.err
  for folder in (exported, tmp_path / "memory"):
    files = contents(folder)
    lines = files.pop(DIGESTS).decode().splitlines()
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert lines == [f"{digest}  {name}" for name, digest in sorted(expected.items())]
    if shutil.which("sha256sum"):
      subprocess.run(["sha256sum", "-c", "--strict", DIGESTS], cwd=folder, check=True)


def changed(folder: pathlib.Path, name: str) -> None:
  data = bytearray((folder / name).read_bytes())
  data[-1] ^= 1
  (folder / name).write_bytes(data)


def shard_of(folder: pathlib.Path, tensor: str) -> str:
  return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda f: changed(f, "config.json"), "config.json has changed: its SHA-256 is not the one in"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing: SHA256SUMS lists it"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing: SHA256SUMS lists it"),
    (lambda f: (f / "a").write_text(""), "a was added: SHA256SUMS does not list it"),
    (lambda f: (f / DIGESTS).write_text(""), "SHA256SUMS is damaged: line 1 is no digest and file"),
    (lambda f: (f / DIGESTS).write_bytes(b"\xff"), "SHA256SUMS is damaged: it is no text"),
    (
      lambda f: (f / DIGESTS).write_text(2 * (f / DIGESTS).read_text()),
      "SHA256SUMS is damaged: it lists config.json twice",
    ),
    (
      lambda f: (f / DIGESTS).write_text(f"{'0' * 64}  ../config.json\n"),
      "SHA256SUMS is damaged: line 1",
    ),
  ],
)
def test_a_refused_export_is_one_line_and_code_5(exported, command, tmp_path, change, message):
  copy = shutil.copytree(exported, tmp_path / "copy")
  change(copy)
  for argv in readings(copy, tmp_path):
    done = command(*argv)
    assert (done.code, done.out) == (5, "")
    assert message in done.err
    assert done.err.startswith(f"error: {copy}")
    assert done.err.count("\n") == 1
  assert not list(tmp_path.glob("runs/*"))


def test_an_import_reads_every_file_and_a_memory_those_that_hold_it(exported, command, tmp_path):
  copy = shutil.copytree(exported, tmp_path / "copy")
  name = shard_of(copy, "params.head")
  changed(copy, name)
  done = command("convert", "import", "--from", copy, "--run", tmp_path / "runs" / "t")
  assert done.code == 5
  assert done.err.startswith(f"error: {copy / name} has changed: its SHA-256 is not the one in")
  assert not list(tmp_path.glob("runs/*"))
  done = command("convert", "rows", "--from", copy, "--to", tmp_path / "t.engram")
  assert done.code == 0, done.err


def test_every_row_read_from_a_damaged_export_is_right(exported, tmp_path):
  """A reader opens only the files of the memory, and verifies those."""
  with MemoryReader(exported) as reader:
    text = "def f(x):"
    ids = np.arange(reader.memory.layout.rows[1])
    expected, reading = reader.rows(1, ids), reader.read(text)
  rng, counts = np.random.default_rng(0), collections.Counter()
  for _ in range(60):
    shutil.rmtree(tmp_path / "e", ignore_errors=True)
    shutil.copytree(exported, tmp_path / "e")
    damage(rng, tmp_path / "e")
    try:
      with MemoryReader(tmp_path / "e") as reader:
        is_right = np.array_equal(reader.rows(1, ids), expected)
        is_right &= np.array_equal(reader.read(text).row_ids[1], reading.row_ids[1])
        counts["right" if is_right else "silent"] += 1
    except StorageError:
      counts["raised"] += 1
  print(dict(counts))
  assert counts["raised"]
  assert counts["silent"] == 0


def test_a_folder_without_digests_is_read_and_that_is_said(exported, command, tmp_path):
  copy = shutil.copytree(exported, tmp_path / "copy")
  (copy / DIGESTS).unlink()
  for argv in readings(copy, tmp_path):
    done = command(*argv)
    assert done.code == 0, done.err
    assert done.err.startswith(f"{copy} has no SHA256SUMS: nothing is verified\n")


def test_verification_is_off_by_name_alone_and_that_is_said(exported, command, tmp_path):
  copy = shutil.copytree(exported, tmp_path / "copy")
  changed(copy, shard_of(copy, "tables.1.weight"))
  (copy / "notes.txt").write_text("more")
  done = command("inspect", "--checkpoint", copy)
  assert done.code == 5
  argv = ("convert", "import", "--from", copy, "--run", tmp_path / "runs" / "t", "--no-verify")
  done = command(*argv)
  assert done.code == 0, done.err
  assert done.err == f"{copy} is not compared with its SHA256SUMS: nothing is verified\n"
  with pytest.raises(StorageError, match="was added"):
    Folder(copy)
  (copy / ".cache").mkdir()  # hidden files are never read
  (copy / "notes.txt").unlink()
  with Folder(copy) as folder, pytest.raises(StorageError, match="has changed"):
    folder.verify()
  with pytest.raises(ConfigError, match=r"no config\.json"):
    Folder(tmp_path / "nowhere")
