"""Corpora of several archives: downloads, what is missing, no paragraph twice, fingerprints."""

import concurrent.futures
import hashlib
import pathlib
import subprocess
import sys

import pytest
from archives_by_hand import SOME, deb, needs_dpkg, quiet

from engram_jax.config import DataConfig, load_config
from engram_jax.data import download, sources
from engram_jax.data.corpora import archives, catalogue, english
from engram_jax.data.corpora.archives import Npm, Wheel
from engram_jax.data.corpora.english import Part
from engram_jax.data.files import Document
from engram_jax.data.pipeline import prepare
from engram_jax.errors import ConfigError, DataError, StorageError


def fake_programs(monkeypatch, files: dict[str, bytes], lists: str = "") -> list[list[str]]:
  """apt-get, apt-cache and npm that know these files by name; returns the commands given."""
  commands = []

  def run(command, cwd, **_):
    commands.append(command)
    if command[0] == "apt-cache":
      return subprocess.CompletedProcess(command, 0, lists, "")
    wanted = command[-1].removeprefix("@").replace("/", "-").replace("@", "-")
    found = [name for name in files if name.startswith(f"{wanted}_") or name == f"{wanted}.tgz"]
    for name in found:
      (pathlib.Path(cwd) / name).write_bytes(files[name])
    return subprocess.CompletedProcess(command, 0 if found else 100, "", "E: Unable to locate it")

  monkeypatch.setattr(archives.subprocess, "run", run)
  monkeypatch.setattr(archives.shutil, "which", lambda name: f"/usr/bin/{name}")
  return commands


def test_a_debian_package_is_downloaded_once(tmp_path, monkeypatch):
  commands = fake_programs(monkeypatch, {"some-doc-1_2_all.deb": b"deb"})
  lines = []
  path = archives.fetch(SOME, tmp_path, lines.append)
  assert path.read_bytes() == b"deb"
  assert archives.fetch(SOME, tmp_path, lines.append) == path
  assert commands == [["apt-get", "download", "some-doc-1"]]
  assert [p.name for p in path.parent.iterdir()] == ["some-doc-1_2_all.deb"]
  assert lines[0] == "downloading the Debian package some-doc-1 by apt-get ..."


def test_processes_that_download_at_once_get_the_same_file(tmp_path, monkeypatch):
  fake_programs(monkeypatch, {"some-doc-1_2_all.deb": b"deb"})
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    paths = list(pool.map(lambda _: archives.fetch(SOME, tmp_path, quiet), range(8)))
  assert len(set(paths)) == 1
  assert list((tmp_path / "downloads").iterdir()) == [paths[0]]


def test_another_release_has_another_package(tmp_path, monkeypatch):
  files = {f"some-doc-{n}_1_all.deb": b"deb" for n in (9, 10)}
  commands = fake_programs(monkeypatch, files, lists="some-doc-9\nsome-doc-10\nsome-doc-10-x\n")
  assert archives.fetch(SOME, tmp_path, quiet).name == "some-doc-10_1_all.deb"
  assert [command[-1] for command in commands] == ["some-doc-1", "pkgnames", "some-doc-10"]
  assert archives.fetch(SOME, tmp_path, quiet).name == "some-doc-10_1_all.deb"
  assert len(commands) == 3


def test_a_package_that_is_not_to_be_had_names_the_alternative(tmp_path, monkeypatch):
  fake_programs(monkeypatch, {})
  with pytest.raises(DataError, match=r"(?s)some-doc-1: E: Unable.*apt-get update.*source english"):
    archives.fetch(SOME, tmp_path, quiet)
  with pytest.raises(DataError, match=r"npm could not download @a/b@1\.0 .*--data\.source english"):
    archives.fetch(Npm("@a/b", "1.0", "00"), tmp_path, quiet)
  assert not list((tmp_path / "downloads").iterdir())


def test_an_npm_package_is_checked(tmp_path, monkeypatch):
  commands = fake_programs(monkeypatch, {"a-b-1.0.tgz": b"npm"})
  with pytest.raises(DataError, match=r"has SHA-256 .*, not 00: it is not the file"):
    archives.fetch(Npm("@a/b", "1.0", "00"), tmp_path, quiet)
  assert not list((tmp_path / "downloads").iterdir())
  digest = hashlib.sha256(b"npm").hexdigest()
  path = archives.fetch(Npm("@a/b", "1.0", digest), tmp_path, quiet)
  path.write_bytes(b"damaged")
  again = archives.fetch(Npm("@a/b", "1.0", digest), tmp_path, quiet)
  assert again.read_bytes() == b"npm"
  assert len(commands) == 3


@pytest.mark.parametrize("missing", ["apt-get", "dpkg-deb", "npm"])
def test_a_missing_program_is_named_before_anything_is_downloaded(tmp_path, monkeypatch, missing):
  monkeypatch.setattr(archives.shutil, "which", lambda name: None if name == missing else name)
  monkeypatch.setattr(archives.subprocess, "run", fail)
  monkeypatch.setattr(download.subprocess, "run", fail)
  cfg = DataConfig(source="english_large", cache=str(tmp_path))
  message = rf"needs the program {missing}, .*--data\.source english"
  with pytest.raises(DataError, match=message):
    next(sources.read_documents(cfg, quiet))
  with pytest.raises(DataError, match=message):
    sources.fingerprint(cfg, quiet)
  assert not list(tmp_path.iterdir())


def fail(*args, **options):
  raise AssertionError(f"called with {args} {options}")


