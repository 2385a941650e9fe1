"""Hostile config files: each is refused in a line that names it, whatever it holds."""

import os
import pathlib

import pytest
import yaml

from engram_jax.cli import parse_config, run_command
from engram_jax.config import Config, load_config
from engram_jax.config.bounded import cut, read_bounded, shorten
from engram_jax.config.load import MAX_BYTES, MAX_CHAIN, MAX_DEPTH, MAX_NODES
from engram_jax.errors import ConfigError

LONG = "x" * 20_000
BOMB = "a0: &a0 [1, 1]\n" + "".join(
  f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
  f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)

# Each: what the file holds, and what its refusal must say.
HOSTILE = {
  "an alias bomb": (BOMB, ["alias *a0", "extends", "line 2"]),
  "merges": (MERGES, ["alias *a0"]),
  "a merge": ("train: {<<: {steps: 5}}", ["the key '<<'"]),
  "a list in itself": ("train: &a [*a]", ["alias *a"]),
  "a mapping in itself": ("&a train: {train: *a}", ["alias *a"]),
  "deep lists": ("a: " + "[" * 30_000, [f"{MAX_DEPTH} deep"]),
  "deep mappings": ("{a: " * 15_000, [f"{MAX_DEPTH} deep"]),
  "deep blocks": ("- " * 30_000, [f"{MAX_DEPTH} deep"]),
  "many values": ("a: [" + "1," * 30_000 + "]", [f"more than {MAX_NODES:,} values"]),
  "many keys": ("".join(f"a{i}: 1\n" for i in range(2000)), ["'a0'", "and 1,980 more"]),
  "a list as key": ("? [a, b]\n: 1", ["the key of several values"]),
  "a mapping as key": ("? {a: b}\n: 1", ["the key of several values"]),
  "a number as key": ("train: {1: 2}", ["the key '1'", "no text"]),
  "null as key": ("~: 1", ["the key '~'"]),
  "true as key": ("true: 1", ["the key 'true'"]),
  "a date as key": ("2024-01-01: 1", ["the key '2024-01-01'"]),
  "a key twice": ("train: {steps: 1, steps: 2}", ["'steps' stands twice"]),
  "a long key twice": (f"{LONG[:900]}: 1\n{LONG[:900]}: 2", ["stands twice"]),
  "a long key": (f"? {LONG}\n: 1", ["unknown key 'xxx"]),
  "a digit too many": (f"train: {{steps: {'9' * 5000}}}", ["4300", "digits"]),
  "a long hexadecimal": (f"train: {{steps: 0x{'f' * 5000}}}", ["train.steps", "too long to show"]),
  "a long sexagesimal": (f"train: {{steps: 1{':59' * 9000}}}", ["train.steps"]),
  "digits in a text": (f"train: {{steps: '{'9' * 4000}'}}", ["train.steps", "less than"]),
  "a seed beyond 64 bits": ("train: {seed: 18446744073709551616}", ["train.seed", "less than"]),
  "orders without end": ("model: {engram: {max_ngram: 1000000000}}", ["model.engram.max_ngram"]),
  "1e999": ("train: {optimizer: {eps: 1e999}}", ["train.optimizer.eps", "finite"]),
  "inf": ("train: {optimizer: {eps: .inf}}", ["train.optimizer.eps", "finite", "inf"]),
  "nan": ("train: {z_loss: .nan}", ["train.z_loss", "finite", "nan"]),
  "a date": ("train: {steps: 2024-01-01}", ["train.steps", "integer"]),
  "a date that is none": ("train: {steps: 2024-13-45}", ["month"]),
  "an odd hexadecimal": ("train: {steps: 0x_}", ["invalid literal"]),
  "binary": ("run: {name: !!binary aGVsbG8=}", ["the tag", "binary"]),
  "python": ("a: !!python/object/apply:os.system ['touch harmed']", ["the tag", "python/object"]),
  "a tag of one's own": ("a: !Thing {b: 1}", ["the tag !Thing"]),
  "an int that is none": ("a: !!int ''", ["the tag"]),
  "a bool that is none": ("a: !!bool maybe", ["the tag"]),
  "a tab": ("train:\n\tsteps: 5", ["'\\t'"]),
  "NUL": ("train:\0 {steps: 5}", ["special characters"]),
  "a bell": ("run: {name: a\a}", ["special characters"]),
  "NUL in quotes": ('run: {name: "a\\0b"}', ["a text with NUL", "line 1"]),
  "half a pair": ('run: {name: "\\ud800"}', ["run.name"]),
  "a character beyond all": ('run: {name: "\\Uffffffff"}', ["not YAML"]),
  "two documents": ("train: {steps: 5}\n---\ntrain: {steps: 6}", ["another document"]),
  "an unclosed list": ("train: [", ["not YAML", "line 1"]),
  "another version": ("%YAML 7.1\n---\na: 1", ["version"]),
  "an unknown anchor": ("a: *b", ["alias *b"]),
  "a list": ("[]", ["a mapping of keys, not list"]),
  "a text": ("train", ["a mapping of keys, not str"]),
  "false": ("false", ["a mapping of keys, not bool"]),
  "a section that is a list": ("train: [1, 2]", ["train"]),
  "a section that is a text": (f"train: {LONG}", ["train", "..."]),
  "a long value": (f"run: {{name: '{LONG}!'}}", ["run.name", "..."]),
  "a long choice": (f"data: {{source: {LONG}}}", ["data.source", "'wiki'", "..."]),
  "a long list": (f"model: {{engram: {{layers: {[9] * 4000}}}}}", ["layers=[9, 9", "..."]),
  "extends a list": ("extends: [a.yaml]", ["extends", "['a.yaml']"]),
  "extends a number": ("extends: 5", ["extends", "got 5"]),
  "extends false": ("extends: false", ["extends", "got False"]),
  "extends a mapping": ("extends: {a: b}", ["extends", "{'a': 'b'}"]),
  "extends nothing": ("extends: ''", ["extends", "got ''"]),
  "extends NUL": ('extends: "a\\0.yaml"', ["a text with NUL"]),
  "extends lines": ('extends: "a\\nb.yaml"', ["extends", "a\\nb"]),
  "extends a long name": (f"extends: {LONG}", ["extends", "..."]),
  "extends a longer name than files have": (f"extends: {LONG[:300]}", ["File name too long"]),
  "extends itself": ("extends: c.yaml", ["extends itself"]),
  "extends itself by another way": ("extends: ../{folder}/./c.yaml", ["extends itself"]),
  "extends a folder": ("extends: .", ["a folder, not a file"]),
  "extends zeros without end": ("extends: /dev/zero", ["/dev/zero", "a device, not a file"]),
  "extends a terminal": ("extends: /dev/stdin", ["/dev/stdin", "not a file"]),
  "extends a pipe": ("extends: pipe", ["a pipe, not a file"]),
  "extends what is not there": ("extends: nowhere.yaml", ["nowhere.yaml: no such config file"]),
}


