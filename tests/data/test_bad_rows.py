"""Rows: whatever a JSON line or a column does to a parser, it is read or named, or skipped."""

import decimal
import json
import pathlib

import pytest

from engram_jax.config import DataConfig
from engram_jax.data import decompress, files, sources
from engram_jax.data.rows import MAX_NAME, MAX_SOURCES, Document
from engram_jax.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def read(path: pathlib.Path, source: str = "jsonl", log=lambda line: None, **fields):
  cfg = DataConfig(source=source, path=str(path), **fields)
  return list(files.read_files(cfg, log))


def refusal(path: pathlib.Path, source: str = "jsonl", **fields) -> str:
  with pytest.raises(DataError) as caught:
    read(path, source, **fields)
  assert len(str(caught.value).splitlines()) == 1
  return str(caught.value)


def outcome(path: pathlib.Path, source: str) -> tuple[list[Document] | None, str]:
  """The documents of a file that may be damaged, or the message of its DataError."""
  try:
    return read(path, source), ""
  except DataError as error:
    return None, str(error)


GOOD_LINES = {
  "an integer of 5,000 digits": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a"),
  "a negative one": (b'{"text": "a", "n": [-' + b"9" * 9000 + b"]}", "a"),
  "an exponent without end": (b'{"text": "a", "n": 1e999999999}', "a"),
  "NaN and infinities": (b'{"text": "a", "n": [NaN, Infinity, -Infinity]}', "a"),
  "duplicate keys": (b'{"text": 3, "text": "a"}', "a"),
  "an empty text": (b'{"text": ""}', ""),
  "a NUL": (b'{"text": "a\\u0000b"}', "a\0b"),
  "a pair of surrogates": (b'{"text": "\\ud83d\\ude00"}', "😀"),
  "a byte order mark": (b'\xef\xbb\xbf{"text": "a"}', "a"),
  "a carriage return": (b'{"text": "a"}\r', "a"),
  "another line end inside": ('{"text": "a\u2028b"}'.encode(), "a\u2028b"),
  "nesting that ends": (b'{"text": "a", "n": ' + b"[" * 200 + b"]" * 200 + b"}", "a"),
  "half a pair elsewhere": (b'{"text": "a", "n": "\\udc00"}', "a"),
}


