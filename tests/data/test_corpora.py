"""Corpora of several archives: readers on tiny archives, no paragraph twice, downloads, errors."""

import base64
import bz2
import concurrent.futures
import gzip
import io
import json
import pathlib
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from engram_jax.config import DataConfig, load_config
from engram_jax.data import download, sources
from engram_jax.data.corpora import archives, catalogue, chinese, english, english_large
from engram_jax.data.corpora.archives import Deb, Npm, Wheel
from engram_jax.data.corpora.english import Part
from engram_jax.data.corpora.manual_pages import strip_roff
from engram_jax.data.corpora.markup import strip_html, strip_wiki
from engram_jax.data.corpora.paragraphs import drop_repeats, group, split_paragraphs
from engram_jax.data.files import Document
from engram_jax.data.pipeline import prepare
from engram_jax.errors import ConfigError, DataError, StorageError

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


def quiet(line: str) -> None:
  del line


def wheel(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  with zipfile.ZipFile(path, "w") as archive:
    for name, contents in files.items():
      archive.writestr(name, contents)
  return path


def npm(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  with tarfile.open(path, "w:gz") as archive:
    for name, contents in files.items():
      member = tarfile.TarInfo(f"package/{name}")
      member.size = len(contents)
      archive.addfile(member, io.BytesIO(contents))
  return path


def deb(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  root = path.parent / f".{path.stem}"
  name, version, _ = path.stem.split("_")
  control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: N <n@e.org>\n"
  for file, contents in (files | {"DEBIAN/control": f"{control}Description: d\n".encode()}).items():
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_bytes(contents)
  subprocess.run(["dpkg-deb", "--build", root, path], check=True, capture_output=True)
  shutil.rmtree(root)
  return path


# --- paragraphs -------------------------------------------------------------------------------

BLOCKS = strategies.lists(strategies.sampled_from(["a b", "a  b", "c\nd", "e", " e"]), max_size=5)


def words(text: str) -> list[str]:
  return [" ".join(block.split()) for block in split_paragraphs(text)]


@hypothesis.given(strategies.lists(BLOCKS, max_size=6))
def test_no_paragraph_is_there_twice_and_none_is_lost(blocks):
  documents = [Document("s", "\n\n".join(block)) for block in blocks]
  kept = list(drop_repeats(documents, quiet))
  before = [word for document in documents for word in words(document.text)]
  after = [word for document in kept for word in words(document.text)]
  assert after == list(dict.fromkeys(before))
  assert all(document.text.strip() for document in kept)


def test_a_document_without_repeats_stays_to_the_letter():
  text = "\n\n  one\n \t\n\n\ntwo \n"
  assert list(drop_repeats([Document("a", text)], quiet)) == [("a", text)]


def test_a_later_document_loses_the_paragraph_with_its_heading():
  lines = []
  first = Document("a", "One\n===\n\nshared\n   words")
  second = Document("b", "Two\n---\n\nshared words\n\n=====\nThree\n=====\n\nnew")
  assert list(drop_repeats([first, second, Document("c", "shared words")], lines.append)) == [
    first,
    ("b", "=====\nThree\n=====\n\nnew"),
  ]
  assert lines == ["4 paragraphs, of which 2 repeat an earlier one and are dropped"]


def test_groups_hold_every_entry_once():
  entries = [f"entry {i} " + "word " * (i % 50) for i in range(500)]
  pieces = list(group(entries))
  assert [entry for piece in pieces for entry in piece.split("\n\n")] == entries
  assert 5 < len(pieces) < 12


# --- markup -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("markup", "text"),
  [
    ("plain  text", "plain text"),
    ("<p>One &amp; <b>t</b>wo<p>three<br/>four", "One & two\n\nthree\nfour"),
    ("<ul> <li> <p>a</p> </li> <li>b</li></ul>", "a\n\nb"),
    ("<h2>Title</h2>\n<p>text</p><h3>Last</h3>", "Title\ntext\n\nLast"),
    ("<pre>\n  x =\n    1\n</pre>y", "  x =\n    1\n\ny"),
    ("<head><title>no</title></head><script>no()</script>yes", "yes"),
    ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", "a b\nc"),
    ("<div class='nav x'>no<div>no</div>no</div>yes<br class=nav>too", "yes\ntoo"),
    ("<p>中文\n  文字 and\nwords</p>", "中文文字 and words"),
    ("5 < 6 & 7", "5 < 6 & 7"),
  ],
)
def test_html_is_stripped(markup, text):
  assert strip_html(markup, skip=("nav",)) == text


def test_html_begins_where_it_is_told():
  page = "<header>no</header><p>no</p><div id='main' class='x'><p>yes</p></div>"
  assert strip_html(page, start="#main") == "yes"
  assert strip_html(page, skip=("#main",)) == "no"


ARTICLE = """{{Infobox|a=[[b]]}}
'''Oak''' ({{IPA|x}}) is a [[tree|woody plant]].<ref>A book.</ref> It has {{convert|5|km}}.
[[File:Oak.jpg|thumb|An [[oak]].]]

== Growth ==
{{main|Growth}}

Fast, <math>x^2</math>.

{| class="wikitable"
| a cell
|}
[[Category:Trees]] [[fr:Chêne]]
== See also ==
* [[Elm]]
"""


def test_wiki_markup_is_stripped():
  assert strip_wiki(ARTICLE) == "Oak is a woody plant. It has 5 km.\n\nGrowth\nFast, x^2."


ROFF = r"""'\" t
.\" a comment
.de XX
.SH no
..
.if n \{\
.  no
.\}
.TH LS 1
.SH "NAME"
ls \- list \fBall\fR of \*(L"it\*(R"
.SS Options
.IX Item "no"
.TP
.BR \-a , \-\-all
show
the rest\*(--of it
.IP \(bu 2
an item \s-1HTML\s0
.IP "a long tag" 4
text
.TS
no
.TE
.nf
  x = 1
  \&y
.fi
.PP
\f(CW\*(C`code\*(C'\fR 中文
中文
"""


def test_manual_pages_are_stripped():
  assert strip_roff(ROFF).split("\n\n") == [
    'NAME\nls - list all of "it"',
    "Options\n-a,--all\nshow the rest--of it",
    "• an item HTML",
    "a long tag\ntext",
    "  x = 1\n  y",
    "code 中文中文",
  ]


# --- readers ----------------------------------------------------------------------------------


def test_gensim_reads_articles_alone(tmp_path):
  pages = [("Oak", "0", "", "An '''oak'''."), ("O", "0", "<redirect/>", "x"), ("T", "1", "", "x")]
  xml = "".join(
    f"<page><title>{title}</title><ns>{ns}</ns>{redirect}"
    f"<revision><text>{text}</text></revision></page>"
    for title, ns, redirect, text in pages
  )
  dump = bz2.compress(f'<mediawiki xmlns="http://m.org/">{xml}</mediawiki>'.encode())
  path = wheel(tmp_path / "x.whl", {english.GENSIM_FILE: dump})
  assert list(english.read_gensim(path)) == [("gensim_wiki", "Oak\nAn oak.")]
  wheel(path, {english.GENSIM_FILE: b"BZh nothing"})
  with pytest.raises(DataError, match=r"x\.whl: a damaged archive"):
    list(english.read_gensim(path))


def test_botocore_is_a_document_a_service_in_its_newest_version(tmp_path):
  def service(*texts: str) -> bytes:
    shapes = {f"s{i}": {"documentation": text} for i, text in enumerate(texts)}
    return gzip.compress(json.dumps({"shapes": shapes, "documentation": {"x": []}}).encode())

  files = {
    "botocore/data/s3/2006-03-01/service-2.json.gz": service("<p>old</p>"),
    "botocore/data/s3/2020-01-01/service-2.json.gz": service("<p>a</p>", "b", "<p>a</p>"),
    "botocore/data/ec2/2016-11-15/service-2.json.gz": service("c"),
    "botocore/data/ec2/2016-11-15/paginators-1.json": b"{}",
  }
  found = list(english.read_botocore(wheel(tmp_path / "x.whl", files)))
  assert sorted(found) == [("aws", "a\n\nb"), ("aws", "c")]


def dictd(entries: list[tuple[str, str]]) -> dict[str, bytes]:
  def digits(number: int) -> str:
    return base64.b64encode(number.to_bytes(6, "big")).decode().lstrip("A") or "A"

  body, index = b"", []
  for word, text in entries:
    index.append(f"{word}\t{digits(len(body))}\t{digits(len(text.encode()))}")
    body += text.encode()
  index.append(index[-1].replace(entries[-1][0], "another headword"))
  base = "usr/share/dictd/gcide"
  return {f"{base}.dict.dz": gzip.compress(body), f"{base}.index": "\n".join(index).encode()}


@needs_dpkg
def test_a_dictionary_gives_each_entry_once(tmp_path):
  entries = [("00-database-info", "x\n"), ("oak", "Oak\n   A tree.\n\n   [1913 Webster]\n")]
  entries += [(f"w{i}", f"W{i} é\n   text\n") for i in range(300)]
  (piece,) = english_large.read_dictionary("gcide", deb(tmp_path / "d_1_all.deb", dictd(entries)))
  assert piece.source == "gcide"
  assert piece.text.split("\n\n")[:2] == ["Oak\n   A tree.", "W0 é\n   text"]
  assert len(piece.text.split("\n\n")) == 301
  with pytest.raises(DataError, match="has no file"):
    list(english_large.read_dictionary("foldoc", tmp_path / "d_1_all.deb"))


@needs_dpkg
def test_wordnet_glosses_have_their_words(tmp_path):
  line = '00002684 03 n 02 object 0 physical_object 0 001 @ 00001930 n 0000 | a thing; "a toy"  \n'
  adjective = "00003131 00 s 01 able(p) 0 000 | having means\n"
  files = {"usr/share/wordnet/data.noun": b"  1 This is a licence\n" + line.encode()}
  files["usr/share/wordnet/data.adj"] = adjective.encode()
  (piece,) = english_large.read_wordnet(deb(tmp_path / "w_1_all.deb", files))
  assert sorted(piece.text.split("\n\n")) == [
    "able (adjective): having means",
    'object, physical object (noun): a thing; "a toy"',
  ]


def r_value(*strings: str) -> bytes:
  head = b"X\n" + struct.pack(">iii", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
  body = b"".join(struct.pack(">ii", 0x40009, len(s.encode())) + s.encode() for s in strings)
  value = head + struct.pack(">ii", 16, len(strings)) + body
  return struct.pack(">I", len(value)) + zlib.compress(value)


@needs_dpkg
def test_novels_are_read_out_of_an_r_package(tmp_path):
  name = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
  values = r_value("EMMA", "", "CHAPTER I", "", "Emma é") + r_value("P", "Chapter 1", "x")
  path = deb(tmp_path / "r_1_all.deb", {name: values})
  texts = [document.text for document in english_large.read_austen(path)]
  assert texts == ["EMMA", "CHAPTER I\n\nEmma é", "P", "Chapter 1\nx"]
  path = deb(tmp_path / "r_2_all.deb", {name: values[:-9]})
  with pytest.raises(DataError, match=r"r_2_all\.deb: a damaged archive: .*Rdata"):
    list(english_large.read_austen(path))


def test_speeches_and_moby_dick(tmp_path):
  speech = {"year": 1790, "name": "George Washington", "party": "none", "text": "I &quot;embrace"}
  files = {
    "sotu/data/1790_george_washington_n.json": json.dumps(speech).encode(),
    "sotu/data/1790_george_washington_n.txt": b"no",
    "moby-dick/data/data.txt": b"CHAPTER 1. Loomings.\n\nCall me\n\nCHAPTER 2. x\n",
  }
  assert list(english_large.read_stdlib_js(npm(tmp_path / "x.tgz", files))) == [
    ("sotu", 'State of the Union, 1790, George Washington\n\nI "embrace'),
    ("moby_dick", ""),
    ("moby_dick", "CHAPTER 1. Loomings.\n\nCall me"),
    ("moby_dick", "CHAPTER 2. x"),
  ]


@needs_dpkg
@pytest.mark.parametrize(
  ("read", "files", "expected"),
  [
    (
      english_large.read_linux_doc,
      {
        "usr/share/doc/linux/Documentation/a/b.rst.gz": gzip.compress(b"A\n=\n"),
        "usr/share/doc/linux/Documentation/translations/zh/b.rst.gz": gzip.compress(b"no"),
        "usr/share/doc/linux/Documentation/x.yaml.gz": gzip.compress(b"no"),
      },
      [("linux_doc", "A\n=\n")],
    ),
    (
      english_large.read_python_doc,
      {"usr/share/doc/p/html/_sources/c/a.rst.txt": b"text", "usr/share/doc/p/html/a.html": b""},
      [("python_doc", "text")],
    ),
    (
      english_large.read_perl_doc,
      {"usr/share/man/man1/perl.1.gz": gzip.compress(b".SH NAME\nperl \xff\n")},
      [("perl_doc", "NAME\nperl �")],
    ),
    (
      english_large.read_postgresql_doc,
      {"usr/share/doc/postgresql/html/a.html": b"<div class=navheader>no</div><h1>A</h1><p>b"},
      [("postgresql_doc", "A\nb")],
    ),
    (
      chinese.read_manpages,
      {
        "usr/share/man/zh_CN/man1/ls.1.gz": gzip.compress(".SH 名\n列出目录\n".encode()),
        "usr/share/man/zh_CN/man1/no.1.gz": gzip.compress(b".SH NAME\nnot translated\n"),
        "usr/share/man/zh_TW/man1/ls.1.gz": gzip.compress(".SH 名\n列出目錄\n".encode()),
      },
      [("manpages_zh", "名\n列出目录")],
    ),
    (
      chinese.read_libreoffice,
      {
        "usr/share/libreoffice/help/zh-CN/text/a.html": (
          "<p>no</p><div id='DisplayArea'><h1>标题</h1><p>文字<span class=MAC>no</span></p></div>"
        ).encode()
      },
      [("libreoffice_zh", "标题\n文字")],
    ),
    (
      chinese.read_handbook,
      {
        "usr/share/doc/h/html/zh-CN/a.html": (
          "<p id=title>no</p><h2 class=title>标</h2>文<p>ls" + "<p>not translated yet" + " no" * 30
        ).encode(),
        "usr/share/doc/h/html/de-DE/a.html": b"nein",
      },
      [("handbook_zh", "标\n文\n\nls")],
    ),
    (
      chinese.read_fortunes,
      {
        "usr/share/games/fortunes/tang300": "\x1b[32m诗\x1b[m\n一\n%\n二\n".encode(),
        "usr/share/games/fortunes/tang300.dat": b"\0",
      },
      [("fortunes_zh", "诗\n一\n\n二")],
    ),
  ],
  ids=lambda value: getattr(value, "__name__", ""),
)
def test_debian_packages_are_read(tmp_path, read, files, expected):
  assert list(read(deb(tmp_path / "some-doc_1_all.deb", files))) == expected


def test_poems_and_classics_are_read(tmp_path):
  def works(*works: dict) -> bytes:
    return json.dumps(works).encode()

  poem = {"title": "看花", "author": "何元", "paragraphs": ["莫怪，", "可憐。"], "id": "x"}
  classic = {"title": "書", "content": [{"chapter": "一", "paragraphs": ["子曰"]}]}
  files = {
    "dist/quantangshi/poet.tang.0.json": works(poem, {"title": "�", "paragraphs": ["x"]}),
    "dist/quantangshi/error/poet.tang.0.json": works(poem),
    "dist/strains/json/poet.tang.0.json": works({"strains": ["平"], "paragraphs": ["平"]}),
    "dist/songci/author.song.json": works({"name": "蘇軾", "description": "北宋"}),
    "dist/mengxue/a.json": json.dumps(classic).encode(),
  }
  assert sorted(chinese.read_poetry(npm(tmp_path / "x.tgz", files))) == [
    ("poetry/authors", "蘇軾\n北宋"),
    ("poetry/classics", "一\n子曰"),
    ("poetry/tang", "看花\n何元\n莫怪，\n可憐。"),
  ]


def test_the_novel_is_a_document_a_chapter(tmp_path):
  chapters = json.dumps(["第一回\n\n \n\t滚滚\n", "二"]).encode()
  path = wheel(tmp_path / "x.whl", {chinese.SANGUO_FILE: chapters})
  assert list(chinese.read_sanguo(path)) == [("sanguo", "第一回\n\n滚滚"), ("sanguo", "二")]


@needs_dpkg
@pytest.mark.parametrize("suffix", [".whl", ".tgz", ".deb"])
def test_a_damaged_archive_is_named(tmp_path, suffix):
  path, content = tmp_path / f"some-doc_1_all{suffix}", np.random.default_rng(0).bytes(200_000)
  {".whl": wheel, ".tgz": npm, ".deb": deb}[suffix](path, {"usr/a": content})
  whole = path.read_bytes()
  for damage in (whole[: len(whole) // 2], b"nothing of the kind", b""):
    path.write_bytes(damage)
    with pytest.raises(DataError, match=rf"some-doc_1_all\{suffix}: a damaged archive.*delete it"):
      list(archives.read_members(path, lambda name: True))


# --- downloads --------------------------------------------------------------------------------

SOME = Deb("some-doc-1", r"some-doc-\d+")


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
  digest = archives.hashlib.sha256(b"npm").hexdigest()
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


# --- corpora ----------------------------------------------------------------------------------


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
