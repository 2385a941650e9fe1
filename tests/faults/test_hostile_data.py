"""Hostile data files: what is read at once is bounded, and a bad line is named, cut short."""

import gzip
import json
import os
import pathlib
import subprocess
import sys
import tracemalloc

import hypothesis
import pytest
from hypothesis import strategies as st

import engram_jax
from engram_jax.config import DataConfig
from engram_jax.data import decompress, files
from engram_jax.data.download import cache_dir
from engram_jax.data.files import Document
from engram_jax.errors import ConfigError, DataError, EngramError

ROOT = pathlib.Path(engram_jax.__file__).parents[1]
MIB = 1 << 20


def read(source: str, path: pathlib.Path, **fields) -> list[Document]:
  return list(files.read_files(DataConfig(source=source, path=str(path), **fields)))


def refusal(source: str, path: pathlib.Path) -> str:
  with pytest.raises(DataError) as caught:
    read(source, path)
  message = str(caught.value)
  assert len(message.splitlines()) == 1
  assert len(message) < 1000 + len(str(path))
  assert str(path) in message
  return message


def pack(path: pathlib.Path, *parts: tuple[bytes, int]) -> None:
  """Writes a gzip file of blocks, each so many times."""
  path.write_bytes(b"".join(gzip.compress(block) * times for block, times in parts))


@pytest.fixture
def small(monkeypatch) -> None:
  """Limits that a test reaches in no time."""
  monkeypatch.setattr(decompress, "LINE_BYTES", 1000)
  monkeypatch.setattr(decompress, "DOCUMENT_BYTES", 5000)
  monkeypatch.setattr(decompress, "RATIO_START", 100_000)


def test_a_line_without_end_is_refused_before_it_is_held(tmp_path, monkeypatch):
  """A gzip file of 64 KiB that holds a line of 64 MiB, where lines may have 4 MiB."""
  path = tmp_path / "x.jsonl.gz"
  line = b'{"text": "good"}\n'
  pack(path, (line, 3), (b"0" * MIB, 64))
  assert path.stat().st_size < MIB
  monkeypatch.setattr(decompress, "LINE_BYTES", 4 * MIB)
  tracemalloc.start()
  try:
    message = refusal("jsonl", path)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert f"{path}:4: a line of more than 4,194,304 bytes" in message
  assert peak < 16 * MIB


