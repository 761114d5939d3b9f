"""Which rows of a call are computed, and what multiplies them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    weights: Tensor  # (N,) in the compute dtype; all ones when the caller gave none
    active: Tensor | None  # (n,) int64, rows of non-zero weight; None when that is all of them
    factor: float | Tensor  # multiplies sum(w * kl)
    hidden: bool = False  # rows of weight 0 are computed too, and whatever they hold must not be seen

    @property
    def count(self) -> int:
        """How many are computed."""
        return len(self.weights if self.active is None else self.active)

    def chosen(self, start: int, stop: int) -> slice | Tensor:
        """Which rows of the call are start..stop of those that are computed."""
        return slice(start, stop) if self.active is None else self.active[start:stop]

    def seen(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors (N, ...) with 0 in the rows that must not be seen."""
        if not self.hidden:
            return tensors
        return tuple(torch.where((self.weights != 0).view(-1, *[1] * (x.ndim - 1)), x, 0) for x in tensors)


def capturing(device: torch.device) -> bool:
    """Whether the call is being recorded into a CUDA graph, where nothing may synchronise."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str) -> None:
    """Raises RuntimeError while a CUDA graph is captured."""
    if capturing(device):
        raise RuntimeError(f"{what} synchronises with the device, which a CUDA graph cannot record; leave it outside")


def select_rows(
    token_weights: Tensor | None,  # (N,)
    like: Tensor,  # (N, ...), on the device of the computation
    dtype: torch.dtype,
    reduction: str = "sum",
    denominator: Tensor | None = None,  # scalar, of "mean"
    factor: float | Tensor = 1.0,
) -> Rows:
    """Find the rows to compute, and the factor of the reduction.

    Finding the rows synchronises with a device once; without token_weights nothing does. While a CUDA graph is
    captured all rows are computed, since which ones matter may differ when it is replayed.

    Raises ValueError for a mean of weights whose sum, or on a CPU whose denominator, is not positive; else that is NaN.
    """
    count, device = len(like), like.device
    graph = capturing(device)
    active: Tensor | None = None
    if token_weights is None:
        weights = torch.ones(count, dtype=dtype, device=device)
    else:
        # Kernels read them by address: the gradient of a sum, for one, is a single number that was expanded.
        weights = token_weights.to(device=device, dtype=dtype).contiguous()
        if not graph:
            active = weights.nonzero().squeeze(1)
            if active.shape[0] == count:
                active = None
    hidden = graph and token_weights is not None
    if count == 0 or (active is not None and active.shape[0] == 0):
        return Rows(weights, active, 0.0)  # whatever the denominator is: a micro-batch may be empty
    if reduction != "mean":
        return Rows(weights, active, factor, hidden)
    if denominator is not None:
        # Stays a tensor: a count that was summed over ranks on the device is used without a synchronisation.
        total = denominator.detach().reshape(()).to(device, dtype)
        if device.type == "cpu" and not 0 < float(total) < math.inf:
            raise ValueError(f"denominator is {float(total)}; it must be a positive number")
        factor = torch.where(total > 0, total.reciprocal(), 0.0 if graph else math.nan)
        return Rows(weights, active, factor, hidden)
    if hidden:
        total = weights.sum()
        return Rows(weights, active, torch.where(total > 0, total.reciprocal(), 0.0), hidden)
    total_weight = float(count) if token_weights is None else float(weights.sum())
    if not total_weight > 0:
        raise ValueError(
            f"token_weights sum to {total_weight}, so their mean is undefined; pass denominator= or reduction='sum'"
        )
    return Rows(weights, active, 1.0 / total_weight)
