"""README, CONTRIBUTING and docs: their commands run or at least parse, their Python runs, and what
they name is there.

Every command of a fenced block is in `RUN`, or matches one pattern of `NOT_RUN`. Commands of `RUN`
run as they are written, in this order, in a folder whose configs/tiny.yaml is small.
"""

import argparse
import importlib
import io
import json
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
import traceback
from collections.abc import Iterator
from types import ModuleType

import chex
import jax.numpy as jnp
import own_loop_checks
import pytest
import tyro
import yaml
from conftest import ROOT, Done, Lab, load_command

from engram_jax import __main__ as package
from engram_jax.cli import parse_config
from engram_jax.commands import plan
from engram_jax.config import load_config
from engram_jax.config.load import fields

README, CONTRIBUTING = "README.md", "CONTRIBUTING.md"
OWN_LOOP, CHECKPOINTS = "docs/own_loop.md", "docs/checkpoints.md"
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
PAGES = {name: (ROOT / name).read_text() for name in (README, CONTRIBUTING, *DOCS)}

RUN = (
  # README
  "python train.py",
  "python eval.py --run runs/tiny",
  "python train.py --model.engram.heads 2 --run.name heads2",
  "python train.py --config configs/tiny_moe.yaml --run.name tiny_moe",
  "python train.py --train.init_from runs/tiny_moe --model.engram.layers 1 --run.name grown",
  "python train.py --train.profile 10:13 --run.name traced",
  "python train.py --model.engram.placement host --run.name host",
  "python -m engram_jax plan --config configs/engram_27b.yaml",
  'python -m engram_jax generate --run runs/tiny --prompt "The capital of France is"',
  'python -m engram_jax analyze gates --run runs/tiny --text "Alexander the Great" --png gates.png',
  "python -m engram_jax convert export --run runs/tiny --to out/tiny",
  'python -m engram_jax inspect --checkpoint out/tiny --text "Alexander the Great"',
  # docs/checkpoints.md
  "python eval.py --run runs/tiny --json",
  "head -n 2 runs/tiny/metrics.jsonl",
  "python eval.py --run runs/tiny --score configs/tiny.yaml",
  "python eval.py --run runs/tiny --score configs/tiny.yaml --json",
  "python train.py --run.name stopped",
  "python eval.py --run runs/host",
  "python -m engram_jax convert import --from out/tiny --run runs/again",
  "python eval.py --run runs/again",
  'python -m engram_jax inspect --checkpoint out/tiny --text "Only Alexander the Great"',
  "python train.py --model.engram.conv_kernel 0 --model.engram.row_width 32 --train.steps 20 "
  "--run.name v41",
  "python -m engram_jax convert export --run runs/v41 --to out/v41",
  "python -m engram_jax convert memory --from out/v41 --to out/v41_released --layout deepseek_v41",
  'python -m engram_jax inspect --checkpoint out/v41_released --text "Only Alexander the Great"',
  # docs/offload.md
  'python -m engram_jax generate --run runs/tiny --prompt "The capital of France is" --tokens 40',
  'python -m engram_jax generate --run runs/tiny --prompt "Mount Everest" --temperature 0.8 '
  "--top_p 0.95 --seed 1",
  'echo "Mount Everest" | python -m engram_jax generate --run runs/tiny --interactive '
  "--draft_tokens 4",
  "python -m engram_jax convert table --run runs/tiny --to runs/tiny.engram --dtype fp8_e4m3",
  "python -m engram_jax convert verify --file runs/tiny.engram",
  'python -m engram_jax generate --run runs/tiny --prompt "Mount Everest" --placement host',
  'python -m engram_jax generate --run runs/tiny --prompt "Mount Everest" --placement host '
  "--table runs/tiny.engram",
  'python -m engram_jax generate --run runs/tiny --prompt "Mount Everest" --placement file '
  "--table runs/tiny.engram --host_cache_mib 64 --device_cache_rows 20000",
  "python train.py --model.engram.placement file --run.name file",
  # docs/experiments.md
  "python -m engram_jax sweep report --csv docs/experiments/controls-micro.csv",
  # docs/parallelism.md
  "python -m engram_jax plan --config configs/engram_27b.yaml --topology v5p:4x4x8",
  # docs/performance.md
  "python train.py --config configs/tiny.yaml --run.name tiny_0 --train.seed 0 --data.seed 0",
  "python train.py --config configs/tiny_moe.yaml --run.name tiny_moe_0 --train.seed 0 "
  "--data.seed 0",
  "python eval.py --run runs/tiny_0",
)

