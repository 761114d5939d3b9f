"""What optimizers hold: torch's and transformers' rehearsed, bitsandbytes' by stand-ins, which need no bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opcd_fast.planning.rehearsal.meter import Meter
from opcd_fast.training.engines import make_optimizer
from opcd_fast.training.settings import OPCDConfig

_BLOCK, _SMALL, _UNPAGED = 256, 4096, 10**5  # of bitsandbytes: numbers with one scale, in 32 bits, never paged


def rehearsed_optimizer(meter: Meter, config: OPCDConfig, parameters: Sequence[Tensor], device: str) -> Any:
    """The optimizer of a run on `device` ("cuda" or "cpu"), for fake parameters; its first step makes its state."""
    if config.optimizer.endswith("_8bit"):
        return _EightBit(meter, parameters, device, paged=config.optimizer.startswith("paged_"))
    return make_optimizer(config, parameters, torch.device("cpu"), adapter=True)


class _EightBit:
    """AdamW in 8 bits: the state's bytes, and on a CPU what its arithmetic takes, tensor by tensor."""

    def __init__(self, meter: Meter, parameters: Sequence[Tensor], device: str, paged: bool) -> None:
        self._meter, self._parameters, self._device, self._paged = meter, parameters, device, paged
        self._state: list[Tensor] = []

    @torch.no_grad()
    def step(self) -> None:
        for p in self._parameters if not self._state else ():
            self._state += self._new(p)
        for p in self._parameters if self._device == "cpu" else ():
            # Both averages, the gradient, the root of one average and its quotient.
            p.new_empty(5, p.numel(), dtype=torch.float32)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._parameters:
            p.grad = None

    def _new(self, p: Tensor) -> list[Tensor]:
        count = p.numel()
        if count < _SMALL:
            return [p.new_empty(2, count, dtype=torch.float32)]
        averages = p.new_empty(2, count, dtype=torch.uint8)
        if self._paged and count >= _UNPAGED:
            self._meter.elsewhere(averages)
        return [averages, p.new_empty(2, -(-count // _BLOCK), dtype=torch.float32)]