@pytest.mark.parametrize("line", GOOD_LINES.values(), ids=GOOD_LINES)
def test_lines_that_are_read(tmp_path, line):
  content, text = line
  (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n' + content + b"\n")
  assert read(tmp_path / "x.jsonl") == [("x", "one"), ("x", text)]


BAD_LINES = {
  "not JSON": [
    b"{'text': 'a'}",
    b'{"text": "a",}',
    b'{"text": "a"} // more',
    b'{"text": "a"}{"text": "b"}',
    b'{"text": "a\tb"}',
    b"[" * 5000,
    b'{"a":' * 5000,
    b"[" * 5000 + b"9" * 5000,
    b"\0" * 50,
    '{"text": "a"}'.encode("utf-16-le"),
    b"{",
    b'"',
    b"\\",
  ],
  "not UTF-8": [b'{"text": "\xff"}', '{"text": "a"}'.encode("utf-16"), b'{"text": "\xed\xa0\x80"}'],
  "no object": [b"[]", b"3", b"null", b"true", b'"a"', b"NaN", b"9" * 5000],
  "without 'text'": [b"{}", b'{"Text": "a"}', b'{"": "a"}'],
  "'text' no string": [b'{"text": null}', b'{"text": ["a"]}', b'{"text": ' + b"9" * 5000 + b"}"],
  "no Unicode": [b'{"text": "\\ud800"}', b'{"text": "\\udc00\\ud800"}'],
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_lines_that_are_named_and_skipped(tmp_path, kind):
  path, good = tmp_path / "x.jsonl", b'{"text": "good"}'
  for line in BAD_LINES[kind]:
    path.write_bytes(b"\n".join([good, line, good]))
    assert f"{path}:2: " in refusal(path)
  path.write_bytes(b"\n".join([good, *BAD_LINES[kind], good]))
  said = []
  assert read(path, bad_rows="skip", log=said.append) == 2 * [("x", "good")]
  count = len(BAD_LINES[kind])
  assert said == [
    f"data.bad_rows=skip: skipped {count} of {count + 2} rows: {count} {kind} (first: {path}:2)"
  ]


def test_a_long_line_is_skipped_in_pieces(tmp_path, monkeypatch):
  monkeypatch.setattr(decompress, "LINE_BYTES", 100)
  monkeypatch.setattr(decompress, "_BLOCK", 7)
  path, said = tmp_path / "x.jsonl", []
  long = json.dumps({"text": "x" * 1000})
  path.write_text(f'{{"text": "a"}}\n{long}\n{{"text": "b"}}\n{long}')
  assert [d.text for d in read(path, bad_rows="skip", log=said.append)] == ["a", "b"]
  assert said == [f"data.bad_rows=skip: skipped 2 of 4 rows: 2 too long (first: {path}:2)"]


def test_bad_bytes_of_texts_are_skipped(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"one\n\xff\ntwo\n")
  (tmp_path / "b.txt").write_bytes(b"good")
  said = []
  assert read(tmp_path, "text", bad_rows="skip", log=said.append) == [("b", "good")]
  assert said[0].endswith(f"skipped 1 of 2 rows: 1 not UTF-8 (first: {tmp_path / 'a.txt'})")
  assert read(tmp_path / "a.txt", "text", bad_rows="skip") == [("a", "one\ntwo\n")]


def test_when_every_row_is_bad_skipping_is_an_error(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text('{"body": "a"}\n' * 5)
  assert "skipped 5 of 5 rows" in (said := refusal(path, bad_rows="skip"))
  assert "no row is left" in said
  assert "'body'" in said


def test_skipping_is_part_of_the_corpus(tmp_path):
  (tmp_path / "x.jsonl").write_text('{"text": "a"}')
  marks = {
    sources.fingerprint(DataConfig(source="jsonl", path=str(tmp_path), **fields))
    for fields in ({}, {"bad_rows": "skip"}, {"source_field": ""}, {"text_field": "b"})
  }
  assert len(marks) == 4


def test_damaged_files_are_errors_even_then(tmp_path):
  (tmp_path / "x.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
  refusal(tmp_path, bad_rows="skip")


# --- Parquet ------------------------------------------------------------------------------------


def not_text(values: list[bytes | None]) -> "pyarrow.Array":
  """A string column of bytes, as writers that do not check make it."""
  array = pyarrow.array(values, pyarrow.binary())
  return pyarrow.Array.from_buffers(pyarrow.string(), len(array), array.buffers())


COLUMNS = {
  "string": ["a", "é"],
  "large_string": pyarrow.array(["a", "é"], pyarrow.large_string()),
  "string_view": pyarrow.array(["a", "é"], pyarrow.string_view()),
  "dictionary": pyarrow.array(["a", "é"]).dictionary_encode(),
  "binary": [b"a", "é".encode()],
  "large_binary": pyarrow.array([b"a", "é".encode()], pyarrow.large_binary()),
  "bytes in a dictionary": pyarrow.array([b"a", "é".encode()]).dictionary_encode(),
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("store_schema", [True, False])
def test_columns_of_text_are_read(tmp_path, column, store_schema):
  path = tmp_path / "x.parquet"
  table = pyarrow.table({"text": column, "source": column})
  parquet.write_table(table, path, store_schema=store_schema)
  assert read(path, "parquet") == [("a", "a"), ("é", "é")]


NO_TEXT = {
  "integers": [1, 2],
  "lists": [["a"], ["b"]],
  "structs": [{"text": "a"}] * 2,
  "decimals": [decimal.Decimal("1.5")] * 2,
  "times beyond Python's": pyarrow.array([2**62, 2**62], pyarrow.timestamp("us")),
  "booleans": [True, False],
  "fixed bytes": pyarrow.array([b"ab"] * 2, pyarrow.binary(2)),
  "numbers in a dictionary": pyarrow.array([1, 2]).dictionary_encode(),
}


@pytest.mark.parametrize("column", NO_TEXT.values(), ids=NO_TEXT)
def test_columns_of_other_types_are_named_and_no_sources(tmp_path, column):
  path = tmp_path / "x.parquet"
  parquet.write_table(pyarrow.table({"text": column}), path)
  for policy in ("error", "skip"):
    said = refusal(path, "parquet", bad_rows=policy)
    assert f"{path}: row 1: 'text' (data.text_field) is a column of " in said
  parquet.write_table(pyarrow.table({"text": ["a", "b"], "source": column}), path)
  found = [document.source for document in read(path, "parquet")]
  assert found in (["1", "2"], ["x", "x"])


@pytest.mark.parametrize("encode", [False, True])
def test_a_row_that_is_no_utf8_is_named_and_skipped(tmp_path, encode):
  path = tmp_path / "x.parquet"
  column = not_text([b"a", b"\xff\xfe", None, b"b"])
  column = column.dictionary_encode() if encode else column
  parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=2)
  assert f"{path}: row 2: 'text': not UTF-8" in refusal(path, "parquet")
  said = []
  assert read(path, "parquet", bad_rows="skip", log=said.append) == [("x", "a"), ("x", "b")]
  assert "skipped 2 of 4 rows: 1 not UTF-8" in said[0]
  assert f"1 'text' null (first: {path}: row 3)" in said[0]


def test_a_column_of_nulls_has_no_text(tmp_path):
  parquet.write_table(pyarrow.table({"text": [None, None]}), tmp_path / "x.parquet")
  assert "row 1: 'text' is null" in refusal(tmp_path, "parquet")
  assert "skipped 2 of 2 rows" in refusal(tmp_path, "parquet", bad_rows="skip")


def test_two_columns_of_one_name_are_refused(tmp_path):
  table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
  parquet.write_table(table, tmp_path / "x.parquet")
  assert "2 columns are called 'text'" in refusal(tmp_path, "parquet")


def test_sources_that_are_no_utf8_or_null(tmp_path):
  path = tmp_path / "x.parquet"
  source = not_text([b"web", b"caf\xe9", None])
  parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "source": source}), path)
  assert [d.source for d in read(path, "parquet")] == ["web", "caf\\xe9", "x"]


def test_an_encrypted_file_is_named(tmp_path):
  path = tmp_path / "x.parquet"
  path.write_bytes(b"PARE" + bytes(100) + b"\x10\0\0\0PARE")
  assert f"{path}: not a readable Parquet file" in refusal(path, "parquet")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("damage", ["cut", "zeros", "ones"])
def test_a_damaged_parquet_file_is_named(tmp_path, part, damage):
  path = tmp_path / "x.parquet"
  values = [f"{i} {i * i * 7919 % 10007}" for i in range(3000)]
  parquet.write_table(pyarrow.table({"text": values}), path, row_group_size=500)
  content = path.read_bytes()
  at = int(part * len(content))
  if damage == "cut":
    path.write_bytes(content[:at])
  else:
    fill = b"\0" if damage == "zeros" else b"\xff"
    path.write_bytes(content[:at] + fill * 50 + content[at + 50 :])
  found, said = outcome(path, "parquet")
  if damage == "cut" or found is None:
    assert str(path) in said
    assert len(said.splitlines()) == 1
  else:  # the damage hit what text may be
    assert len(found) == len(values)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"garbage" * 30, b"<!DOCTYPE html><p>404"])