NOT_RUN = {  # a pattern of whole commands: why they do not run here
  r"python3 -m venv \.venv|\. \.venv/bin/activate": "installs; .ci/run does the same",
  r"pip install .*": "installs",
  r"pre-commit install": "installs a hook into the repository",
  r"ruff check \.": "no part of the tests; .ci/run does it",
  r"python -m pytest.*": "is these tests",
  r"timeout .* python train\.py .*": "stops by the clock; tests/training/test_train.py stops a run",
  r"python train\.py --data\.source stdlib .*": "minutes; tests/data/test_sources.py reads it",
  r"python train\.py --data\.source (english|english_large|chinese) .*": (
    "downloads for minutes; tests/data/test_corpora.py reads such archives"
  ),
  r"(XLA_FLAGS=\S+ )?python docs/own_loop\.py": "a minute; tests/tables and tests/eight run a part",
  r"(XLA_FLAGS=\S+ )?python train\.py --mesh\..*": "many devices; tests/eight/test_step.py",
  r"python train\.py .* --distributed\.processes .*": "two hosts; tests/core/test_several_hosts.py",
  r"python benchmarks/.*": "measures for minutes",
  r"python -m engram_jax sweep \w+ (--quick|--rho|--seeds|--jobs|--list).*": "an hour, or a budget "
  "with experts, which tiny.yaml here has not; tests/research/test_sweep.py runs two arms",
  r"python -m engram_jax plan .* --compile( .*)?": "minutes of a compiler; tests/aot",
  r"(ENGRAM_API_KEY=.* )?python -m engram_jax serve .*": "has no end; tests/commands/test_serve.py",
  r"curl .*": "needs that server; tests/serve/test_http.py",
  r"python -m engram_jax (inspect|convert \w+) .*\bDIR\b.*": "a released checkpoint, 400 GB",
  r"python -m pdoc .*": "needs the extra docs",
  r"tensorboard .*": "needs tensorboard",
  r"export TPU=.*|gcloud .*|xpk .*": "needs a TPU pod",
  r"srun .*|if .* scontrol .*": "needs a cluster with SLURM",
  r"!.*|cd engram_jax|python train\.py .* --run\.root /content/.*": "is for a Colab machine",
}

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
QUOTED = r"'[^']*'|\"[^\"]*\""


def blocks(page: str, *languages: str) -> list[str]:
  """Fenced blocks of a page in these languages."""
  return [text for language, text in BLOCK.findall(PAGES[page]) if language in languages]


def inline(page: str) -> list[str]:
  """Text between backticks outside of fenced blocks."""
  return [" ".join(x.split()) for x in re.findall(r"`([^`]+)`", BLOCK.sub("", PAGES[page]))]


def commands_of(block: str) -> Iterator[str]:
  """Commands of a shell block: without comments, on one line each, apart where `&&` joins them."""
  text = ""
  for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
    text += " " + line
    code = re.match(rf"(?:{QUOTED}|[^'\"#]|(?<=\S)#)*", text)
    assert code is not None
    if text[code.end() :][:1] in ("'", '"'):  # goes on in the next line
      continue
    for command in re.split(rf"\s*&&\s*(?=(?:{QUOTED}|[^'\"])*$)", " ".join(code[0].split())):
      if command:
        yield command
    text = ""
  assert not text, f"an open quote: {text}"


