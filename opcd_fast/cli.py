"""The command line `opcd`. The commands are in `opcd_fast.commands`.

Every mistake a user can correct ends with one line on stderr and exit status 2. `OPCD_DEBUG=1` shows where it
came from.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from opcd_fast.commands import COMMANDS
from opcd_fast.errors import InputError, pip_install
from opcd_fast.runtime import launched_rank, printable

INTRODUCTION = "opcd: move a context (system prompt, few-shot turns, notes) into the weights of a language model."
FIRST_RUN = """\
`opcd COMMAND --help` lists the options of a command. The first run to try:

  opcd train --model smollm2 --context context.txt --prompts questions.txt
"""

# What the extra `train` installs, as modules.
TRAIN_PACKAGES = ("tyro", "transformers", "peft", "accelerate", "safetensors", "yaml", "rich", "matplotlib", "jinja2")


def overview() -> str:
    """The commands and what each is for."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  opcd {name:<{width}} {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join([INTRODUCTION, "", *lines, "", FIRST_RUN])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview(), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        from opcd_fast import __version__

        print(__version__)
        return 0
    try:
        if arguments[0] not in COMMANDS:
            close = difflib.get_close_matches(arguments[0], COMMANDS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"commands: {', '.join(COMMANDS)}"
            raise InputError(f"unknown command {arguments[0]!r}; {hint}")
        return importlib.import_module(f"opcd_fast.commands.{arguments[0]}").run(arguments[1:])
    except Exception as error:
        line = _one_line(error)
        if line is None or os.environ.get("OPCD_DEBUG"):
            raise
        if type(error).__name__ != "OtherRankError":  # the rank where it happened says it
            rank = launched_rank()
            print(f"opcd{f' (rank {rank})' if rank else ''}: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        # A trainer that was stopped by a signal says what it saved, and the signal's exit status.
        said = str(stop) or "interrupted; finished checkpoints are intact, go on with --resume"
        if not launched_rank():
            print(f"opcd: {said}", file=sys.stderr)
        return getattr(stop, "status", 130)


def _one_line(error: Exception) -> str | None:
    """What to tell the user; None for a bug, which keeps its traceback."""
    if isinstance(error, InputError):
        return printable(" ".join(str(error).split()))
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in (*TRAIN_PACKAGES, "gguf"):
            return None
        extra = "gguf" if package == "gguf" else "train"
        return f"the package {package!r} is missing: {pip_install(extra)}"
    # By name: neither torch nor safetensors need be there.
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of GPU memory: lower micro_batch_tokens and rollout_batch, or max_new_tokens ({first})"
    if isinstance(error, (NotImplementedError, RecursionError)):
        return None
    expected = isinstance(error, (ValueError, OSError, RuntimeError)) or type(error).__name__ == "SafetensorError"
    return printable(f"{first} (OPCD_DEBUG=1 shows where)") if expected else None


if __name__ == "__main__":
    sys.exit(main())
