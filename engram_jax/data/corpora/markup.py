"""HTML and MediaWiki markup to plain text: paragraphs with a blank line between.

Navigation, tables of wikis, references and fonts are lost on purpose. A heading is the first line
of the paragraph under it, so that it is never alone.
"""

import html.parser
import re
from collections.abc import Collection
from typing import Any

from engram_jax.errors import ConfigError

HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6", "dt"))
BLOCKS = HEADINGS | {
  *("address", "article", "aside", "blockquote", "body", "center", "dd", "div", "dl", "fieldset"),
  *("figure", "form", "hr", "html", "important", "li", "main", "note", "ol", "p", "pre", "section"),
  *("table", "title", "ul"),
}
UNSEEN = frozenset(("head", "script", "style", "nav", "header", "footer", "noscript", "svg"))
VOID = frozenset(("br", "col", "hr", "img", "input", "link", "meta"))  # they have no end
_WIDE = r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\u3000-\u303f]"  # Chinese signs, without spaces
_WIDE_BREAK = re.compile(rf"(?<={_WIDE})\s*\n\s*(?={_WIDE})")


def join_lines(text: str) -> str:
  """A paragraph on one line: a space for each line end, and none between Chinese signs."""
  return re.sub(r"\s+", " ", _WIDE_BREAK.sub("", text)).strip()


def strip_html(markup: str, skip: Collection[str] = (), start: str = "") -> str:
  """The text of an HTML page or fragment.

  skip: classes of elements that are left out, and ids with a "#" before them. start: the class or
  id of the element to begin with.
  """
  if not start and "<" not in markup and "&" not in markup:
    return join_lines(markup)
  parser = _HtmlText(frozenset(skip), start)
  parser.feed(markup)
  parser.close()
  return parser.text()


class _HtmlText(html.parser.HTMLParser):
  """Collects blocks of text. Elements need not be closed, as few are in fragments."""

  def __init__(self, skip: frozenset[str], start: str):
    super().__init__()
    self._skip, self._start = skip, start
    self._blocks: list[str] = []
    self._line: list[str] = []
    self._heading = ""
    self._unseen = ("", 0)  # the element that is being left out, and its depth in elements alike
    self._preformatted = 0

  def text(self) -> str:
    self._end_block()
    return "\n\n".join([*self._blocks, *([self._heading] if self._heading else [])])

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    names = {
      f"#{name}" if key == "id" else name
      for key, value in attrs
      if key in ("id", "class")
      for name in (value or "").split()
    }
    if self._start:
      if self._start not in names:
        return
      self._start = ""
    unseen, depth = self._unseen
    if depth:
      self._unseen = (unseen, depth + (tag == unseen))
    elif tag in UNSEEN or (names & self._skip and tag not in VOID):
      self._unseen = (tag, 1)
    elif tag in BLOCKS:
      self._end_block()
      self._preformatted += tag == "pre"
    elif tag in ("br", "tr"):
      self._line.append("\n")
    elif tag in ("td", "th"):
      self._line.append(" ")

  def handle_endtag(self, tag: str) -> None:
    unseen, depth = self._unseen
    if depth:
      self._unseen = (unseen, depth - (tag == unseen))
    elif tag in BLOCKS and not self._start:
      self._end_block(is_heading=tag in HEADINGS)
      self._preformatted = max(0, self._preformatted - (tag == "pre"))

  def handle_data(self, data: str) -> None:
    if self._start or self._unseen[1]:
      return
    if not self._preformatted:
      data = re.sub(r"\s+", " ", _WIDE_BREAK.sub("", data))
    self._line.append(data)

  def _end_block(self, is_heading: bool = False) -> None:
    text = "".join(self._line).replace("\xa0", " ").replace("\u200b", "")
    self._line = []
    if self._preformatted:
      text = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
    else:
      text = re.sub(r" *\n *", "\n", re.sub(r" +", " ", text)).strip()
      text = re.sub(r"\n+", "\n", text)
    if text.strip():
      text = f"{self._heading}\n{text}" if self._heading else text
      self._heading = text if is_heading else ""
      if not is_heading:
        self._blocks.append(text)


# --- MediaWiki --------------------------------------------------------------------------------

_OTHER_PAGES = re.compile(
  r"\s*:?\s*(file|image|category|media|wikt|[a-z]{2,3}(-[a-z]+)*)\s*:", re.IGNORECASE
)
_NO_PROSE = frozenset(("ref", "table", "gallery", "timeline", "imagemap", "syntaxhighlight"))
_LISTS = frozenset(
  ("references", "external links", "see also", "further reading", "notes", "bibliography")
  + ("sources", "footnotes", "citations", "notes and references", "references and notes")
)
# Templates whose text is a part of the sentence, with the arguments that are the text.
_SPOKEN = {"convert": ("1", "2"), "lang": ("2",), "nowrap": ("1",), "nihongo": ("1",)}
_REMAINS = re.compile(
  r"[|!]|\{\||.*(?:\|thumb|</?(?:ref|blockquote)|\[\[|\]\]|align=)"
)  # of unbalanced markup
_EMPTY_BRACKETS = re.compile(r" *[(\[][\s,;:/·]*[)\]]")


def require_wiki_parser() -> None:
  """Raises ConfigError where mwparserfromhell is not installed."""
  try:
    import mwparserfromhell  # noqa: F401
  except ImportError:
    raise ConfigError(
      "data.source='english' and 'english_large' need mwparserfromhell: "
      "pip install 'engram_jax[research]'"
    ) from None


def strip_wiki(markup: str) -> str:
  """The prose of an article in MediaWiki markup, without tables, references and lists of links."""
  import mwparserfromhell

  code = mwparserfromhell.parse(markup)
  for section in code.get_sections(levels=[2]):
    if str(section.filter_headings()[0].title).strip().lower() in _LISTS:
      _remove(code, section)
  for tag in code.filter_tags():
    name = str(tag.tag).strip().lower()
    if name in _NO_PROSE:
      _remove(code, tag)
    elif name == "math":
      _replace(code, tag, str(tag.contents).strip())
  for link in code.filter_wikilinks():
    if _OTHER_PAGES.match(str(link.title)):
      _remove(code, link)
  for template in code.filter_templates():
    arguments = _SPOKEN.get(str(template.name).strip().lower(), ())
    spoken = [template.get(a).value.strip_code() for a in arguments if template.has(a)]
    _replace(code, template, " ".join(spoken))
  # Read once more: what was between a heading and its paragraph, or broke a table, is gone.
  prose = re.sub(r"^(=+[^=\n]+=+)[ \t]*\n\s*", r"\n\n\1\n", str(code), flags=re.MULTILINE)
  code = mwparserfromhell.parse(prose)
  for tag in code.filter_tags(matches=lambda tag: str(tag.tag) == "table"):
    _remove(code, tag)
  text = code.strip_code(normalize=True, collapse=True).replace("\xa0", " ")
  lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())
  kept = "\n".join(line for line in lines if not _REMAINS.match(line))
  return re.sub(r"\n{3,}", "\n\n", _EMPTY_BRACKETS.sub("", kept)).strip()


def _remove(code: Any, node: Any) -> None:
  _replace(code, node, "")


def _replace(code: Any, node: Any, text: str) -> None:
  try:
    code.replace(node, text)
  except ValueError:
    return  # it was inside of something removed before