FENCED = dict.fromkeys(
  command
  for page in PAGES
  for block in blocks(page, "bash", "sh", "console")
  for command in commands_of(block)
)
INLINE = dict.fromkeys(
  command for page in PAGES for command in inline(page) if re.match(r"python |pip ", command)
)

# --- commands ---------------------------------------------------------------------------------


def test_every_command_is_run_or_has_a_reason_not_to():
  entries = {re.escape(command): command for command in RUN} | {p: p for p in NOT_RUN}
  assert len(entries) == len(RUN) + len(NOT_RUN)
  matches = {c: [e for p, e in entries.items() if re.fullmatch(p, c)] for c in FENCED}
  assert {command: found for command, found in matches.items() if len(found) != 1} == {}
  assert set(entries.values()) - {found[0] for found in matches.values()} == set()
  named = re.findall(r"(?:tests|\.ci)/[\w/.]+", " ".join(NOT_RUN.values()))
  assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.fixture(scope="module")
def ran(lab: Lab) -> Iterator[dict[str, Done]]:
  """Results of the commands of `RUN`."""
  shutil.copytree(ROOT / "configs", lab.folder / "configs")
  shutil.copytree(ROOT / "docs" / "experiments", lab.folder / "docs" / "experiments")
  small = yaml.safe_load(lab.config.read_text())
  small["run"]["name"] = "tiny"
  shutil.copytree(small["data"]["path"], lab.folder / "text")
  small["data"]["path"] = "text"  # an export keeps the last name of it
  small["model"] |= {"residual": {"branches": 1}}
  small["model"]["moe"]["routed_experts"] = 0
  small["train"] |= {"steps": 20, "eval_every": 20, "checkpoint_every": 20, "sample_tokens": 0}
  (lab.folder / "configs" / "tiny.yaml").write_text(yaml.safe_dump(small))
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(lab.folder)
    yield {command: run(lab, command, patch) for command in RUN}


def run(lab: Lab, command: str, patch: pytest.MonkeyPatch) -> Done:
  """Runs a command of `RUN`, a failure of any kind included in what it returns."""
  try:
    return run_words(lab, shlex.split(command), patch)
  except Exception:
    return Done(1, "", traceback.format_exc())


def run_words(lab: Lab, words: list[str], patch: pytest.MonkeyPatch) -> Done:
  if words[0] == "echo":
    patch.setattr(sys, "stdin", io.StringIO(words[1] + "\n"))
    words = words[3:]
  match words:
    case ["python", "train.py", *options]:
      return lab.run(lab.train, *options)
    case ["python", "eval.py", *options]:
      return lab.run(lab.eval, *options)
    case ["python", "-m", "engram_jax", *options]:
      return lab.run(package, *options)
  done = subprocess.run(words, capture_output=True, text=True)
  return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("command", RUN)
def test_command_runs(ran, command):
  assert ran[command].code == 0, ran[command].err


def test_a_runs_folder_holds_what_the_page_says(ran, lab):
  table = PAGES[CHECKPOINTS].partition("| | |\n")[2].partition("\n\n")[0]
  names = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
  assert len(names) > 5
  names = [name.replace("step_00000300", "step_00000020") for name in names]
  assert [n for n in names if not (lab.folder / "runs" / "traced" / n).exists()] == []


def test_an_imported_run_evaluates_to_the_same_figures(ran):
  tiny, again = (
    ran[f"python eval.py --run runs/{name}"].out.partition("\n")[2] for name in ("tiny", "again")
  )
  assert tiny == again


class Parsed(Exception):
  """Ends a command once its options are read."""


@pytest.mark.parametrize("command", FENCED | INLINE)
def test_command_parses(command, monkeypatch):
  monkeypatch.chdir(ROOT)
  for environment, words in python_commands(command):
    check_words(words, environment, monkeypatch)
  for extra in re.findall(r"\.\[([\w,]+)\]", command):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extra.split(",")) <= set(project["optional-dependencies"])
  if body := re.search(r"-d '(.*)'", command):
    json.loads(body[1])


