"""`generate` on a run that train.py wrote: one text, wherever its tables are."""

import io
import json
import re
import signal
import sys

import pytest

from engram_jax import __main__ as package
from engram_jax.commands import convert, generate
from engram_jax.inference.decoder import Decoder

PROMPTS = ("def insort(", "import")
FILE = ("--prompt", "x", "--placement", "file", "--table", "t.engram")


@pytest.fixture
def run(trained):
  return trained


@pytest.fixture
def say(lab):
  """`python -m engram_jax generate ...` in this process."""
  return lambda *words: lab.run(package, "generate", *words)


def answers(done):
  assert done.code == 0, done.err
  return json.loads(done.out)


def test_the_texts_are_eval_s(lab, run, say):
  """Text of the plain form, which runs the whole window again for each token."""
  plain = lab.evaluation(run, "--json", "--batches", 1, "--tokens", 12, "--prompt", *PROMPTS)
  result = answers(say("--run", run, "--prompt", *PROMPTS, "--tokens", 12, "--json"))
  expected = [sample["greedy"] for sample in answers(plain)["samples"]]
  assert [one["text"] for one in result["completions"]] == expected
  assert result["step"] == 24
  assert all(one["finish"] in ("length", "end_of_text") for one in result["completions"])


@pytest.fixture
def interrupted(monkeypatch):
  """The first text that is streamed meets a Ctrl-C after three tokens."""
  stream, calls = generate.stream_completions, []

  def stream_and_interrupt(*args, **options):
    calls.append(None)
    for count, step in enumerate(stream(*args, **options)):
      if len(calls) == 1 and count == 3:
        signal.raise_signal(signal.SIGINT)
      yield step

  monkeypatch.setattr(generate, "stream_completions", stream_and_interrupt)


def test_ctrl_c_ends_the_text_and_the_conversation_goes_on(run, say, monkeypatch, interrupted):
  monkeypatch.setattr(sys, "stdin", io.StringIO("def insort(\nimport\n"))
  done = say("--run", run, "--interactive", "--tokens", 8)
  assert done.code == 0, done.err
  assert "stopped by Ctrl-C; the next prompt" in done.err
  (whole,) = answers(say("--run", run, "--prompt", "import", "--tokens", 8, "--json"))[
    "completions"
  ]
  assert done.out.startswith("def insort(")
  assert done.out.endswith(f"\nimport{whole['text']}\n")


def test_ctrl_c_ends_a_command_politely(run, say, interrupted):
  done = say("--run", run, "--prompt", "import", "--tokens", 8)
  assert done.code == 130
  assert done.err.splitlines()[-1] == "stopped by Ctrl-C"
  assert done.out.startswith("import")
  assert done.out.endswith("\n")


def test_tables_on_the_host_and_in_a_file_say_the_same(run, say, tmp_path):
  path = tmp_path / "t.engram"
  assert convert.main(["table", "--run", str(run), "--to", str(path), "--dtype", "f32"]) == 0
  asked = ("--run", run, "--prompt", *PROMPTS, "--tokens", 9, "--json", "--temperature", 0.9)
  device = answers(say(*asked))
  file = ("--placement", "file", "--table", path)
  for place in (
    ("--placement", "host", "--table", path),
    file,
    ("--placement", "host", "--deadline", 60, "--device_cache_rows", 50),
    (*file, "--device_cache_rows", 50, "--host_cache_mib", 1),
  ):
    other = answers(say(*asked, *place))
    assert other["completions"] == device["completions"]
    assert other["rows"]["rows"] > 0
    if "--device_cache_rows" in place:
      assert other["levels"]["device_cache"]["hits"] > 0
  guessed = answers(say(*asked, "--draft_tokens", 64))
  assert guessed["completions"] == device["completions"]


def test_a_file_of_another_step_is_refused(run, say, tmp_path):
  path = tmp_path / "t.engram"
  steps = sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step_????????"))
  assert len(steps) > 1
  words = ["table", "--run", run, "--to", path, "--step", steps[0]]
  assert convert.main([*map(str, words)]) == 0
  for placement in ("file", "host"):
    asked = ("--run", run, "--prompt", "x", "--tokens", 2, "--placement", placement)
    done = say(*asked, "--table", path)
    assert done.code == 2
    assert f"holds rows of step {steps[0]} of run t, not of step {steps[-1]} of run t" in done.err
    assert say(*asked, "--table", path, "--step", steps[0]).code == 0


def test_rows_of_a_damaged_file_are_used_by_name_alone(run, say, tmp_path):
  path = tmp_path / "t.engram"
  assert convert.main(["table", "--run", str(run), "--to", str(path), "--dtype", "f32"]) == 0
  content = bytearray(path.read_bytes())
  first = len(content) // 4096 // 2 * 4096  # in the rows, of which any may be asked for
  content[first:-4096:100] = bytes(len(content[first:-4096:100]))
  path.write_bytes(content)
  for placement in ("file", "host"):
    asked = ("--run", run, "--prompt", "def f(x, y):", "--tokens", 2, "--placement", placement)
    done = say(*asked, "--table", path)
    assert done.code == 5
    assert re.search(rf"error: {path} is damaged: layer 1 rows \d+ to \d+ have changed", done.err)
    done = say(*asked, "--table", path, "--no-verify")
    assert done.code == 0, done.err
    said = f"--no-verify: rows of {path} are used without comparing its checksums"
    assert said in done.err.splitlines()


