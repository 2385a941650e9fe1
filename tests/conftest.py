"""Shared by several test files: the two commands as modules, and a laboratory to run them in."""

import contextlib
import functools
import gc
import importlib.util
import io
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import jax
import pytest
import yaml
from compilation import use_older_emitters
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

import engram_jax
from engram_jax.cli import run_command
from engram_jax.config import Config, RunConfig
from engram_jax.memory.hash_layout import HashLayout

use_older_emitters()
# Tracing makes many objects, few of them garbage: collecting as often as Python does by default
# takes a quarter of its time. `few_programs` collects after each file.
gc.freeze()
gc.set_threshold(50_000, 20, 100)

ROOT = pathlib.Path(engram_jax.__file__).parents[1]
TEXTS = ("bisect", "copy", "dis", "heapq")  # modules of the standard library, read as text

TINY = {
  "run": {"name": "t"},
  "model": {
    "vocab_size": 300,
    "width": 16,
    "layers": 2,
    "attention": {"heads": 2, "latent": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8},
    "moe": {"routed_experts": 4, "top_k": 2, "expert_width": 16, "dense_width": 32},
    "residual": {"branches": 2, "sinkhorn_iterations": 3},
    "engram": {"layers": [1], "heads": 2, "row_width": 4, "rows_per_head": 101},
  },
  "data": {"source": "text", "sequence_length": 32, "validation_fraction": 0.25},
  "train": {
    "steps": 24,
    "batch_size": 2,
    "log_every": 1,
    "eval_every": 12,
    "eval_batches": 2,
    "sample_every": 0,
    "sample_prompt": "def",
    "sample_tokens": 4,
    "checkpoint_every": 8,
    "schedule": {"warmup_steps": 2},
    "optimizer": {"newton_schulz_steps": 2},
  },
}


class Done(NamedTuple):
  code: int
  out: str
  err: str


class Lab(NamedTuple):
  """Somewhere to run the commands: a small real corpus, its cache, and a config that names both."""

  folder: pathlib.Path
  config: pathlib.Path
  compilation: dict[str, object]
  train: ModuleType
  eval: ModuleType

  def run(self, command: ModuleType, *args: object) -> Done:
    """A command in this process, as if called with these words."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [command.__name__, *map(str, args)]
    try:
      with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as left,
      ):
        run_command(command.main)
    finally:
      sys.argv = before
    return Done(left.value.code, out.getvalue(), err.getvalue())

  def unshared(self) -> "Lab":
    """With commands that share no jitted function with other runs of this process."""
    return self._replace(train=load_command("train"), eval=load_command("eval"))

  def training(self, root: pathlib.Path, *args: object) -> Done:
    return self.run(self.train, "--config", self.config, "--run.root", root, *args)

  def evaluation(self, run: pathlib.Path, *args: object) -> Done:
    return self.run(self.eval, "--run", run, *args)

  @property
  def environment(self) -> dict[str, str]:
    """In which a Python process finds the programs compiled here."""
    options = {name.upper(): str(value) for name, value in self.compilation.items()}
    return os.environ | options | {"PYTHONPATH": str(ROOT)}

  def process(self, *words: object) -> subprocess.CompletedProcess:
    """A Python process in that environment, run to its end."""
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, env=self.environment, cwd=ROOT, capture_output=True, text=True)


def load_command(name: str) -> ModuleType:
  """train.py or eval.py as a module, under a name that no installed module has."""
  spec = importlib.util.spec_from_file_location(f"command_{name}", ROOT / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """The longest test first: where two processes share the tests, it would else end alone."""
  items.sort(key=lambda item: item.path.name != "test_eight_devices.py")


@pytest.fixture(scope="session")
def quick_compilation(tmp_path_factory) -> dict[str, object]:
  """The jax options of quick compilation: each program once in a session, and not optimized."""
  return {
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
  }


@contextlib.contextmanager
def options_set(options: dict[str, object]) -> Iterator[None]:
  """jax compiles with these options; programs from before are compiled again."""
  before = {name: jax.config.values[name] for name in options}

  def update(values: dict[str, object]) -> None:
    for name, value in values.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()

  update(options)
  yield
  update(before)


@pytest.fixture(scope="session", autouse=True)
def compiles_quickly(quick_compilation) -> Iterator[None]:
  """Programs are compiled quickly rather than well, unless a test uses `optimized`."""
  with options_set(quick_compilation):
    yield


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
  """From here to the end of the file programs are compiled as they are for a user: for tests that
  read a program or measure it."""
  with options_set({"jax_disable_most_optimizations": False, "jax_compilation_cache_dir": None}):
    yield


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
  """Compiled programs end with their file: each holds memory mappings, of which a process may have
  65,530 on Linux by default, and the compiler does not survive the one that fails."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="session")