def python_commands(command: str) -> Iterator[tuple[str, list[str]]]:
  """(words before, words after) each `python` of a command, also in its quoted parts."""
  lexer = shlex.shlex(command, posix=True, punctuation_chars=";|&")
  lexer.whitespace_split = True
  lexer.commenters = ""
  words = list(lexer)
  for word in words:
    if "python " in word:
      yield from python_commands(word.removeprefix("--command="))
  if "python" in words:
    at = words.index("python")
    after = words[at + 1 :]
    end = next((i for i, word in enumerate(after) if word in (";", "|", "&&")), len(after))
    yield " ".join(words[:at]), after[:end]


def check_words(words: list[str], environment: str, patch: pytest.MonkeyPatch) -> None:
  """A Python command's files are there and its options known."""
  match words:
    case ["-m", "pytest", *options]:
      check_pytest(options)
    case ["-m", "pdoc", *_]:
      pass
    case ["train.py", *options]:
      if "--train.init_from" in options:  # of a run that is not here, whose model it would take
        options = ["--config", "configs/tiny_moe.yaml", *options]
      cfg = parse_config("train.py", "", options)
      devices = re.search(r"device_count=(\d+)", environment)
      cfg.mesh_sizes(int(devices[1]) if devices else max(1, cfg.distributed.processes))
    case ["-m", "engram_jax", "plan", *_]:
      patch.setattr(plan, "compiled_plan", lambda *_, **__: {})
      patch.setattr(sys, "argv", words[1:])
      assert package.main() == 0
    case ["eval.py" | "-m", *options]:
      assert words[0] == "eval.py" or options[0] == "engram_jax"
      main = load_command("eval").main if words[0] == "eval.py" else package.main
      patch.setattr(sys, "argv", words if words[0] == "eval.py" else options)
      parse_only(tyro, "cli", patch)
      with pytest.raises(Parsed):
        main()
    case [script, *options] if script.startswith("benchmarks/"):
      patch.setattr(sys, "argv", [script, *options])
      parse_only(argparse.ArgumentParser, "parse_args", patch)
      with pytest.raises(Parsed):
        runpy.run_path(script, run_name="__main__")
    case [script, *options]:
      text = (ROOT / script).read_text()
      assert [option for option in options if option not in text] == []


def parse_only(owner: object, name: str, patch: pytest.MonkeyPatch) -> None:
  """Makes a function that reads options raise Parsed when it has read them."""
  parse = getattr(owner, name)

  def parse_and_stop(*args, **options):
    parse(*args, **options)
    raise Parsed

  patch.setattr(owner, name, parse_and_stop)


def check_pytest(options: list[str]) -> None:
  """The paths exist, and hold what -m and -k choose."""
  parser = argparse.ArgumentParser()
  parser.add_argument("-m", dest="marker")
  parser.add_argument("-k", dest="keywords", default="")
  parser.add_argument("-n", type=int)
  parser.add_argument("-s", action="store_true")
  parser.add_argument("--dist", choices=["loadfile"])
  parser.add_argument("paths", nargs="*", default=["tests"])
  own = parser.parse_args(options)
  paths = [ROOT / path for path in own.paths]
  assert [path for path in paths if not path.exists()] == []
  for path in paths:
    files = [path] if path.is_file() else list(path.rglob("test_*.py"))
    text = "".join(file.read_text() for file in files)
    assert own.marker in (None, "slow")
    assert own.marker is None or "pytest.mark.slow" in text
    assert all(word in text for word in own.keywords.replace(" and ", " ").split())


# --- Python -----------------------------------------------------------------------------------


def test_pages_with_python_are_known():
  found = {page: len(blocks(page, "python", "py")) for page in PAGES}
  assert {page: n for page, n in found.items() if n} == {README: 2, OWN_LOOP: 6, CHECKPOINTS: 1}


