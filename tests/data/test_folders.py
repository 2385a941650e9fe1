"""Folders: which files are read, which are left and why, and packed files of every kind."""

import bz2
import gzip
import json
import lzma
import os
import pathlib

import pytest

from engram_jax.config import DataConfig
from engram_jax.data import decompress, files, folders, sources
from engram_jax.errors import ConfigError, DataError

pyarrow = pytest.importorskip("pyarrow")

PACK = {
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
  ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
  ".zstd": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
  ".lz4": lambda data: pyarrow.compress(data, "lz4", asbytes=True),
  ".br": lambda data: pyarrow.compress(data, "brotli", asbytes=True),
}


def config(path: pathlib.Path, source: str = "jsonl", **fields) -> DataConfig:
  return DataConfig(source=source, path=str(path), **fields)


def texts(path: pathlib.Path, source: str = "jsonl", **fields) -> list[str]:
  return [document.text for document in files.read_files(config(path, source, **fields))]


def write(path: pathlib.Path, *words: str) -> pathlib.Path:
  """A file of JSON lines, packed if its name says so, in folders made for it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = "".join(json.dumps({"text": word}) + "\n" for word in words or [path.name])
  path.write_bytes(PACK.get(path.suffix, bytes)(lines.encode()))
  return path


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson", ".JSONL"])
def test_packed_lines_beside_plain_ones_are_read(tmp_path, packing, suffix):
  write(tmp_path / "a.jsonl", "plain")
  write(tmp_path / f"b{suffix}{packing}", "packed", "again")
  assert texts(tmp_path) == ["plain", "packed", "again"]
  reads, leaves = files.survey(config(tmp_path))
  assert f"1 {suffix.lower()}{packing}" in reads
  assert "reads 2 files" in reads
  assert "leaves none" in leaves


@pytest.mark.parametrize("packing", PACK)
def test_packed_text_is_read_whole_and_in_pieces(tmp_path, packing):
  path = tmp_path / f"a.txt{packing}"
  path.write_bytes(PACK[packing]("\ufeffeins\r\nzwei é\n".encode()))
  assert texts(tmp_path, "text") == ["eins\nzwei é\n"]
  assert "".join(texts(path, "text")) == "eins\nzwei é\n"


@pytest.mark.parametrize("packing", sorted(set(PACK) - {".lzma", ".br"}))
def test_several_streams_in_a_file_are_one(tmp_path, packing):
  path = write(tmp_path / f"a.jsonl{packing}", *map(str, range(9000)))
  path.write_bytes(2 * path.read_bytes())
  assert texts(path) == 2 * list(map(str, range(9000)))


def test_padding_of_xz_is_nothing(tmp_path):
  path = write(tmp_path / "a.jsonl.xz", "a")
  path.write_bytes(path.read_bytes() + bytes(8) + path.read_bytes() + bytes(4))
  assert texts(path) == ["a", "a"]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("damage", ["cut", "changed", "followed", "emptied", "not packed"])
def test_a_damaged_packed_file_is_named(tmp_path, packing, damage):
  path = write(tmp_path / f"a.jsonl{packing}", *(f"{i} {i * i}" for i in range(3000)))
  packed = path.read_bytes()
  middle = len(packed) // 2
  path.write_bytes(
    {
      "cut": packed[:middle],
      "changed": packed[:middle] + bytes(40) + packed[middle + 40 :],
      "followed": packed + b"something else",
      "emptied": b"",
      "not packed": b'{"text": "a"}\n',
    }[damage]
  )
  if (damage, packing) == ("followed", ".br"):
    pytest.skip("such a file is one more stream that was cut")
  with pytest.raises(DataError, match=r"a\.jsonl\.\w+") as caught:
    texts(path)
  assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])  # LZ4 has no such ratios
@pytest.mark.parametrize("source", ["jsonl", "text"])
def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path, monkeypatch, packing, source):
  monkeypatch.setattr(decompress, "RATIO_START", 1 << 16)
  folder = tmp_path / "folder"
  folder.mkdir()
  path = folder / f"a.{'txt' if source == 'text' else 'jsonl'}{packing}"
  path.write_bytes(PACK[packing](b"\n" * (1 << 20)))
  for given in (folder, path):
    with pytest.raises(DataError, match="more than 250 times as many"):
      texts(given, source)


def test_a_packed_file_that_needs_pyarrow_says_so(tmp_path, monkeypatch):
  write(tmp_path / "a.jsonl", "a")
  write(tmp_path / "b.jsonl.zst", "b")
  monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
  with pytest.raises(ConfigError, match=r"b\.jsonl\.zst needs pyarrow.*engram_jax\[parquet\]"):
    texts(tmp_path)


def test_linked_folders_are_followed_and_counted_in_the_fingerprint(tmp_path):
  write(tmp_path / "mix" / "a.jsonl", "a")
  write(tmp_path / "c4" / "deep" / "b.jsonl", "b")
  (tmp_path / "mix" / "c4").symlink_to("../c4")
  (tmp_path / "mix" / "l.jsonl").symlink_to("../c4/deep/b.jsonl")
  cfg = config(tmp_path / "mix")
  assert list(files.read_files(cfg)) == [("a", "a"), ("c4", "b"), ("l", "b")]
  before = sources.fingerprint(cfg)
  write(tmp_path / "c4" / "deep" / "b.jsonl", "changed")
  assert sources.fingerprint(cfg) != before


@pytest.mark.parametrize("target", [".", "..", "../mix", "sub", "sub/deeper"])
def test_a_loop_of_links_is_an_error(tmp_path, target):
  write(tmp_path / "mix" / "a.jsonl")
  (tmp_path / "mix" / "sub" / "deeper").mkdir(parents=True)
  (tmp_path / "mix" / "sub" / "deeper" / "back").symlink_to("../..")
  (tmp_path / "mix" / "again").symlink_to(target)
  with pytest.raises(ConfigError, match="a loop of links: remove the link"):
    texts(tmp_path / "mix")


def test_folders_that_link_to_each_other_are_a_loop(tmp_path):
  for name, other in ("ab", "ba"):
    write(tmp_path / name / "x.jsonl")
    (tmp_path / name / "link").symlink_to(f"../{other}")
  with pytest.raises(ConfigError, match="loop"):
    texts(tmp_path)


def test_a_folder_linked_many_times_is_read_once(tmp_path):
  for i in range(40):  # two links a step: 2^40 ways
    (tmp_path / str(i)).mkdir()
    for name in "xy":
      (tmp_path / str(i) / name).symlink_to(f"../{i + 1}")
  write(tmp_path / "40" / "a.jsonl", "a")
  assert texts(tmp_path / "0") == ["a"]
  assert "read already under another name" in files.survey(config(tmp_path / "0"))[1]


@pytest.mark.parametrize("name", ["b.jsonl", "c4", "b.jsonl.zst"])
def test_a_link_to_nothing_is_an_error(tmp_path, name):
  write(tmp_path / "a.jsonl")
  (tmp_path / name).symlink_to("../not/there")
  with pytest.raises(ConfigError, match=r"is a link to '\.\./not/there', where nothing is"):
    texts(tmp_path)


LEFT = {
  folders.HIDDEN: [
    "._a.jsonl",
    ".ipynb_checkpoints/a-checkpoint.jsonl",
    ".git/x.json",
    ".#a.jsonl",
    "_SUCCESS",
    "_delta_log/0000.json",
    "_temporary/0/part-0.jsonl",
    "__MACOSX/._a.jsonl",
    "sub/.hidden.jsonl",
    ".cache/huggingface/download/a.jsonl",
  ],
  folders.BESIDE: [
    "tokenizer.json",
    "Tokenizer_Config.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "sub/special_tokens_map.json",
    "lost+found/x.jsonl",
  ],
  folders.OTHER: [
    "Thumbs.db",
    "desktop.ini",
    "a.jsonl~",
    "a.jsonl.bak",
    "a.jsonl.tmp",
    "a.jsonl.tar.gz",
    "a.jsonl.zip",
    "a.csv",
    "jsonl",
    "data-00000-of-00001.arrow",
    "a.jsonl.incomplete",
  ],
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_nobodys_data_is_left_and_said(tmp_path, reason):
  write(tmp_path / "a.jsonl", "a")
  for name in LEFT[reason]:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0\5\x16\7\xff\xfe")
  assert texts(tmp_path) == ["a"]
  reads, leaves = files.survey(config(tmp_path))
  assert reads.endswith("reads 1 file (1 .jsonl)")
  assert leaves.endswith(", ...") or len(LEFT[reason]) <= 3
  assert f"{len(LEFT[reason])} {reason}: " in leaves
  before = sources.fingerprint(config(tmp_path))
  (tmp_path / LEFT[reason][0]).write_bytes(b"changed")
  assert sources.fingerprint(config(tmp_path)) == before


@pytest.mark.parametrize("name", ["._a.jsonl", "_x", "tokenizer.json", "a.csv", "a.jsonl.bak"])
def test_a_file_named_outright_is_read_whatever_its_name(tmp_path, name):
  write(tmp_path / name, "outright")
  assert texts(tmp_path / name) == ["outright"]
  assert files.survey(config(tmp_path / name)) == ()


def test_text_leaves_the_words_of_tokenizers(tmp_path):
  for name in ("a.txt", "b.md", "vocab.txt", "merges.txt", "README.md", "sub/c.rst"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  assert sorted(texts(tmp_path, "text")) == ["README.md", "a.txt", "b.md", "sub/c.rst"]


def test_a_folder_without_data_says_what_it_has(tmp_path):
  write(tmp_path / ".a.jsonl")
  (tmp_path / "b.parquet").write_bytes(b"")
  with pytest.raises(ConfigError, match=r"1 hidden .*1 of other kinds.*--data\.source parquet"):
    texts(tmp_path)


def test_names_that_are_no_unicode(tmp_path):
  name = os.fsdecode(b"caf\xe9.jsonl")
  write(tmp_path / name, "a")
  write(tmp_path / f".{name}", "a")
  (document,) = files.read_files(config(tmp_path))
  assert document == ("caf\\udce9", "a")
  assert len(sources.fingerprint(config(tmp_path))) == 64
  assert files.survey(config(tmp_path))


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "array_record"])
@pytest.mark.parametrize("outright", [True, False])
def test_a_pointer_of_git_lfs_is_named(tmp_path, source, outright):
  path = tmp_path / f"x{folders.SUFFIXES[source][0]}"
  oid = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
  path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 132735\n")
  with pytest.raises(DataError, match=r"x\.\w+:? .*is a git-lfs pointer.*git lfs pull"):
    texts(path if outright else tmp_path, source, bad_rows="skip")


def test_a_text_about_git_lfs_is_text(tmp_path):
  text = "version https://git-lfs.github.com/spec/v1 is how a pointer begins.\n" * 30
  (tmp_path / "x.txt").write_text(text)
  assert texts(tmp_path, "text") == [text]


@pytest.mark.parametrize(
  ("content", "kind"),
  [
    (gzip.compress(b"{}", mtime=0), "gzip data"),
    ('{"text": "a"}'.encode("utf-16"), "UTF-16 text"),
    (b"PAR1\x15\x04\xff\xfe", "a Parquet file"),
    (b"PK\x03\x04\xff\xff", "a zip archive"),
  ],
)
def test_files_that_are_something_else_are_named(tmp_path, content, kind):
  (tmp_path / "x.jsonl").write_bytes(content)
  with pytest.raises(DataError, match=rf"x\.jsonl:1: not UTF-8: .*it is {kind}"):
    texts(tmp_path)
