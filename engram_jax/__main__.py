"""The commands besides train and eval: `python -m engram_jax plan --config configs/tiny.yaml`."""

import importlib
import sys

from engram_jax.cli import run_command

# `main(words)` of engram_jax/commands/NAME.py, imported when it is called: plan needs no jax.
COMMANDS = {
  "convert": "Tables and weights in other forms: table files, and what `convert --help` lists.",
  "generate": "Continues prompts; tables on the device, in host memory or in a file.",
  "inspect": "What a checkpoint's memory is, and the rows it holds for a text.",
  "plan": "Parameters, FLOPs and bytes of a config, without making an array.",
  "serve": "A trained run behind the OpenAI API, and a page to try it.",
}


def main() -> int:
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("-h", "--help"):
    print(f"usage: python -m engram_jax COMMAND [--help] [OPTIONS]\n\n{__doc__}\n")
    for command, about in COMMANDS.items():
      print(f"  {command:10}{about}")
    return 0
  if name not in COMMANDS:
    print(f"error: no command {name!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2
  return importlib.import_module(f"engram_jax.commands.{name}").main(sys.argv[2:])


if __name__ == "__main__":
  run_command(main)
