"""One launch of each Triton kernel at a training step's size: its inputs, and the bytes that it must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opcd_fast.kernels.reference import STATISTICS, Logits
from opcd_fast.kernels.triton import divergences, logprob_rows, merge_attention, reverse_kl_rows
from opcd_fast.loss.chunks import pitch_of


@dataclass
class Launch:
    call: Callable[[], Any]
    nbytes: int  # read and written at least
    result: Tensor  # what the last call wrote


def large(device: torch.device, dry: bool) -> dict[str, Callable[[], Launch]]:
    """By kernel of opcd_fast.kernels.triton.launch_shapes.KERNELS."""
    rows, columns = (3, 1003) if dry else (1024, 151_936)
    tokens, heads, width = (5, 2, 16) if dry else (32_768, 32, 128)
    return {
        "reverse_kl_rows": partial(reverse_kl, device, rows, columns),
        "merge_attention": partial(merge, device, tokens, heads, width),
        "logprob_rows": partial(logprob, device, rows, columns),
        "divergence_rows": partial(forward_kl, device, rows, columns),
    }


def reverse_kl(device: torch.device, rows: int, columns: int) -> Launch:
    """As the trainer asks for it: all statistics, a bf16 gradient. Two passes over both logits, one write."""
    z_s, z_t, weights, statistics, gradient = _row_inputs(device, rows, columns)
    call = partial(reverse_kl_rows, z_s, z_t, weights, statistics, gradient)
    return Launch(call, rows * columns * (4 * 4 + 2), gradient)


def forward_kl(device: torch.device, rows: int, columns: int) -> Launch:
    """Two passes, as the other divergences that know their constants beforehand."""
    z_s, z_t, weights, statistics, gradient = _row_inputs(device, rows, columns)
    call = partial(divergences.divergence_rows, z_s, z_t, weights, statistics, gradient, divergence="forward_kl")
    return Launch(call, rows * columns * (4 * 4 + 2), gradient)


def logprob(device: torch.device, rows: int, columns: int) -> Launch:
    z, _, weights, statistics, gradient = _row_inputs(device, rows, columns)
    ids = torch.randint(columns, (rows,), device=device)
    return Launch(partial(logprob_rows, z, ids, weights, statistics[:2], gradient), rows * columns * (2 * 4 + 2),
                  gradient)  # fmt: skip


def merge(device: torch.device, tokens: int, heads: int, width: int) -> Launch:
    """The small tile of logsumexps is not counted."""
    outs = [torch.randn(tokens, heads, width, device=device).bfloat16() for _ in range(2)]
    lses = [torch.randn(tokens, heads, device=device) for _ in range(2)]
    result = torch.empty_like(outs[0])
    call = partial(merge_attention, outs[0], lses[0], outs[1], lses[1], out=result)
    return Launch(call, 3 * result.numel() * 2, result)


def _row_inputs(device: torch.device, rows: int, columns: int) -> tuple[Logits, Logits, Tensor, Tensor, Tensor]:
    """Peaked logits of two models that are near each other, in buffers as loss/chunks/loop.py cuts them; weights,
    statistics, gradient."""
    pitch = pitch_of(columns)
    z_s = torch.randn(rows, pitch, device=device).mul_(2.0)
    z_s[:, :: max(1, columns // 7)] += 9.0
    z_t = torch.randn(rows, pitch, device=device).mul_(0.1).add_(z_s)
    weights = torch.rand(rows, device=device) + 0.5
    gradient = torch.empty(rows, pitch, dtype=torch.bfloat16, device=device)
    statistics = torch.zeros(len(STATISTICS), rows, device=device)
    logits = (Logits(z[:, :columns], None, softcap=None, temperature=0.9) for z in (z_s, z_t))
    return *logits, weights, statistics, gradient[:, :columns]
