"""`opcd demo`: the whole method on a small real model, measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from opcd_fast.commands.arguments import check_at_least, parse, quiet_libraries


@dataclass(frozen=True)
class DemoCommand:
    """Move six few-shot turns into SmolLM2-135M-Instruct and measure what changed."""

    output_dir: str = "runs/demo"
    """Folder for the report; an earlier demo in it is replaced."""
    steps: int | None = None
    """Training steps; default: enough for the form to move in wholly."""
    samples: int = 128
    """Sampled answers behind each rate."""
    seed: int = 0
    """Fixes prompt order and samples."""


def run(arguments: list[str]) -> int:
    command = parse(DemoCommand, "demo", arguments)
    check_at_least(1, command, "steps", "samples")
    import matplotlib  # noqa: F401  the plot comes last: minutes too late to learn that it cannot be drawn

    from opcd_fast.evaluation import run_demo

    quiet_libraries()
    return 0 if run_demo(**dataclasses.asdict(command)) else 1
