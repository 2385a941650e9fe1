"""Manual pages, in the man or mdoc macros of roff, to plain text.

Fonts, tables and the definitions of macros are lost on purpose. A heading is the first line of the
paragraph under it.
"""

import re

from engram_jax.data.corpora.markup import join_lines

_NAME = r"(?:\(..|\[[^\]]*\]|.)"
_ESCAPE = re.compile(
  rf"""\\(?:
    [fnkgm]{_NAME} | s[-+]?\d+ | s\([-+]?\d\d | [hvwlLbo]'[^']*'
    | \*(?P<string>{_NAME}) | \((?P<sign>..) | \[(?P<long>[^\]]*)\] | (?P<one>.)
  )""",
  re.VERBOSE,
)
_SIGNS = dict(
  zip(
    ("bu", "em", "en", "lq", "rq", "oq", "cq", "co", "aq", "dq", "hy", "mi", "rs", ">=", "<=", "->")
    + ("<-", "+-", "mu", "de", "ga", "ha", "ti", "pl", 'L"', 'R"', "Aq", "Tm", "tm", "rg", "--"),
    [*'•—–“”‘’©\'"--\\≥≤→←±×°`^~+""\'™™®', "--"],
    strict=True,
  )
)
_ONE = dict(zip("-e ~0'`\\.", "-\\   '`\\.", strict=True))  # the rest stand for no sign
_BREAKS = frozenset(("PP", "P", "LP", "HP", "Pp", "RS", "RE", "sp", "Sp", "TQ", "Bl", "El"))
_OPEN, _CLOSE = ("nf", "Vb", "EX", "CS", "Bd"), ("fi", "Ve", "EE", "CE", "Ed")
_FONTS = frozenset(("B", "I", "SM", "SB", "R", "BR", "BI", "IR", "IB", "RB", "RI", "UR", "MT"))
_MDOC = frozenset(
  ("Nm", "Ar", "Fl", "Op", "Em", "Sy", "Pa", "Xr", "Cm", "Dv", "Ev", "Li", "Va", "Ql", "Dq", "Sq")
  + ("Nd", "Ic", "Ft", "Fn", "Fa", "Ad", "Bx")
)
_SKIPPED = {"de": "..", "de1": "..", "ig": "..", "TS": ".TE", "EQ": ".EN", "PS": ".PE"}
_BREAK = "\x00"  # among lines that are to be filled: here a new one begins
_SHORT_TAG = 4  # signs of a tag that stays on the line of its text: "(a)", a dot


def strip_roff(page: str) -> str:
  """The text of a manual page in the man or mdoc macros, from its first heading on."""
  return _RoffText().read(page)


class _RoffText:
  """Reads a page line by line: text fills paragraphs, but not between `nf` and `fi`."""

  def __init__(self) -> None:
    self._blocks: list[str] = []
    self._lines: list[str] = []
    self._heading = ""
    self._verbatim = self._tag_next = False

  def read(self, page: str) -> str:
    until, depth, begun = "", 0, False
    for line in page.splitlines():
      opened = len(re.findall(r"\\\{", line)) - len(re.findall(r"\\\}", line))
      if until:
        until = "" if line.startswith(until) else until
      elif depth or (opened > 0 and line[:1] in (".", "'")):
        depth = max(0, depth + opened)  # a conditional of the macros
      elif line[:1] in (".", "'"):
        name, _, rest = line[1:].strip().partition(" ")
        until = _SKIPPED.get(name, "")
        begun = begun or name in ("SH", "Sh")
        if begun:
          self._macro(name, rest)
      elif begun:
        self._text(line)
    self._end_block()
    return "\n\n".join(self._blocks)

  def _macro(self, name: str, rest: str) -> None:
    words = [a or b for a, b in re.findall(r'"([^"]*)"?|(\S+)', re.sub(r'\\".*', "", rest))]
    if name in ("SH", "Sh", "SS", "Ss"):
      self._end_block()
      self._verbatim = False
      title = _plain(" ".join(words)).strip()
      self._heading = f"{self._heading}\n{title}" if self._heading else title
    elif name in ("TP", "IP", "It"):
      self._end_block()
      self._tag_next = name == "TP"
      if name != "TP" and words:
        tag = _plain(" ".join(words) if name == "It" else words[0])
        self._lines += [tag] if len(tag) <= _SHORT_TAG else [tag, _BREAK]
    elif name in _BREAKS:
      self._end_block()
    elif name in _OPEN or name in _CLOSE:
      self._end_block()
      self._verbatim = name in _OPEN
    elif name == "br":
      self._lines.append(_BREAK)
    elif name in _FONTS or name in _MDOC:
      self._text(("" if len(name) == 2 and name in _FONTS else " ").join(words))

  def _text(self, line: str) -> None:
    if not line.strip() and not self._verbatim:
      self._end_block()
      return
    self._lines.append(_plain(line))
    if self._tag_next:
      self._lines.append(_BREAK)
      self._tag_next = False

  def _end_block(self) -> None:
    lines, self._lines = self._lines, []
    if self._verbatim:
      text = "\n".join(line.rstrip() for line in lines if line != _BREAK).strip("\n")
    else:
      text = "\n".join(map(join_lines, "\n".join(lines).split(_BREAK))).strip()
    if text.strip():
      self._blocks.append(f"{self._heading}\n{text}" if self._heading else text)
      self._heading = ""


def _plain(text: str) -> str:
  """A line without escapes: fonts and sizes vanish, signs by name become themselves."""

  def sign(match: re.Match[str]) -> str:
    if one := match["one"]:
      return "" if one == '"' else _ONE.get(one, "")
    name = match["string"] or match["sign"] or match["long"] or ""
    name = name[1:] if name[:1] == "(" and len(name) == 3 else name.strip("[]")
    return _SIGNS.get(name, "")

  return _ESCAPE.sub(sign, re.sub(r'\\".*', "", text))