def test_what_is_no_array_record_is_named(tmp_path, content):
  path = tmp_path / "x.array_record"
  path.write_bytes(content)
  found, said = outcome(path, "array_record")
  assert found == [] or str(path) in said


# --- sources ------------------------------------------------------------------------------------


def lines(path: pathlib.Path, *rows: dict) -> pathlib.Path:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_the_text_is_no_source(tmp_path):
  path = lines(tmp_path / "x.jsonl", {"source": "a text"}, {"source": "another"})
  assert read(path, text_field="source") == [("x", "a text"), ("x", "another")]
  parquet.write_table(pyarrow.table({"source": ["a text"]}), tmp_path / "y.parquet")
  assert read(tmp_path, "parquet", text_field="source") == [("y", "a text")]


def test_the_field_of_the_source_is_configured(tmp_path):
  path = lines(tmp_path / "x.jsonl", {"text": "a", "source": "s", "domain": "d", "": "e"})
  assert read(path) == [("s", "a")]
  assert read(path, source_field="domain") == [("d", "a")]
  assert read(path, source_field="") == [("x", "a")]
  said = []
  assert read(path, source_field="missing", log=said.append) == [("x", "a")]
  assert said == [
    "data.source_field='missing': no row names its source there: they have their files'"
  ]
  table = {"text": ["a"], "source": ["s"], "domain": ["d"], "": ["e"]}
  parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
  assert read(tmp_path, "parquet") == [("s", "a")]
  assert read(tmp_path, "parquet", source_field="domain") == [("d", "a")]
  assert read(tmp_path, "parquet", source_field="") == [("x", "a")]
  assert read(tmp_path, "parquet", source_field="missing") == [("x", "a")]


@pytest.mark.parametrize(
  ("source", "name"),
  [
    ("web", "web"),
    (" two\nlines\t", "two lines"),
    ("", "x"),
    ("  ", "x"),
    ("a\0b\x1b[31m", "a b [31m"),
    ("caf\udce9", "caf\\udce9"),
    (7, "7"),
    (-1, "-1"),
    (10**40, "x"),
    (True, "x"),
    (1.5, "x"),
    (None, "x"),
    (["web"], "x"),
    ({"name": "web"}, "x"),
  ],
)
def test_what_a_source_may_be(tmp_path, source, name):
  path = lines(tmp_path / "x.jsonl", {"text": "a", "source": source})
  assert read(path) == [Document(name, "a")]


def test_sources_are_bounded_in_length_and_number(tmp_path):
  path = lines(tmp_path / "x.jsonl", {"text": "a", "source": "n" * 5_000_000})
  ((source, _),) = read(path)
  assert len(source) <= MAX_NAME + 3
  rows = [{"text": str(i), "source": f"s{i % 1000}"} for i in range(2000)]
  said = []
  found = read(lines(path, *rows), log=said.append)
  assert len({document.source for document in found}) == MAX_SOURCES + 1
  assert [document.source for document in found[:3]] == ["s0", "s1", "s2"]
  assert found[MAX_SOURCES].source == found[-1].source == "other"
  assert f"{2 * (1000 - MAX_SOURCES):,} documents" in said[0]
  assert len(said) == 1


def test_files_as_sources_are_bounded_too(tmp_path):
  for i in range(MAX_SOURCES + 5):
    (tmp_path / f"{i:04d}.txt").write_text(str(i))
  found = read(tmp_path, "text")
  assert [document.source for document in found[-6:]] == ["0255", *5 * ["other"]]
