"""The surroundings in which a loss computes what it says, whatever the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 in float32 products, and kernels launched on the device that holds the tensors."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        precision = torch.get_float32_matmul_precision()
        with torch.cuda.device(device):
            if precision != "highest":
                torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                if precision != "highest":
                    torch.set_float32_matmul_precision(precision)
