"""`serve` on a run that train.py wrote: a process, as it is used, and what it refuses to start."""

import json
import re
import signal
import subprocess
import sys

import httpx
import pytest
from conftest import ROOT

from engram_jax import __main__ as package
from engram_jax.commands.serve import API_KEY, ServeArgs, check, is_loopback, read_template
from engram_jax.errors import ConfigError

PROMPT = "def insort("
NAMED = [{"name": "x", "template": "1"}, {"name": "default", "template": "2"}]
SIZES = ("--slots", 2, "--capacity", 64, "--chunk", 16)


@pytest.fixture
def run(trained):
  return trained


def test_a_process_serves_what_generate_says_and_ends_when_told(lab, run):
  """SIGTERM in the middle of a stream: it goes on to its end, then the process leaves with 0."""
  said = lab.run(package, "generate", "--run", run, "--prompt", PROMPT, "--tokens", 12, "--json")
  (expected,) = json.loads(said.out)["completions"]
  words = ["-m", "engram_jax", "serve", "--run", run, "--port", 0, *SIZES]
  command = [sys.executable, *map(str, words)]
  with subprocess.Popen(
    command, env=lab.environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
  ) as server:
    try:
      address = wait_for_address(server)
      asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "model": "t"}
      answer = httpx.post(f"{address}v1/completions", json=asked, timeout=120).json()
      assert answer["choices"][0]["text"] == expected["text"]
      assert "<textarea" in httpx.get(address).text
      asked |= {"stream": True, "max_tokens": 40}
      with httpx.stream("POST", f"{address}v1/completions", json=asked, timeout=120) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
      assert server.wait(timeout=120) == 0
      assert server.stderr.read().endswith("stopped\n")
    finally:
      server.kill()


def wait_for_address(server):
  lines = []
  for line in server.stderr:
    lines.append(line)
    if found := re.search(r"serving t, step 24: (http://127\.0\.0\.1:\d+/)", line):
      return found[1]
  pytest.fail("".join(lines))


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("--host", "0.0.0.0"), "lets other machines in: give --api_key"),
    (("--host", "::"), "lets other machines in"),
    (("--host", "example.org"), "lets other machines in"),
    (("--api_key", ""), "must be printable ASCII"),
    (("--api_key", "clé"), "must be printable ASCII"),
    (("--port", 70000), "--port 70000 must be from 0 to 65535"),
    (("--slots", 0), "--slots 0 must be from 1"),
    (("--queue", 0), "--queue 0 must be from 1"),
    (("--capacity", 1), "--capacity 1 must be from 2"),
    (("--chunk", 0), "--chunk 0 must be from 1"),
    (("--capacity", 1 << 24), "--capacity 16777216 must be from 2 to 1048576"),
    (("--slots", 4096, "--capacity", 1 << 20), "4096 requests of 1,048,576 tokens keep"),
    (("--placement", "file"), "goes with --placement file"),
    (("--step", 99), "--step 99 is not saved"),
    (("--chat_template", "nowhere.jinja"), "nowhere.jinja"),
  ],
)
def test_mistakes_are_told_with_code_2(lab, run, monkeypatch, words, message):
  monkeypatch.delenv(API_KEY, raising=False)
  done = lab.run(package, "serve", "--run", run, *words)
  assert done.code == 2
  assert done.out == ""
  assert message in done.err


def test_a_server_does_not_wait_for_rows_for_ever(tmp_path):
  assert ServeArgs(tmp_path).rows.deadline == 30
  ServeArgs(tmp_path).rows.check(memory=False)  # nobody asked for a place


def test_a_key_opens_other_addresses(tmp_path):
  check(ServeArgs(tmp_path, host="0.0.0.0"), "a-key")
  for host in ("127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost"):
    assert is_loopback(host)
    check(ServeArgs(tmp_path, host=host), None)
  for host in ("0.0.0.0", "192.168.0.1", "::", "localhost.example.org", ""):
    assert not is_loopback(host)


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install 'engram_jax\[serve\]'"):
    check(ServeArgs(tmp_path), None)


@pytest.mark.parametrize(
  ("files", "template", "names"),
  [
    ({}, None, {}),
    (
      {"tokenizer_config.json": {"chat_template": "a", "eos_token": "<e>"}},
      "a",
      {"eos_token": "<e>"},
    ),
    ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "b"}, "b", {}),
    (
      {"tokenizer_config.json": {"bos_token": {"content": "<b>"}, "eos_token": None}},
      None,
      {"bos_token": "<b>"},
    ),
    ({"tokenizer_config.json": {"chat_template": NAMED}}, "2", {}),
  ],
)
def test_the_chat_template_of_a_run(tmp_path, files, template, names):
  for name, text in files.items():
    (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))
  assert read_template(tmp_path) == (template, names)
  (tmp_path / "own.jinja").write_text("mine")
  assert read_template(tmp_path, tmp_path / "own.jinja") == ("mine", names)


@pytest.mark.parametrize(
  "text", ["{", "[]", '{"chat_template": 1}', '{"chat_template": [1]}', "\xff"]
)
def test_a_broken_tokenizer_config_is_refused(tmp_path, text):
  (tmp_path / "tokenizer_config.json").write_bytes(text.encode("latin-1"))
  with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
    read_template(tmp_path)
