"""What the README shows is there, and its Python runs."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, capsys):
  exec(compile(code, "README.md", "exec"), {})  # the reader would paste it
  assert capsys.readouterr().out == "(1, 4, 4)\n"


def test_every_file_of_the_tree_exists():
  (tree,) = (block for block in blocks("text") if "engram_jax/\n" in block)
  folder, missing = ROOT, []
  for line in tree.splitlines():
    deep = line.startswith("    ")
    name = line.split()[0]
    if name.endswith("/") and not deep:
      folder = ROOT / name if not line.startswith(" ") else ROOT / "engram_jax" / name
    paths = re.findall(r"\S+(?:\.py|\.yaml|/)(?=\s|$)", line)
    home = folder if deep else (ROOT / "engram_jax" if line.startswith("  ") else ROOT)
    missing += [path for path in paths if not (home / path).exists()]
  assert missing == []


def test_every_config_is_named():
  assert [p.stem for p in (ROOT / "configs").glob("*.yaml") if p.stem not in README] == []


def test_every_relative_link_leads_somewhere():
  links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
  assert links
  assert [link for link in links if not (ROOT / link).exists()] == []
