"""Random streams that can be replayed one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def stream_seed(seed: int, purpose: str, index: int) -> int:
    """An independent seed for each purpose and step, so that any step of a run can be computed on its own."""
    return int(digest([seed, purpose, index])[:15], 16)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, hexadecimal."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random draws inside depend on `seed` alone, and those outside are left as if nothing had happened."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