@pytest.mark.parametrize(
  ("code", "printed"),
  list(zip(blocks(README, "python"), ["(1, 4, 4)\n", "(1, 4, 8, 16)\n"], strict=True)),
  ids=["module", "tables"],
)
def test_python_of_the_readme_runs(code, printed, capsys):
  exec(compile(code, README, "exec"), {})  # as a reader would paste it
  assert capsys.readouterr().out == printed


def test_own_loop_is_quoted_as_it_is():
  assert blocks(OWN_LOOP, "python") == [own_loop_checks.PATH.read_text()]


def own_loop_part(words: str) -> str:
  """The one block of the own-loop page, but for the file itself, that holds these words."""
  (code,) = (code for code in blocks(OWN_LOOP, "py") if words in code)
  return code


def test_clipping_and_an_optimizer_of_ones_own_fit_into_the_loop():
  source, update = own_loop_checks.PATH.read_text(), "    updates, moments = optimizer.update("
  assert source.count(update) == source.count("tables.update(memory, touched, d_rows)") == 1
  clipping = textwrap.indent(own_loop_part("grad_scale=clip"), "    ")
  source = source.replace(update, clipping + update)
  source = source.replace("tables.update(memory, touched, d_rows)", "memory")
  loop = vars(own_loop_checks.load())
  exec(compile(source, OWN_LOOP, "exec"), loop)
  exec(compile(own_loop_part("def sgd"), OWN_LOOP, "exec"), loop)
  assert jnp.isfinite(loop["loss"])


def test_the_decoding_of_the_own_loop_page_equals_the_forward_pass():
  loop = vars(own_loop_checks.load())
  setup = """
layout = HashLayout.of(MEMORY, TokenCompressor.identity(V))
tables = Tables(MEMORY, layout, optimizer=adam(1e-2))
memory = tables.init(jax.random.key(1))
engram = Engram(MEMORY, D, 1, rngs=nnx.Rngs(0))
tokens = jax.random.randint(jax.random.key(2), (B, 5), 0, V)
hidden_BTGD = jax.random.normal(jax.random.key(3), (B, 5, 1, D))
hidden_B1GD = hidden_BTGD[:, 4:]
"""
  exec(setup + own_loop_part("history_BH"), loop)
  layer = loop["layer"]
  ids = loop["row_ids"](loop["layout"], layer, loop["tokens"])
  rows = loop["tables"].lookup(loop["memory"], {layer: ids})[layer]
  full, _ = loop["engram"](loop["hidden_BTGD"], rows)  # the taps of a new module are zero
  chex.assert_trees_all_close(loop["delta_B1GD"], full[:, 4:], atol=1e-6)
  chex.assert_equal_shape([loop["cache"].value_BPD, loop["cache"].scale_BPG[..., :1]], dims=(0, 1))


def test_the_own_loop_page_names_the_mesh_that_is_tested():
  mesh = re.search(r"make_mesh\(\{.*?\}\)", own_loop_part('make_mesh({"data"'))
  assert mesh is not None
  assert mesh[0] in (ROOT / "tests" / "eight" / "test_own_loop.py").read_text()


def test_the_own_loop_page_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code, loop = own_loop_part("placement="), vars(own_loop_checks.load())
  exec(compile(code, OWN_LOOP, "exec"), loop)
  first = loop["loss"]
  exec(compile(code, OWN_LOOP, "exec"), loop)
  assert loop["start"] == 20
  assert loop["loss"] < first


def test_python_of_the_checkpoints_page_runs(ran):
  (code,) = blocks(CHECKPOINTS, "py")
  cfg = load_config("runs/tiny/config.yaml").model
  reader = importlib.import_module("engram_jax.interop.reader")
  with reader.MemoryReader("out/tiny") as memory:
    tokens = len(memory.read("Only Alexander the Great").token_ids)
  namespace = {"hidden_BTGD": jnp.ones((1, tokens, cfg.residual.branches, cfg.width))}
  exec(compile(code, CHECKPOINTS, "exec"), namespace)
  assert namespace["delta"].shape == namespace["hidden_BTGD"].shape


