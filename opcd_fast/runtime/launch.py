"""What a launcher (torchrun, `accelerate launch`) has told this process, before torch.distributed knows of it."""

from __future__ import annotations

import os


def launched() -> int:
    """How many processes the launcher has started; 1 without one."""
    return _number("WORLD_SIZE", 1)


def launched_rank() -> int:
    """Number of this process among them."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Number of this process on its machine, which is the number of its GPU."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default