def refusal(path: pathlib.Path) -> str:
  """The message of a refusal: short lines that each begin with the name of a file."""
  with pytest.raises(ConfigError) as caught:
    load_config(path)
  lines = str(caught.value).splitlines()
  assert lines
  assert all(line.startswith(str(path.parent)) or "/dev/" in line for line in lines)
  assert max(map(len, lines)) < 1000 + len(str(path))
  return str(caught.value)


@pytest.mark.parametrize(("text", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused(tmp_path, monkeypatch, text, words):
  monkeypatch.chdir(tmp_path)
  os.mkfifo(tmp_path / "pipe")
  path = tmp_path / "c.yaml"
  path.write_text(text.replace("{folder}", tmp_path.name))
  message = refusal(path)
  assert [word for word in words if word not in message] == []
  assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ("train: {steps: 5}".encode("utf-16"), "not UTF-8"),
    (b"run: {name: '\xff'}", "not UTF-8"),
    (b"run: {name: '\xed\xa0\x80'}", "not UTF-8"),
    (b"#" * (MAX_BYTES + 1), "at most 65,536"),
  ],
)
def test_bytes_that_are_no_text_or_too_many_are_refused(tmp_path, content, words):
  path = tmp_path / "c.yaml"
  path.write_bytes(content)
  assert words in refusal(path)


