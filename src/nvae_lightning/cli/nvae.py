"""The console command ``nvae``: ``nvae train …`` is ``python -m nvae_lightning.train …``."""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def list_commands() -> dict[str, str]:
    """Return the name of every command and the first words of its docstring; import none.

    >>> list_commands()["convert"]
    'Convert published weights'
    """
    found = {}
    for file in sorted(_PACKAGE.glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.stem] = docstring.splitlines()[0].partition(":")[0]
    return found


def _only_prints(arguments: list[str]) -> bool:
    """Return whether Hydra prints help or a config, so that the command need not be imported.

    The command itself completes the config of a run that it resumes.
    """
    prints = ("-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info")
    resumes = any(argument.startswith("ckpt_path=") for argument in arguments)
    return not resumes and any(a.partition("=")[0] in prints for a in arguments)


def main() -> None:
    """Run the command named by the first argument; without arguments, list the commands.

    The command runs as the main module, whose name Lightning uses to start further ranks.
    """
    name, *arguments = sys.argv[1:] or ["--help"]
    commands = list_commands()
    if name in ("-h", "--help"):
        print("usage: nvae COMMAND [KEY=VALUE ...]\n")
        print(*(f"  {command:10} {text}" for command, text in commands.items()), sep="\n")
        print("\n'nvae COMMAND --help' describes a command.")
        return
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(commands)}"
        sys.exit(f"error: unknown command '{name}'; {remedy}")
    sys.argv[1:] = arguments
    if _only_prints(arguments):
        from nvae_lightning.cli.command import command, run

        run(command(name)(lambda _: None))
        return
    runpy.run_module(f"nvae_lightning.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
