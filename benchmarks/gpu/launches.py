"""One launch of each Triton kernel: its inputs, the bytes it must move, and its error against float64.

What smoke tries and the sweep times is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opcd_fast.kernels.reference import DIVERGENCES, STATISTICS, Logits
from opcd_fast.kernels.reference import attention as merge_twin
from opcd_fast.kernels.reference import divergences as divergence_twin
from opcd_fast.kernels.reference import logprobs as logprob_twin
from opcd_fast.kernels.triton import divergences, logprob_rows, merge_attention, reverse_kl_rows
from opcd_fast.loss.chunks import pitch_of

GRADIENT_ERROR = 2**-7  # of a bf16 number that was cut off, as the interpreter does; a device rounds to the nearest
VALUE_ERROR = 1e-3


@dataclass
class Launch:
    kernel: str  # of opcd_fast.kernels.triton.launch_shapes.KERNELS
    call: Callable[[], Any]
    error: Callable[[], tuple[float, float]]  # relative, of what is rounded to two bytes and of what is not
    nbytes: int  # read and written at least
    result: Tensor  # what the last call wrote


def reverse_kl(
    device: torch.device, rows: int, columns: int, softcap: float | None = None, gated: bool = False
) -> Launch:
    """As the trainer asks for it: all statistics, a bf16 gradient; with a softcap a bias too. Gated: gated_kl."""
    name = "gated_kl" if gated else "reverse_kl"
    z_s, z_t, bias, weights, statistics, gradient = _row_inputs(device, rows, columns, softcap is not None)
    arguments = (_logits(z_s, bias, softcap), _logits(z_t, bias, softcap), weights, statistics, gradient)
    # Two passes over both logits, one write.
    return Launch("reverse_kl_rows", partial(reverse_kl_rows, *arguments, gated=gated),
                  partial(_error, arguments, lambda given: divergence_twin.divergence_rows(*given, divergence=name)),
                  rows * columns * (4 * 4 + 2), gradient)  # fmt: skip


def divergence(device: torch.device, rows: int, columns: int, name: str = "forward_kl") -> Launch:
    """The reverse KL too when there are few rows, each split over programs."""
    z_s, z_t, _, weights, statistics, gradient = _row_inputs(device, rows, columns, False)
    options: dict[str, Any] = {"divergence": name, "parameter": 0.3}
    arguments = (_logits(z_s), _logits(z_t), weights, statistics, gradient)
    passes = 2 if DIVERGENCES[name].two_passes else 3
    return Launch("divergence_rows", partial(divergences.divergence_rows, *arguments, **options),
                  partial(_error, arguments, lambda given: divergence_twin.divergence_rows(*given, **options)),
                  rows * columns * (passes * 8 + 2), gradient)  # fmt: skip


def logprob(device: torch.device, rows: int, columns: int) -> Launch:
    z, _, _, weights, _, gradient = _row_inputs(device, rows, columns, False)
    ids = torch.randint(columns, (rows,), device=device, generator=_generator(device))
    arguments = (Logits(z), ids, weights, torch.zeros(2, rows, device=device), gradient)
    return Launch("logprob_rows", partial(logprob_rows, *arguments),
                  partial(_error, arguments, lambda given: logprob_twin.logprob_rows(*given)),
                  rows * columns * (2 * 4 + 2), gradient)  # fmt: skip


def merge(device: torch.device, tokens: int, heads: int, width: int) -> Launch:
    g = _generator(device)
    outs = [torch.randn(tokens, heads, width, generator=g, device=device).bfloat16() for _ in range(2)]
    lses = [torch.randn(tokens, heads, generator=g, device=device) for _ in range(2)]
    result = torch.empty_like(outs[0])
    pairs = (outs[0], lses[0], outs[1], lses[1])

    def error() -> tuple[float, float]:
        exact = merge_twin.merge_attention(*(x.double() for x in pairs))
        return relative(result, exact), 0.0

    # The small tile of logsumexps is not counted.
    return Launch("merge_attention", lambda: merge_attention(*pairs, out=result), error, 3 * result.numel() * 2, result)


def large(device: torch.device, dry: bool) -> dict[str, Callable[[], Launch]]:
    """By kernel, a launch of the size that a training step makes."""
    rows, columns = (3, 1003) if dry else (1024, 151_936)
    tokens, heads, width = (5, 2, 16) if dry else (32_768, 32, 128)
    return {
        "reverse_kl_rows": partial(reverse_kl, device, rows, columns),
        "merge_attention": partial(merge, device, tokens, heads, width),
        "logprob_rows": partial(logprob, device, rows, columns),
        "divergence_rows": partial(divergence, device, rows, columns),
    }


def _row_inputs(device: torch.device, rows: int, columns: int, biased: bool) -> tuple[Any, ...]:
    """Peaked logits of two models that are near each other, in buffers as loss/chunks/loop.py cuts them."""
    g, pitch = _generator(device), pitch_of(columns)
    z_s = torch.randn(rows, pitch, generator=g, device=device).mul_(2.0)
    z_s[:, :: max(1, columns // 7)] += 9.0
    z_t = torch.randn(rows, pitch, generator=g, device=device).mul_(0.1).add_(z_s)
    weights = torch.rand(rows, generator=g, device=device) + 0.5
    bias = torch.randn(columns, generator=g, device=device) if biased else None
    gradient = torch.full((rows, pitch), float("nan"), dtype=torch.bfloat16, device=device)
    statistics = torch.full((len(STATISTICS), rows), float("nan"), device=device)
    return z_s[:, :columns], z_t[:, :columns], bias, weights, statistics, gradient[:, :columns]


def _logits(z: Tensor, bias: Tensor | None = None, softcap: float | None = None) -> Logits:
    return Logits(z, bias, softcap=softcap, temperature=0.9)


def _double(x: Any) -> Any:
    if isinstance(x, Logits):
        return x._replace(z=_double(x.z), bias=_double(x.bias))
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _error(arguments: tuple[Any, ...], twin: Callable[[list[Any]], None]) -> tuple[float, float]:
    """Of gradient and statistics, against the twin in float64 on the same inputs. Poisoned before: what the kernel
    leaves out is NaN."""
    given = [_double(x) for x in arguments]
    twin(given)
    *_, statistics, gradient = arguments
    *_, exact_statistics, exact_gradient = given
    return relative(gradient, exact_gradient), relative(statistics[0], exact_statistics[0])


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of what is exact."""
    return float((found.double() - exact).norm() / exact.norm())


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)