def test_what_is_no_file_is_refused(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  assert "a pipe, not a file" in refusal(tmp_path / "pipe")
  (tmp_path / "folder").mkdir()
  assert "a folder, not a file" in refusal(tmp_path / "folder")
  (tmp_path / "loop").symlink_to("loop")
  assert "symbolic links" in refusal(tmp_path / "loop")
  (tmp_path / "zero").symlink_to("/dev/zero")
  assert "a device, not a file" in refusal(tmp_path / "zero")


def test_a_chain_of_files_has_an_end(tmp_path):
  for i in range(MAX_CHAIN + 2):
    (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\ntrain: {{steps: {i + 1}}}\n")
  (tmp_path / f"{MAX_CHAIN + 2}.yaml").write_text("train: {batch_size: 4}")
  assert f"{tmp_path / '0.yaml'}: extends more than {MAX_CHAIN} files" in refusal(
    tmp_path / "0.yaml"
  )
  cfg = load_config(tmp_path / "2.yaml")
  assert (cfg.train.steps, cfg.train.batch_size) == (3, 4)


def test_the_commands_say_it_in_short_lines(tmp_path, capsys):
  path = tmp_path / "c.yaml"
  path.write_text(f"run: {{name: '{LONG}!'}}\ntrain: {{steps: [{'7, ' * 3000}]}}\n")
  with pytest.raises(SystemExit) as left:
    run_command(lambda: parse_config("train.py", "", ["--config", str(path)]) and 0)
  assert left.value.code == 2
  out, err = capsys.readouterr()
  assert not out
  lines = err.splitlines()
  assert lines[0].startswith(f"error: {path}: run.name: ")
  assert lines[1].startswith(f"{path}: train.steps: Input should be a valid integer (got [7, 7")
  assert len(lines) == 2
  assert max(map(len, lines)) < 500
  path.write_text("train: {steps: 5}")
  with pytest.raises(SystemExit) as left:
    run_command(
      lambda: parse_config("train.py", "", ["--config", str(path), "--run.name", LONG + "!"]) and 0
    )
  assert left.value.code == 2
  assert len(capsys.readouterr().err) < 500


def test_what_a_run_writes_is_read_back_and_has_no_alias(tmp_path):
  cfg = Config()
  path = tmp_path / "config.yaml"
  path.write_text(cfg.to_yaml())
  assert "*" not in cfg.to_yaml().replace("[A-Za-z0-9]", "")
  assert load_config(path) == cfg
  assert len(cfg.to_yaml()) * 10 < MAX_BYTES
  tree = yaml.safe_load(cfg.to_yaml())
  path.write_text("\N{BYTE ORDER MARK}" + yaml.safe_dump(tree, default_flow_style=True))
  assert load_config(path) == cfg
  path.write_text("# nothing\n")
  assert load_config(path) == cfg


def test_a_file_may_be_as_large_as_its_limit(tmp_path):
  (tmp_path / "a").write_bytes(b"a" * 10)
  assert read_bounded(tmp_path / "a", 10) == b"a" * 10
  with pytest.raises(ValueError, match="has 10 bytes: at most 9"):
    read_bounded(tmp_path / "a", 9)
  with pytest.raises(ValueError, match="at most 5"):  # its size says 0
    read_bounded(pathlib.Path("/proc/self/status"), 5)


def test_values_are_cut():
  assert shorten("abc") == "'abc'"
  assert shorten("x" * 200) == "'" + "x" * 99 + "..."
  assert shorten(10**5000) == "a int too long to show"
  nested = []
  for _ in range(100_000):
    nested = [nested]
  assert shorten(nested) == "a list too long to show"
  assert cut("a\n  b", 10) == "a b"
  assert cut("abc", 3) == "abc"
  assert cut("abcd", 3) == "abc..."
  assert cut(" " * 100 + "a", 3) == "..."
