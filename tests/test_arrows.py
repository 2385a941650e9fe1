"""Imports inside the package point one way, and importing it stays cheap."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import engram_jax

PACKAGE = pathlib.Path(engram_jax.__file__).parent

# The folders and files of the package that those in each may import, besides their own.
BASE = {"errors", "config"}
MODEL = BASE | {"core", "memory", "tables"}
MAY_IMPORT = {
  "__init__": set(),
  "errors": set(),
  "config": {"errors"},
  "cli": BASE | {"core"},
  "core": BASE,
  "memory": BASE | {"core"},
  "data": BASE | {"memory"},
  "tables": BASE | {"core", "memory"},
  "model": MODEL,
  "training": MODEL | {"model", "data"},
  "inference": MODEL | {"model", "data"},  # data: inference/load.py alone
  "serve": MODEL | {"model", "inference"},
  "analysis": MODEL | {"model", "inference"},
  "interop": BASE | {"core", "memory"},
  "aot": MODEL | {"model", "training"},
  "research": MODEL | {"model"},  # its runs are processes of their own
}
COMMANDS = set(MAY_IMPORT) - {"__init__"}
MAY_IMPORT["commands"] = COMMANDS
MAY_IMPORT["__main__"] = {"cli", "commands"}

# Modules that a process without jax (a data worker, a server's tokenizer) can import.
WITHOUT_JAX = [
  f"memory/{name}.py"
  for name in ("codecs", "compress", "hash_layout", "hashing", "token_text", "vocabulary")
]
WITHOUT_JAX += ["memory/dialects/qwen_ple.py"]
WITHOUT_JAX += [str(path.relative_to(PACKAGE)) for path in sorted((PACKAGE / "data").rglob("*.py"))]

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported(path: pathlib.Path) -> set[str]:
  """Full names of the modules that a file imports, wherever in the file it does."""
  found = set()
  for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno} imports relatively"
      found.add(node.module)
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def top_name(path: pathlib.Path) -> str:
  """The folder of the package that holds a file, or the name of a file beside them."""
  return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path):
  parts = (name.split(".") for name in imported(path))
  imports = {part[1] for part in parts if part[0] == "engram_jax" and len(part) > 1}
  allowed = MAY_IMPORT[top_name(path)] | {top_name(path)}
  assert imports <= allowed, f"{path} imports {sorted(imports - allowed)}"


@pytest.mark.parametrize("path", WITHOUT_JAX)
def test_the_numpy_half_imports_numpy_halves_only(path):
  inside = {name for name in imported(pathlib.Path(path)) if name.startswith("engram_jax.memory.")}
  modules = {name.split(".")[2] for name in inside}
  hashes = {"dialects", "hash_layout", "hashing", "hashing_jit"}
  assert modules <= hashes | {"compress", "token_text", "vocabulary"}


def test_package_files_are_docstrings_alone():
  public = {PACKAGE / name / "__init__.py" for name in ("config", "tables")}  # these import names
  for path in set(PACKAGE.rglob("__init__.py")) - public:
    body = ast.parse(path.read_text()).body
    rest = body[1:] if path.parent != PACKAGE else [n for n in body[1:] if not is_version(n)]
    assert isinstance(body[0], ast.Expr), path
    assert rest == [], path


def is_version(node: ast.stmt) -> bool:
  return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"


def test_importing_is_quick_and_brings_no_jax():
  names = ["engram_jax." + path.removesuffix(".py").replace("/", ".") for path in WITHOUT_JAX]
  names = [name.removesuffix(".__init__") for name in names]
  program = f"""
import importlib, json, os, sys, time
environment = dict(os.environ)
begin = time.perf_counter()
import engram_jax
seconds = time.perf_counter() - begin
for name in {names!r}:
  importlib.import_module(name)
print(json.dumps({{
  "seconds": seconds,
  "heavy": sorted({{"jax", "jaxlib", "flax", "grain", "torch", "tensorflow"}} & set(sys.modules)),
  "environment": environment == dict(os.environ),
}}))
"""
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
  )
  result = json.loads(done.stdout)
  assert result["seconds"] < 1
  assert result["heavy"] == []
  assert result["environment"]


def test_importing_everything_touches_no_device():
  names = [".".join(("engram_jax", *path.with_suffix("").parts)) for path in MODULES]
  names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
  program = f"""
import importlib, os
import jax  # sets variables of its own
environment = dict(os.environ)
for name in {names!r}:
  importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
changed = set(os.environ.items()) ^ set(environment.items())
assert not changed, changed
"""
  subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, check=True)
