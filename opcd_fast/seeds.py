"""Random streams that can be replayed one by one."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def stream_seed(seed: int, purpose: str, index: int) -> int:
    """An independent seed for each purpose and step, so that any step of a run can be computed on its own."""
    return int(digest([seed, purpose, index])[:15], 16)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, hexadecimal."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
