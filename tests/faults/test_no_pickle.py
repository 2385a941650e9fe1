"""No file that is read can run code: the package has no pickle, eval, shell or unsafe YAML loader.

The checker reads syntax trees; the samples show that it sees what it looks for.
"""

import ast
import pathlib
from collections.abc import Iterator

import pytest

import engram_jax

PACKAGE = pathlib.Path(engram_jax.__file__).parent
ROOT = PACKAGE.parent
FILES = [*sorted(PACKAGE.rglob("*.py")), ROOT / "train.py", ROOT / "eval.py"]

MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
MODULES |= {"jsonpickle", "code", "codeop"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}
YAML_LOADS = {"yaml.load", "yaml.load_all", "yaml.compose", "yaml.compose_all"}
UNSAFE_YAML = {f"yaml.{kind}load{many}" for kind in ("unsafe_", "full_") for many in ("", "_all")}
NUMPY_LOADS = {"numpy.load", "numpy.lib.npyio.NpzFile", "numpy.lib.format.read_array"}


class Checker:
  """Names of one file, resolved through its imports and assignments, and what they call."""

  def __init__(self, source: str):
    self.tree = ast.parse(source)
    self.names = dict(self._imported())
    self.bases = {
      node.name: [self.name(base) for base in node.bases]
      for node in ast.walk(self.tree)
      if isinstance(node, ast.ClassDef)
    }
    for node in ast.walk(self.tree):  # load = yaml.load
      if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
        for target in node.targets:
          if isinstance(target, ast.Name):
            self.names.setdefault(target.id, self.name(node.value))

  def _imported(self) -> Iterator[tuple[str, str]]:
    for node in ast.walk(self.tree):
      if isinstance(node, ast.Import):
        for alias in node.names:
          top = alias.name.split(".")[0]
          yield (alias.asname, alias.name) if alias.asname else (top, top)
      elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
          yield alias.asname or alias.name, f"{node.module}.{alias.name}"

  def name(self, node: ast.AST) -> str:
    """The dotted name that an expression stands for; empty for any other."""
    if isinstance(node, ast.Name):
      return self.names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
      owner = self.name(node.value)
      return f"{owner}.{node.attr}" if owner else f"?.{node.attr}"
    return ""

  def is_safe_loader(self, name: str) -> bool:
    return name in SAFE_LOADERS or any(map(self.is_safe_loader, self.bases.get(name, [])))

  def faults(self) -> list[str]:
    found = []
    for node in ast.walk(self.tree):
      if isinstance(node, ast.Import):
        found += [f"imports {a.name}" for a in node.names if a.name.split(".")[0] in MODULES]
      elif isinstance(node, ast.ImportFrom):
        modules = {(node.module or "").split(".")[0]}
        found += [f"imports from {node.module}"] * bool(modules & MODULES)
      elif isinstance(node, ast.Call):
        found += [f"line {node.lineno}: {fault}" for fault in self.faults_of_call(node)]
    return found

  def faults_of_call(self, node: ast.Call) -> Iterator[str]:
    name, options = self.name(node.func), {k.arg: k.value for k in node.keywords}
    bare = name.removeprefix("builtins.")
    if bare in BUILTINS:
      yield f"calls {bare}"
    if name == "importlib.import_module" and self.literal(node.args[:1]) in MODULES:
      yield f"imports {self.literal(node.args[:1])}"
    if name in SHELLS or name.startswith(("os.spawn", "os.exec")):
      yield f"calls {name}"
    if "shell" in options and not is_false(options["shell"]):
      yield "a shell"
    if name.split(".")[0] == "subprocess" and None in options:
      yield "options of a process that are not written out"
    if name in UNSAFE_YAML:
      yield f"calls {name}"
    if name in YAML_LOADS:
      loader = node.args[1] if len(node.args) > 1 else options.get("Loader")
      if loader is None or not self.is_safe_loader(self.name(loader)):
        yield f"{name} without a safe loader"
    if "allow_pickle" in options and not is_false(options["allow_pickle"]):
      yield "allow_pickle"
    if name in NUMPY_LOADS and (len(node.args) > 2 or None in options):  # its third is allow_pickle
      yield f"{name} with options that are not written out"

  def literal(self, nodes: list[ast.expr]) -> str | None:
    node = nodes[0] if nodes else None
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def is_false(node: ast.expr) -> bool:
  return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_that_is_read_can_run_code(path):
  assert Checker(path.read_text()).faults() == []


@pytest.mark.parametrize(
  "source",
  [
    "import pickle",
    "import pickle as p",
    "import marshal, json",
    "from pickle import loads",
    "from pickle import loads as read",
    "import dill",
    "import cloudpickle.compat",
    "from shelve import open",
    "def f():\n  import joblib",
    "import importlib\nimportlib.import_module('pickle')",
    "from importlib import import_module as get\nget('marshal')",
    "__import__('pickle')",
    "eval(text)",
    "exec(text)",
    "import builtins\nbuiltins.exec(text)",
    "from builtins import eval as look\nlook(text)",
    "run = eval\nrun(text)",
    "compile(text, 'a', 'exec')",
    "import yaml\nyaml.load(text)",
    "import yaml\nyaml.load(text, yaml.Loader)",
    "import yaml\nyaml.load(text, Loader=yaml.UnsafeLoader)",
    "import yaml\nyaml.load(text, yaml.FullLoader)",
    "import yaml\nyaml.unsafe_load(text)",
    "import yaml\nyaml.full_load_all(text)",
    "import yaml as y\ny.load(text, y.Loader)",
    "from yaml import load, Loader\nload(text, Loader)",
    "import yaml\nread = yaml.load\nread(text, yaml.Loader)",
    "import yaml\nclass Mine(yaml.Loader): pass\nyaml.load(text, Mine)",
    "import yaml\nclass A(yaml.Loader): pass\nclass B(A): pass\nyaml.load(text, B)",
    "import yaml\nyaml.load(text, loader_of(text))",
    "import numpy as np\nnp.load(file, allow_pickle=True)",
    "import numpy as np\nnp.load(file, allow_pickle=flag)",
    "import numpy as np\nnp.load(file, 'r', True)",
    "import numpy as np\nnp.load(file, **options)",
    "from numpy import load as read\nread(file, None, True)",
    "import os\nos.system('ls')",
    "from os import system\nsystem('ls')",
    "import os\nos.popen('ls')",
    "import os\nos.execvp('ls', [])",
    "import subprocess\nsubprocess.run('ls', shell=True)",
    "import subprocess\nsubprocess.Popen('ls', shell=flag)",
    "import subprocess\nsubprocess.run('ls', **options)",
    "from subprocess import run\nrun('ls', shell=1)",
    "import subprocess\nsubprocess.getoutput('ls')",
  ],
)
def test_the_checker_sees_it(source):
  assert Checker(source).faults()


@pytest.mark.parametrize(
  "source",
  [
    "import json\njson.loads(text)",
    "import re\nre.compile(text)",
    "jax.jit(f).lower(x).compile()",
    "import yaml\nyaml.safe_load(text)",
    "import yaml\nyaml.load(text, yaml.SafeLoader)",
    "import yaml\nclass A(yaml.SafeLoader): pass\nclass B(A): pass\nyaml.load(text, Loader=B)",
    "import numpy as np\nnp.load(file, mmap_mode='r', allow_pickle=False)",
    "import subprocess\nsubprocess.run(['ls'], shell=False)",
    "import os.path\nos.path.exists('eval')",
  ],
)
def test_the_checker_lets_pass_what_is_safe(source):
  assert Checker(source).faults() == []
