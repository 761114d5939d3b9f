"""`opcd info`: what is installed here and what is missing."""

from __future__ import annotations

from opcd_fast.errors import InputError


def run(arguments: list[str]) -> int:
    """Without tyro: this command tells what is missing."""
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: opcd info\n\nShow versions, devices and which optional parts are there.")
        return 0
    if arguments:
        raise InputError(f"info: unknown option {arguments[0]!r}; info takes none")
    from opcd_fast.evaluation import describe

    print(describe(), end="")
    return 0
