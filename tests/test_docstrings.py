"""Docstrings that stand alone, and letters of shapes that are global or declared."""

import ast
import pathlib
import re

import pytest

import engram_jax

PACKAGE = pathlib.Path(engram_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
GLOBAL_LETTERS = set("BTDGVJCMR")
# A docstring begins with a verb or a noun phrase: not in the middle of a sentence.
UNFIT = re.compile(r"(Of|What|Where|The same|How|Who|Whether|When|As|Why|Is|With|Until|Without)\b")


def documented(tree: ast.Module):
  for node in ast.walk(tree):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
      yield node, ast.get_docstring(node)


def letters_in_suffixes(source: str) -> set[str]:
  """Capitals in the suffixes of array names (x_BTD, ids_U1), which stand for axes."""
  suffixes = re.findall(r"\b[a-z][a-z0-9_]*_([A-Z1n][A-Za-z1]{0,5})\b", source)
  return {letter for suffix in suffixes for letter in suffix if letter.isupper()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_begin_with_a_verb_or_a_noun_phrase(path):
  tree = ast.parse(path.read_text())
  unfit = [
    f"line {getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"
    for node, text in documented(tree)
    if text and UNFIT.match(text)
  ]
  assert not unfit


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_public_has_a_docstring(path):
  tree = ast.parse(path.read_text())
  assert path.name == "__main__.py" or ast.get_docstring(tree)
  public = [
    node
    for owner in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
    for node in owner.body
    if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
  ]
  assert [f"line {n.lineno}: {n.name}" for n in public if not ast.get_docstring(n)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_letters_are_global_or_declared_where_they_are_local(path):
  source = path.read_text()
  _, _, declared = (ast.get_docstring(ast.parse(source)) or "").partition("Local letter")
  local = letters_in_suffixes(source) - GLOBAL_LETTERS
  assert local <= set(re.findall(r"\b[A-Z]\b", declared))
  redeclared = re.findall(r"[:;]\s(?:and\s)?([A-Z])(?:,| =)", declared)
  assert not GLOBAL_LETTERS & set(redeclared)