def test_a_late_read_is_an_error(run, say):
  done = say("--run", run, "--prompt", "x", "--placement", "host", "--deadline", 1e-9)
  assert done.code == 5
  assert "the deadline has passed" in done.err
  assert done.err.count("\n") == 1


def test_seeds_wrap_around_as_the_servers_do(run, say):
  asked = ("--run", run, "--tokens", 6, "--json", "--temperature", 1.5)
  both = answers(say(*asked, "--seed", 2**32 - 1, "--prompt", *PROMPTS))["completions"]
  (second,) = answers(say(*asked, "--seed", 0, "--prompt", PROMPTS[1]))["completions"]
  assert both[1]["text"] == second["text"]


def test_a_single_text_is_streamed_and_ends_at_a_stop_string(run, say):
  whole = say("--run", run, "--prompt", PROMPTS[0], "--tokens", 12)
  assert whole.code == 0
  text = whole.out.removeprefix(PROMPTS[0]).removesuffix("\n")
  stop = text[3:5]
  cut = say("--run", run, "--prompt", PROMPTS[0], "--tokens", 12, "--stop", stop)
  assert cut.out == PROMPTS[0] + text[: text.find(stop)] + "\n"


def test_prompts_from_the_terminal(run, say, monkeypatch):
  """Programs compiled for one line serve the next."""
  made = []
  monkeypatch.setattr(generate, "Decoder", lambda *a: made.append(a[2]) or Decoder(*a))
  monkeypatch.setattr(sys, "stdin", iter(["def f(\n", "\n", "class\n"]))
  done = say("--run", run, "--interactive", "--tokens", 8)
  assert done.code == 0
  assert made == [16]
  assert done.out.startswith("def f(")
  assert "\nclass" in done.out


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ((), "give --prompt TEXT, or --interactive"),
    (("--prompt", "x", "--interactive"), "not both"),
    (("--prompt", ""), "is empty"),
    (("--prompt", "x", "--tokens", 0), "--tokens 0 must be at least 1"),
    (("--prompt", "x", "--draft_tokens", -1), "--draft_tokens -1 must be at least 0"),
    (("--prompt", "x", "--temperature", -1), r"temperature=-1.0 must be 0 \(greedy\) or above"),
    (("--prompt", "x", "--top_p", 2), "top_p=2.0 must be above 0 and at most 1"),
    (("--prompt", "x", "--placement", "file"), "goes with --placement file"),
    (("--prompt", "x", "--table", "t.engram"), "goes with --placement file"),
    (("--prompt", "x", "--device_cache_rows", 5), "all rows are there"),
    (("--prompt", "x", "--host_cache_mib", 5), "a cache over a file"),
    (("--prompt", "x", "--placement", "host", "--device_cache_rows", -5), "must be at least 0"),
    (("--prompt", "x", "--step", 99), "--step 99 is not saved"),
    (("--prompt", "x", "--tokens", 10**9), "--tokens 1000000000 must be .* at most 1048576"),
    (("--prompt", "x", "--guesses", 10**9), "--draft_tokens 1000000000 must be .* at most 64"),
    (("--prompt", "x\udcff"), r"--prompt 'x\\udcff' holds bytes that are no UTF-8"),
    (("--prompt", "x", "--stop", "\udcff"), "--stop .* holds bytes that are no UTF-8"),
    (("--prompt", "x", "--placement", "host", "--deadline", 0), "--deadline 0.0 must be above 0"),
    (("--prompt", "x", "--placement", "host", "--deadline", "nan"), "--deadline nan must be"),
    (("--prompt", "x", "--placement", "host", "--deadline", "inf"), "at most 86400 seconds"),
    (("--prompt", "x", "--placement", "host", "--no-verify"), "it goes with --table FILE"),
    ((*FILE, "--host_cache_mib", 10**8), "--host_cache_mib 100000000 is more than the .* MiB"),
  ],
)
def test_mistakes_are_told_with_code_2(run, say, words, message):
  done = say("--run", run, *words)
  assert done.code == 2
  assert done.out == ""
  assert re.search(message, done.err)


@pytest.mark.parametrize("stdin", ["bytes", "words"])
def test_a_line_that_is_no_text_is_told_with_code_2(run, say, monkeypatch, stdin):
  lines = io.TextIOWrapper(io.BytesIO(b"x\xff\n"), encoding="utf-8")
  monkeypatch.setattr(sys, "stdin", lines if stdin == "bytes" else iter(["x\udcff\n"]))
  done = say("--run", run, "--interactive", "--tokens", 3)
  assert done.code == 2
  assert "holds bytes that are no UTF-8" in done.err


def test_a_folder_that_is_no_run_is_refused(say, tmp_path):
  done = say("--run", tmp_path, "--prompt", "x")
  assert done.code == 2
  assert str(tmp_path) in done.err
