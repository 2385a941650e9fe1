"""Paragraphs, HTML, wiki markup and manual pages become plain text, none of it twice."""

import hypothesis
import pytest
from archives_by_hand import quiet
from hypothesis import strategies

from engram_jax.data.corpora.manual_pages import strip_roff
from engram_jax.data.corpora.markup import strip_html, strip_wiki
from engram_jax.data.corpora.paragraphs import drop_repeats, group, split_paragraphs
from engram_jax.data.files import Document

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
