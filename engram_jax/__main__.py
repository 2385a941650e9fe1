"""The commands besides train and eval: `python -m engram_jax plan --config configs/tiny.yaml`."""

import sys

from engram_jax.cli import run_command
from engram_jax.commands import plan

COMMANDS = {"plan": plan.main}


def main() -> int:
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("-h", "--help"):
    print(f"usage: python -m engram_jax COMMAND [--help] [OPTIONS]\n\n{__doc__}\n")
    for command, function in COMMANDS.items():
      print(f"  {command:10}{(function.__doc__ or '').splitlines()[0]}")
    return 0
  if name not in COMMANDS:
    print(f"error: no command {name!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2
  return COMMANDS[name](sys.argv[2:])


if __name__ == "__main__":
  run_command(main)
