"""All commands of the package: `python -m engram_jax plan --config configs/tiny.yaml`."""

import importlib
import importlib.util
import pathlib
import sys
from types import ModuleType

import engram_jax
from engram_jax.cli import run_command

# `main(argv)` of engram_jax/commands/NAME.py, imported when it is called: plan needs no jax.
COMMANDS = {
  "analyze": "Numbers and pictures of what a memory does: its gates over a text.",
  "convert": "Tables and weights in other forms: table files, and what `convert --help` lists.",
  "generate": "Continues prompts; tables on the device, in host memory or in a file.",
  "inspect": "What a checkpoint's memory is, and the rows it holds for a text.",
  "plan": "Parameters, FLOPs and bytes of a config, without making an array.",
  "serve": "A trained run behind the OpenAI API, and a page to try it.",
  "sweep": "Does the memory help? Controls, ablations, splits and sizes, with statistics.",
}
# `main()` of train.py and eval.py, which lie beside the package, or in it when it was installed.
SCRIPTS = {
  "train": "Trains a model; `train.py` of the repository.",
  "eval": "Evaluates a run; `eval.py` of the repository.",
}


def main() -> int:
  """Runs the command that the command line names; returns its exit code."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("-h", "--help"):
    print(f"usage: python -m engram_jax COMMAND [--help] [OPTIONS]\n\n{__doc__}\n")
    for command, about in (SCRIPTS | COMMANDS).items():
      print(f"  {command:10}{about}")
    return 0
  if name == "--version":
    print(f"engram_jax {engram_jax.__version__}")
    return 0
  if name in SCRIPTS:
    sys.argv = [f"python -m engram_jax {name}", *sys.argv[2:]]
    return _load_script(name).main()
  if name not in COMMANDS:
    names = ", ".join(SCRIPTS | COMMANDS)
    print(f"error: no command {name!r}; there are: {names}", file=sys.stderr)
    return 2
  return importlib.import_module(f"engram_jax.commands.{name}").main(sys.argv[2:])


def _load_script(name: str) -> ModuleType:
  """train.py or eval.py as a module."""
  package = pathlib.Path(__file__).parent
  installed, beside = package / "scripts" / f"{name}.py", package.parent / f"{name}.py"
  path = installed if installed.exists() else beside
  spec = importlib.util.spec_from_file_location(f"engram_jax_{name}", path)
  assert spec is not None, path
  assert spec.loader is not None, path
  module = importlib.util.module_from_spec(spec)
  sys.modules[module.__name__] = module  # where tyro finds the source of its options' help
  spec.loader.exec_module(module)
  return module


def entry() -> None:
  """Runs `main` and leaves with its exit code; the console script `engram_jax`."""
  run_command(main)


if __name__ == "__main__":
  entry()