def built(tmp_path_factory, quick_compilation) -> Lab:
  """The parts that every laboratory shares: the corpus, a config that names it, the commands."""
  folder = tmp_path_factory.mktemp("lab")
  (folder / "text").mkdir()
  for name in TEXTS:
    shutil.copy(importlib.util.find_spec(name).origin, folder / "text" / f"{name}.txt")
  data = TINY["data"] | {"path": str(folder / "text"), "cache": str(folder / "cache")}
  config = folder / "tiny.yaml"
  config.write_text(yaml.safe_dump(TINY | {"data": data}))
  commands = [load_command(name) for name in ("train", "eval")]
  share_programs(commands)
  return Lab(folder, config, quick_compilation, *commands)


@pytest.fixture(scope="session")
def trained(built, tmp_path_factory) -> pathlib.Path:
  """The folder of a whole run of the shared config, for tests that only read it."""
  root = tmp_path_factory.mktemp("trained")
  done = built.training(root)
  assert done.code == 0, done.err
  return root / "t"


@pytest.fixture(scope="module")
def lab(built, tmp_path_factory) -> Lab:
  """With a folder of its own for runs."""
  return built._replace(folder=tmp_path_factory.mktemp("runs"))


def share_programs(commands: list[ModuleType]) -> None:
  """Equal configs, apart from the run's place, get the same jitted functions.

  The modules were loaded for these tests alone, so nobody else meets the changed names.
  """
  train = commands[0]
  # The machine's speed, which no test looks at, otherwise takes half a second of each run.
  train.matmul_peak = functools.partial(train.matmul_peak, size=64, seconds=0)
  layouts, make_setup = {}, train.make_setup
  setup_of = functools.cache(lambda cfg, mesh: make_setup(cfg, layouts[cfg], mesh))
  made: dict[tuple, object] = {}  # by the identity of arguments: setups live as long as this

  def once(name: str):
    function = getattr(train, name)

    def call(*args, **options):
      key = (name, *map(id, args), *sorted(options.items()))
      if key not in made:
        made[key] = function(*args, **options), args
      return made[key][0]

    return call

  make = {name: once(name) for name in ("make_train_step", "make_eval_step", "make_next_logits")}

  def shared_setup(cfg: Config, layout: HashLayout | None = None, mesh: Mesh | None = None):
    if cfg.model.engram.on_host:  # its tables lie in this run's folder
      return make_setup(cfg, layout, mesh)
    data = cfg.data.model_copy(update={"tokenizer": ""})
    cfg = cfg.model_copy(update={"run": RunConfig(), "data": data})
    layouts.setdefault(cfg, layout)  # no part of the key: equal configs over one text have one
    return setup_of(cfg, mesh)

  make["make_setup"] = shared_setup
  for command in commands:
    for name in make.keys() & vars(command).keys():
      setattr(command, name, make[name])


@pytest.fixture(scope="module")
def beside_the_text(built, tmp_path_factory) -> Iterator[None]:
  """Tests run where the corpus's folder lies, as a run imported from an export names it."""
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(built.folder)
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user_cache")))
    yield