@pytest.mark.parametrize("source", ["english", "english_large"])
def test_a_missing_extra_is_named_before_anything_is_written(tmp_path, monkeypatch, source):
  monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
  monkeypatch.setattr(download.subprocess, "run", fail)
  cfg = load_config(None, {"data.source": source, "data.cache": str(tmp_path / "cache")})
  message = r"data\.source.*mwparserfromhell: pip install 'engram_jax\[research\]'"
  with pytest.raises(ConfigError, match=message):
    prepare(cfg, quiet)
  assert not list(tmp_path.iterdir())
  with pytest.raises(ConfigError, match=message):
    next(sources.read_documents(cfg.data, quiet))


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> tuple[DataConfig, pathlib.Path]:
  """A config whose corpus is a tiny Debian package, and the package in its cache."""

  def read(path: pathlib.Path):
    for _, contents in archives.read_members(path, lambda name: name.endswith(".txt")):
      yield Document("tiny", contents.decode())

  part = Part("tiny", "a tiny text", "CC0", SOME, read)
  monkeypatch.setitem(catalogue.CORPORA, "chinese", (part,))
  (tmp_path / "downloads").mkdir()
  texts = {f"usr/{i}.txt": f"shared\n\ntext {i}\n".encode() for i in range(40)}
  path = deb(tmp_path / "downloads" / "some-doc-1_1_all.deb", texts)
  return DataConfig(source="chinese", cache=str(tmp_path)), path


@needs_dpkg
def test_a_corpus_is_prepared_without_repeats(tiny):
  cfg = load_config(None, {"data.source": "chinese", "data.cache": tiny[0].cache})
  cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"validation_fraction": 0.2})})
  data = prepare(cfg, quiet)
  decode = data.vocabulary.tokenizer.decode
  texts = [
    decode(corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]].tolist())
    for corpus in (data.training, data.validation)
    for i in range(corpus.document_count)
  ]
  assert len(texts) == 40
  assert sum("shared" in text for text in texts) == 1
  assert data.description[0] == "text: a tiny text, CC0 (Debian some-doc-1)"


@needs_dpkg
def test_archives_are_read_once_and_their_text_kept(tiny, tmp_path, monkeypatch):
  cfg, path = tiny
  unfinished = sources.read_documents(cfg, quiet)
  next(unfinished)
  unfinished.close()
  assert not list((tmp_path / "texts").iterdir())
  first = list(sources.read_documents(cfg, quiet))
  with monkeypatch.context() as patch:
    patch.setattr(archives, "read_members", fail)
    assert list(sources.read_documents(cfg, quiet)) == first
  (kept,) = (tmp_path / "texts").iterdir()
  kept.write_bytes(kept.read_bytes()[:-9])
  with pytest.raises(StorageError, match=r"chinese-.*\.jsonl: damaged: .*; delete it"):
    list(sources.read_documents(cfg, quiet))
  deb(path, {"usr/a.txt": b"another version"})
  assert list(sources.read_documents(cfg, quiet)) == [("tiny", "another version")]


@needs_dpkg
def test_the_fingerprint_follows_the_archives(tiny, tmp_path, monkeypatch):
  cfg, path = tiny
  first = sources.fingerprint(cfg, quiet)
  assert sources.fingerprint(cfg, quiet) == first
  path.write_bytes(path.read_bytes() + b"\n")
  changed = sources.fingerprint(cfg, quiet)
  path.rename(path.with_name("some-doc-1_2_all.deb"))
  renamed = sources.fingerprint(cfg, quiet)
  monkeypatch.setattr(catalogue, "READERS_VERSION", 2)
  assert len({first, changed, renamed, sources.fingerprint(cfg, quiet)}) == 4


@needs_dpkg
def test_an_archive_without_a_document_is_refused(tiny):
  cfg, path = tiny
  deb(path, {"usr/a.md": b"x"})
  with pytest.raises(DataError, match=r"some-doc-1_1_all\.deb: no document of tiny"):
    list(sources.read_documents(cfg, quiet))


def test_the_fingerprint_of_pinned_wheels_downloads_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(download.subprocess, "run", fail)
  cfg = DataConfig(source="english", cache=str(tmp_path))
  assert len({sources.fingerprint(cfg), sources.fingerprint(DataConfig())}) == 2
  assert not list(tmp_path.iterdir())


def test_the_corpus_of_before_is_what_it_was():
  known = "a00b071ed6df51ae1c40915232d5a5de3244a65a6ea7c3172e23895481d258ed"
  assert sources.fingerprint(DataConfig()) == known


@pytest.mark.parametrize("source", list(catalogue.CORPORA))
def test_every_part_is_described(source):
  text = sources.describe(DataConfig(source=source))
  for part in catalogue.CORPORA[source]:
    assert part.licence in text
    assert part.archive.name in text
    assert not isinstance(part.archive, Wheel | Npm) or len(part.archive.sha256) == 64


def test_the_wheel_for_every_machine_is_the_same(tmp_path, monkeypatch):
  commands = []
  monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: object())

  def run(command, **_):
    commands.append(command)
    return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")

  monkeypatch.setattr(download.subprocess, "run", run)
  gensim = next(p.archive for p in english.ENGLISH if p.archive.name == "gensim")
  with pytest.raises(DataError, match="no network"):
    archives.fetch(gensim, tmp_path, quiet)
  assert {"--platform=manylinux_2_28_x86_64", "--python-version=3.11"} <= set(commands[0])


@pytest.mark.slow
def test_english_from_pypi(tmp_path):
  settings = {"data.source": "english", "data.cache": str(tmp_path), "model.vocab_size": 4096}
  data = prepare(load_config(None, settings), print)
  names = {name.partition("/")[0] for name in data.source_names}
  assert names == {"wiki", "gensim_wiki", "aws"}
  splits = (data.training, data.validation)
  assert sum(split.document_count for split in splits) == 10_577
  assert sum(len(split.tokens) for split in splits) > 9_000_000
