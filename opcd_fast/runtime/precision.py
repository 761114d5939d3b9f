"""Matrix products of float32 numbers in float32, whatever the process has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 and no bf16 inside float32 products; afterwards everything is as it was.

    By the settings that torch's products read. `get_float32_matmul_precision` raises where they were set one by one.
    """
    mkldnn: Any = torch.backends.mkldnn
    places = torch.backends.cuda.matmul, mkldnn.matmul
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for place, precision in zip(places, before):
            place.fp32_precision = "none"  # so that it inherits again where it did
            if place.fp32_precision != precision:
                place.fp32_precision = precision
