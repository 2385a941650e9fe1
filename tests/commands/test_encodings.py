"""Commands end as they should where a terminal cannot show or take what they print."""

import os
import pathlib
import subprocess
import sys

import pytest

import engram_jax
from engram_jax.config import load_config
from engram_jax.errors import ConfigError

ROOT = pathlib.Path(engram_jax.__file__).parents[1]
PROGRAM = """
import logging, sys
from engram_jax.cli import log, run_command
from engram_jax.errors import ConfigError
logging.basicConfig()

def main():
  from rich.console import Console
  from tqdm import tqdm
  for text in ("\\u00e9 \\U0001f600", "half \\ud83d", "a byte \\udcff"):
    print(text)
    log(text)
    sys.stdout.write(text + "\\n")
    print(text, file=sys.stderr)
    tqdm.write(text, file=sys.stderr)
    logging.warning(text)
    Console().print(text)
  for _ in tqdm(["\\u00e9"], desc="\\u00e9\\udcff"):
    pass
  open("data", "w").write("data")
  if "fail" in sys.argv:
    raise ConfigError("\\u00e9 \\udcff is wrong")
  return 0

run_command(main)
"""


def run(
  folder: pathlib.Path, *words: str | bytes, shell: str = "", **environment: str
) -> subprocess.CompletedProcess:
  """Runs Python with words; shell: what a shell adds behind the command."""
  command = [sys.executable, *words]
  if shell:
    command = ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *command]
  environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
  return subprocess.run(command, cwd=folder, capture_output=True, env=environment, timeout=300)


ENCODINGS = [
  {"PYTHONIOENCODING": "ascii"},
  {"PYTHONIOENCODING": "latin-1"},
  {"PYTHONIOENCODING": "ascii:strict"},
  {"PYTHONIOENCODING": "utf-16"},
  {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
  {"LC_ALL": "C.UTF-8"},
]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: " ".join(encoding.values()))
@pytest.mark.parametrize("fails", [False, True])
def test_every_text_is_printed_in_every_encoding(tmp_path, encoding, fails):
  done = run(tmp_path, "-c", PROGRAM, *["fail"] * fails, **encoding)
  assert done.returncode == (2 if fails else 0), done.stderr
  assert b"Traceback" not in done.stderr
  assert b"Error" not in done.stderr
  name = encoding.get("PYTHONIOENCODING", "utf-8").split(":")[0]
  out = done.stdout.decode(name)
  if encoding.get("PYTHONUTF8") == "0":
    name = "ascii"
  shown = "\\xe9" if name == "ascii" else "é"
  assert shown in out
  assert "a byte \\udcff" in out
  assert (f"error: {shown} \\udcff is wrong" in done.stderr.decode(name)) == fails


@pytest.mark.parametrize("shell", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
@pytest.mark.parametrize("fails", [False, True])
def test_closed_streams_end_nothing_and_no_file_takes_their_place(tmp_path, shell, fails):
  done = run(tmp_path, "-c", PROGRAM, *["fail"] * fails, shell=shell)
  assert done.returncode == (2 if fails else 0), done.stderr
  assert b"Traceback" not in done.stderr
  assert (tmp_path / "data").read_text() == "data"


def test_a_full_disk_behind_stdout_is_an_error(tmp_path):
  done = run(tmp_path, "-c", PROGRAM, shell=">/dev/full")
  assert done.returncode == 5
  assert (
    done.stderr.decode()
    .strip()
    .endswith("standard output cannot be written: No space left on device")
  )
  assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["| true", "| head -1", "2>&1 | true", "2> >(true)"])
def test_readers_that_go_end_nothing_by_an_error(tmp_path, shell):
  done = run(tmp_path, "-c", PROGRAM, shell=shell)
  assert done.returncode == 0
  assert b"Traceback" not in done.stderr
  assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("words", [["plan", "--help"], ["plan", "--config", "configs/tiny.yaml"]])
@pytest.mark.parametrize("shell", ["| true", ">&-", "2>&-", ">&- 2>&-"])
def test_commands_in_a_pipe_and_without_streams(tmp_path, words, shell):
  done = run(tmp_path, "-m", "engram_jax", *words, shell=shell)
  assert done.returncode == 0, done.stderr
  assert not done.stderr


NAMES = [b"caf\xe9", "é".encode(), b"\xed\xa0\x80", b"a\x1b[31mb", b"a\nb", "\u202e\u2028".encode()]
COMMANDS = [
  ["plan", "--config", b"%s.yaml"],
  ["train", "--config", b"%s.yaml"],
  ["train", "--data.source", "text", "--data.path", b"%s"],
  ["train", "--data.tokenizer", b"%s"],
  ["train", "--%s", "1"],
  ["eval", "--run", b"%s"],
  ["generate", "--prompt", "a", "--run", b"%s"],
  ["serve", "--run", b"%s"],
  ["analyze", "gates", "--text", "a", "--run", b"%s"],
  ["inspect", "--checkpoint", b"%s"],
  ["convert", "verify", "--file", b"%s"],
  ["convert", "import", "--from", b"%s", "--run", "x"],
  ["convert", b"%s"],
  [b"%s"],
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(map(str, words[:2])))
def test_names_that_cannot_be_shown(tmp_path, name, words):
  require_no_traceback(tmp_path, words, name)


@pytest.mark.parametrize("words", COMMANDS[2:3] + COMMANDS[5:6] + COMMANDS[-2:], ids=str)
def test_some_names_that_cannot_be_shown(tmp_path, words):
  require_no_traceback(tmp_path, words, NAMES[0])


def require_no_traceback(folder: pathlib.Path, words: list[str | bytes], name: bytes) -> None:
  filled = [(w if isinstance(w, bytes) else w.encode()).replace(b"%s", name) for w in words]
  done = run(folder, "-m", "engram_jax", *filled, PYTHONIOENCODING="ascii", JAX_PLATFORMS="cpu")
  assert done.returncode in (2, 3, 5), done.stderr
  assert b"Traceback" not in done.stderr
  assert done.stderr.isascii()


@pytest.mark.parametrize("field", ["run.root", "train.sample_prompt"])
def test_what_must_be_text_is_refused_before_anything_runs(field):
  with pytest.raises(ConfigError, match=r"='\\udcff' holds bytes that are no UTF-8"):
    load_config(None, {field: "\udcff"})


@pytest.mark.parametrize(
  "words",
  [
    ["eval", "--run", "x", "--prompt", b"\xff"],
    ["analyze", "gates", "--run", "x", "--text", b"\xff"],
    ["inspect", "--checkpoint", "x", "--text", b"\xff"],
    ["generate", "--run", "x", "--prompt", b"\xff"],
  ],
  ids=lambda words: words[0],
)
def test_texts_that_are_no_text_are_refused(tmp_path, words):
  done = run(tmp_path, "-m", "engram_jax", *words, JAX_PLATFORMS="cpu")
  assert done.returncode == 2
  assert done.stderr.startswith(
    f"error: {words[-2]} '\\udcff' holds bytes that are no UTF-8".encode()
  )
