"""Every reader of the corpora on a tiny archive of its kind, whole and damaged."""

import base64
import bz2
import gzip
import json
import struct
import zlib

import numpy as np
import pytest
from archives_by_hand import deb, needs_dpkg, npm, wheel

from engram_jax.data.corpora import archives, chinese, english, english_large
from engram_jax.errors import DataError


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
