"""`opcd completion`: what a shell needs to complete commands and options."""

from __future__ import annotations

import importlib
import inspect

from opcd_fast.commands import COMMANDS
from opcd_fast.commands.helping import options_of
from opcd_fast.errors import InputError

BASH = """\
_opcd() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words=
  if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"
  else case ${{COMP_WORDS[1]}} in
{cases}
  esac; fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _opcd opcd
"""


def run(arguments: list[str]) -> int:
    """`opcd completion bash` (or zsh, fish) prints a script for the shell's own configuration file."""
    if len(arguments) != 1 or arguments[0] not in ("bash", "zsh", "fish"):
        raise InputError("completion: name your shell: bash, zsh or fish. Then: source <(opcd completion bash)")
    kinds = {name: kind_of(name) for name in COMMANDS if name != "completion"}
    options = {name: [f"--{option.replace('_', '-')}" for option in options_of(kind)]
               for name, kind in kinds.items() if kind is not None}  # fmt: skip
    if arguments[0] == "fish":
        lines = [f"complete -c opcd -n __fish_use_subcommand -f -a {name} -d '{purpose}'" for name, purpose
                 in COMMANDS.items()]  # fmt: skip
        lines += [f"complete -c opcd -n '__fish_seen_subcommand_from {name}' -l {option[2:]}"
                  for name, found in options.items() for option in found]  # fmt: skip
        print("\n".join(line.replace("'s ", "\\'s ") for line in lines))
        return 0
    if arguments[0] == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    cases = "\n".join(f'    {name}) words="{" ".join(found)}";;' for name, found in options.items())
    print(BASH.format(commands=" ".join(COMMANDS), cases=cases), end="")
    return 0


def kind_of(name: str) -> type | None:
    """The dataclass of a command's options; None for a command without any."""
    module = importlib.import_module(f"opcd_fast.commands.{'train' if name == 'preview' else name}")
    own = (kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__)
    return next((kind for kind in own if kind.__name__.endswith("Command")), None)
