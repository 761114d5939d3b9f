"""`opcd diff`: two runs compared by their cards. Exit status like diff's: 0 alike, 1 different, 2 trouble."""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from opcd_fast.commands.arguments import parse
from opcd_fast.runtime import printable

LONGEST = 2000  # characters of a line


@dataclass(frozen=True)
class DiffCommand:
    """Compare two runs: settings, hashes, context, and the scores that differ by more than noise.

    Exit status 0 when settings and hashes are the same and no score differs beyond its 95 % interval, else 1.
    """

    a: Positional[str]
    """A run's folder (or its opcd_card.json), as `opcd report` left it."""
    b: Positional[str]
    """The other one."""


def run(arguments: list[str]) -> int:
    command = parse(DiffCommand, "diff", arguments)
    from opcd_fast.evaluation import compare_runs

    found = compare_runs(Path(command.a), Path(command.b))

    def print(line: str) -> None:  # a card may come from anybody
        builtins.print(printable(line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."))

    for name, (a, b) in found.settings.items():
        print(f"setting  {name}: {a!r} -> {b!r}")
    for name, change in found.hashes.items():
        print(f"hash     {name}: {change}")
    for line in found.context:
        print(f"context  {line}")
    for score in found.scores:
        if score.a != score.b:
            unit = (lambda x: f"{x * 100:.1f}%") if score.share else (lambda x: f"{x:.4g}")
            verdict = "differs" if score.beyond_noise else "within noise"
            by = f"by {unit(score.low)} to {unit(score.high)}"
            print(f"score    {score.name}: {unit(score.a)} -> {unit(score.b)}, {by}: {verdict}")
    for note in found.notes:
        print(f"note     {note}")
    if not found.differs:
        print("alike: same settings and hashes, no score differs beyond noise")
    return int(found.differs)
