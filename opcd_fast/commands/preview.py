"""`opcd preview`: what a run would teach, before compute is spent."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from opcd_fast.commands.train import train_command, trainer_of

SHOWN = 3


def run(arguments: list[str]) -> int:
    """The options of `opcd train`; nothing is written. Status 1 where there is hardly anything to learn."""
    command, named = train_command(arguments, "preview")
    with tempfile.TemporaryDirectory() as folder:
        nowhere = dataclasses.replace(command.run, output_dir=str(Path(folder) / "run"), trackers=(), resume=False)
        trainer = trainer_of(dataclasses.replace(command, run=nowhere), named)
        from opcd_fast.training import changes_something, in_lines

        pairs = trainer.preview(command.run.preview or SHOWN)
    print("\n".join(in_lines(pairs)))
    return 0 if changes_something(pairs) else 1