def test_the_limits_as_they_are_keep_a_process_small(tmp_path):
  """A gzip file of 1.5 MB that unpacks to one line of 1.5 GB, in a process that may have 1 GiB."""
  path = tmp_path / "x.jsonl.gz"
  pack(path, (bytes(16 * MIB), 96))
  assert path.stat().st_size < 2 * MIB
  program = f"""
import resource
resource.setrlimit(resource.RLIMIT_DATA, ({1 << 30}, {1 << 30}))
from engram_jax.config import DataConfig
from engram_jax.data.files import read_files
from engram_jax.errors import DataError
try:
  list(read_files(DataConfig(source="jsonl", path={str(path)!r})))
except DataError as error:
  print(error)
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
  )
  assert done.stdout.strip() == f"{path}:1: a line of more than 33,554,432 bytes"


@pytest.mark.parametrize("line", [b"\n", b'{"text": "a"}\n'])
def test_lines_without_end_are_refused(tmp_path, small, line):
  path = tmp_path / "x.jsonl.gz"
  pack(path, (line * (MIB // 2 // len(line)), 1))
  assert "more than 250 times as many" in refusal("jsonl", path)
  unpacked = tmp_path / "x.jsonl"
  unpacked.write_bytes(line * 9999)
  assert len(read("jsonl", unpacked)) in (0, 9999)  # it is no larger than it looks


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_a_long_line_is_named(tmp_path, small, source):
  path = tmp_path / "x.jsonl"
  good = json.dumps({"text": "é" * 400}, ensure_ascii=False)
  path.write_text(f"{good}\n{good}\n{good + 'x' * 999}\n")
  assert f"{path}:3: a line of more than 1,000 bytes" in refusal(source, path)


def test_a_large_file_in_a_folder_is_refused(tmp_path, small):
  (tmp_path / "folder").mkdir()
  path = tmp_path / "folder" / "x.txt"
  path.write_text("word\n" * 1001)
  with pytest.raises(DataError, match=r"x\.txt: has 5,005 bytes: at most 5,000; as data\.path"):
    read("text", tmp_path / "folder")
  assert "".join(document.text for document in read("text", path)) == path.read_text()


BAD_LINES = {
  "deep lists": b'{"text": ' + b"[" * 100_000,
  "deep mappings": b'{"a": ' * 100_000,
  "a long list": b'{"text": [' + b"1," * 9999 + b"1]}",
  "a long name": b'{"' + b"x" * 100_000 + b'": 1}',
  "many names": json.dumps(dict.fromkeys(map(str, range(9999)), 1)).encode(),
  "NUL": b"\0\0\0",
  "UTF-16": '{"text": "a"}'.encode("utf-16"),
  "UTF-32": '{"text": "a"}'.encode("utf-32"),
  "half a pair": b'{"text": "\\ud800"}',
  "half a character": b'{"text": "\xc3"}',
  "NaN": b'{"text": NaN}',
  "two values": b'{"text": "a"} {"text": "b"}',
  "a list": b'["text"]',
  "nothing": b"{}",
  "null": b"null",
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "JSONL.GZ"])
def test_a_bad_line_is_named_and_cut(tmp_path, line, suffix):
  path = tmp_path / f"x.{suffix}"
  content = b'{"text": "good"}\n' + line + b"\n"
  path.write_bytes(gzip.compress(content) if suffix.lower().endswith("gz") else content)
  assert f"{path}:2" in refusal("jsonl", path)


def test_a_bad_byte_of_a_text_is_named_with_its_line(tmp_path):
  path = tmp_path / "x.txt"
  path.write_bytes(b"good\nbad \xff\n")
  assert f"{path}:2: not UTF-8" in refusal("text", path)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(st.text("a\n\r\f\x0b\x1c\x85\u2028\ufeff é😀", max_size=40))
def test_reading_by_lines_gives_what_reading_at_once_gave(tmp_path_factory, text):
  path = tmp_path_factory.mktemp("text") / "x.txt"
  path.write_bytes(text.encode())
  at_once = text.encode().decode("utf-8-sig").replace("\r\n", "\n")
  assert list(files._text_lines(path)) == at_once.splitlines(keepends=True)
  assert "".join(document.text for document in read("text", path)) == at_once


@pytest.mark.parametrize(
  "damage",
  [
    lambda packed: packed[:-12],
    lambda packed: packed[:5],
    lambda packed: packed[:30] + b"\xff\xff\xff" + packed[33:],
    lambda packed: packed + b"more",
    lambda packed: b"\x1f\x8b\x09" + packed[3:],
    lambda packed: packed[:-4] + b"\0\0\0\0",
  ],
)
def test_a_broken_gzip_file_is_named(tmp_path, damage):
  path = tmp_path / "x.jsonl.gz"
  lines = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(300))
  path.write_bytes(damage(gzip.compress(lines.encode())))
  assert str(path) in refusal("jsonl", path)


def test_a_row_of_parquet_is_bounded(tmp_path, small):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  path = tmp_path / "x.parquet"
  parquet.write_table(pyarrow.table({"text": ["a", "b" * 1001]}), path)
  assert f"{path}: row 2: 'text' has 1,001 bytes" in refusal("parquet", path)
  parquet.write_table(pyarrow.table({"c" * 9999: ["a"]}), path)
  refusal("parquet", path)


@pytest.mark.parametrize("value", ["/dev/zero", "pipe", "x" * 5000, "~nobody.at.all/x", "loop"])
@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "array_record"])
def test_a_path_that_is_no_file_is_refused(tmp_path, monkeypatch, value, source):
  monkeypatch.chdir(tmp_path)
  os.mkfifo("pipe")
  os.symlink("loop", "loop")
  with pytest.raises(ConfigError, match=r"data\.path=") as caught:
    read(source, value)
  assert len(str(caught.value)) < 1200


def test_special_files_in_a_folder_are_no_documents(tmp_path):
  os.mkfifo(tmp_path / "pipe.txt")
  (tmp_path / "zero.txt").symlink_to("/dev/zero")
  (tmp_path / "a.txt").write_text("one")
  assert read("text", tmp_path) == [("a", "one")]


@pytest.mark.parametrize("value", ["x" * 5000, "~nobody.at.all/cache"])
def test_a_cache_that_cannot_be_is_refused(value):
  with pytest.raises(EngramError, match=r"data\.cache="):
    cache_dir(DataConfig(cache=value))