def test_json_is_json():
  for page in PAGES:
    for block in blocks(page, "json"):
      json.loads(block)


# --- what pages name --------------------------------------------------------------------------

FOLDERS = ("engram_jax", "tests", "docs", "configs", "benchmarks", "colab", ".ci", ".github")
SECTIONS = tuple(load_config(None).model_dump())
NAMING = PAGES | {"EXPERIMENTS.md": (ROOT / "EXPERIMENTS.md").read_text()}


def words_of(page: str) -> set[str]:
  """Words between backticks and in fenced blocks of commands, without marks around them."""
  spans = re.findall(r"`([^`\n]+)`", BLOCK.sub("", NAMING[page]))
  shell = [text for language, text in BLOCK.findall(NAMING[page]) if language in ("bash", "sh")]
  return {word.strip("'\",;:()[]") for span in spans + shell for word in span.split()}


@pytest.mark.parametrize("page", NAMING)
def test_links_lead_somewhere(page):
  links = re.findall(r"\]\((?!http|#)([^)#]+)\)", NAMING[page])
  assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", NAMING)
def test_named_files_exist(page):
  scripts = {path.name for path in ROOT.glob("*.py")}
  for folder in FOLDERS:
    scripts |= {path.name for path in (ROOT / folder).rglob("*.py")}
  missing = []
  for word in words_of(page):
    path = pathlib.PurePath(word.partition("::")[0].partition("=")[0])
    if re.search(r"NAME|\*|\$", path.name):  # the reader's
      path = path.parent
    if len(path.parts) > 1 and path.parts[0] in FOLDERS:
      found = (ROOT / path).exists()
    elif len(path.parts) > 1 and path.suffix == ".py":
      found = (ROOT / "engram_jax" / path).exists()
    else:
      found = path.suffix != ".py" or path.name in scripts
    missing += [] if found else [word]
  assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_named_fields_and_modules_exist(page):
  known, unknown = fields(), []
  for word in words_of(page):
    name = word.removeprefix("--").partition("=")[0]
    if name.startswith("engram_jax."):
      unknown += [] if resolves(name) else [word]
    elif re.fullmatch(rf"({'|'.join(SECTIONS)})(\.[a-z]\w*)+", name) and name[-3:] != ".py":
      unknown += [] if any(f"{field}.".startswith(f"{name}.") for field in known) else [word]
  assert unknown == []


def resolves(name: str) -> bool:
  """Whether a dotted name is a module, or something in one."""
  parts, value = name.split("."), None
  for i, part in enumerate(parts):
    try:
      value = importlib.import_module(".".join(parts[: i + 1]))
    except ModuleNotFoundError:
      if not isinstance(value, ModuleType | type) or not hasattr(value, part):
        return False
      value = getattr(value, part)
  return True


def test_the_readme_is_short():
  assert len(PAGES[README].splitlines()) <= 150


def test_the_tree_of_the_readme_is_that_of_the_repository():
  (tree,) = (block for block in blocks(README, "text") if "engram_jax/\n" in block)
  lines = [line for line in tree.splitlines() if not line.startswith("    ")]
  names = [("  " * (line[0] == " ") + name) for line in lines for name in first_column(line)]
  inside = {name.strip() for name in names if name[0] == " "}
  outside = {name for name in names if name[0] != " "}
  assert [name for name in outside if not (ROOT / name).exists()] == []
  folders = (ROOT / "engram_jax").iterdir()
  expected = {f"{path.name}/" for path in folders if path.is_dir() and path.name[0] != "_"}
  assert inside == expected


def first_column(line: str) -> list[str]:
  """Names at the beginning of a line of the tree."""
  words = line.split()
  names = [word for word in words if re.fullmatch(r"[\w.]+(/|\.py)", word)]
  return words[: len(names)] if words[: len(names)] == names else names[:1]


def test_every_config_is_in_the_readme():
  stems = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
  assert [stem for stem in stems if stem not in PAGES[README]] == []
