"""`opcd check`: has anything changed since the context was moved in? Exit status 0: no, 1: yes, 2: cannot be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from opcd_fast.commands.arguments import context_in, parse
from opcd_fast.runtime import printable


@dataclass(frozen=True)
class CheckCommand:
    """Compare a run with a context, chat template, tokenizer and base model as they are now.

    Exit status 0 when nothing has changed, 1 when something has, 2 when that cannot be told.
    """

    run: Positional[str]
    """Output folder of `opcd train`, or any folder with its opcd_card.json."""
    context: str
    """The context as it is now: a text file, or chat turns as .json or .jsonl."""
    model: str | None = None
    """Where base and tokenizer are now: a folder, hub id, or "smollm2"; default: where the run found them."""
    rehash: bool = False
    """Read every file, also those whose size and times have not moved."""


def run(arguments: list[str]) -> int:
    command = parse(CheckCommand, "check", arguments)
    from opcd_fast.evaluation import check_run

    findings = check_run(Path(command.run), context_in(command.context), command.model, command.rehash)
    width = max(len(finding.part) for finding in findings)
    for finding in findings:
        print(printable(f"{finding.part:<{width}}  {finding.state:<7}  {finding.detail}"))  # names from the run's files
        if finding.remedy:
            print(f"{'':<{width}}  {'':<7}  -> {finding.remedy}")
    states = {finding.state for finding in findings}
    return 1 if "changed" in states else 2 if "unknown" in states else 0
