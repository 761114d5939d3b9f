"""What a caller may hand to the losses: checks that name the argument, and the weights of rows."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from opcd_fast.heads import LMHead

REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "triton", "native", "torch")


class Rows(NamedTuple):
    weights: Tensor  # (N,) in the compute dtype; all ones when the caller gave none
    active: Tensor | None  # (n,) int64, rows of non-zero weight; None when that is all of them
    factor: float | Tensor  # multiplies sum(w * kl)


def as_head(head: LMHead | Tensor, name: str) -> LMHead:
    if isinstance(head, LMHead):
        return head
    if isinstance(head, Tensor):
        return LMHead(head)
    raise TypeError(
        f"{name} is a {type(head).__name__}; pass an LMHead or its (V, D) weight (LMHead.from_model(model) makes one)"
    )


def check_hidden(h_s: Tensor, student: LMHead, h_t: Tensor, teacher: LMHead) -> torch.Size:
    """Leading dimensions of the hidden states, after checking them against each other and the heads."""
    for side, h, head in (("student", h_s, student), ("teacher", h_t, teacher)):
        if not isinstance(h, Tensor) or not h.is_floating_point() or h.ndim < 1:
            kind = f"{h.dtype} tensor" if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(f"{side}_hidden is a {kind}; expected floating-point hidden states (..., D)")
        if h.shape[-1] != head.weight.shape[1]:
            raise ValueError(
                f"{side}_hidden has width {h.shape[-1]}, {side}_head expects {head.weight.shape[1]}; they must be equal"
            )
        for name, tensor in (("_hidden", h), ("_head", head.weight), ("_head.bias", head.bias)):
            if tensor is not None and tensor.device != h_s.device:
                raise ValueError(
                    f"{side}{name} is on {tensor.device}, student_hidden on {h_s.device}; move one of them"
                )
    if h_s.shape[:-1] != h_t.shape[:-1]:
        raise ValueError(
            f"student_hidden has leading shape {tuple(h_s.shape[:-1])}, teacher_hidden "
            f"{tuple(h_t.shape[:-1])}; row i of both must predict the same response token"
        )
    return h_s.shape[:-1]


def check_temperature(temperature: float) -> float:
    if isinstance(temperature, Tensor) or not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it must be a positive number")
    return float(temperature)


def check_workspace(workspace_bytes: int | None) -> int | None:
    if workspace_bytes is not None and workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes is {workspace_bytes}; it must be positive, or None for the default")
    return None if workspace_bytes is None else int(workspace_bytes)


def triton_can_run(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the Triton kernels can run, otherwise why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32, not float64"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {device.type}, Triton runs on cuda (or, for tests, with TRITON_INTERPRET=1)"
    return None


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    if backend == "native":
        raise ValueError(
            "backend='native' is not built in this installation; use backend='torch' or 'auto' "
            "(`opcd info` lists what is available)"
        )
    if backend == "torch":
        return backend
    reason = triton_can_run(device, dtype)
    if backend == "auto":
        return "triton" if device.type == "cuda" and reason is None else "torch"
    if reason is not None:
        raise ValueError(f"backend='triton' cannot run: {reason}; use backend='torch' or 'auto'")
    return backend


def weigh_rows(
    token_weights: Tensor | None,
    leading: torch.Size,
    reduction: str,
    denominator: float | Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Rows:
    """Flatten and check token_weights, find the rows to compute, and the factor of the reduction.

    Finding the rows synchronises with a device once; without token_weights nothing does.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(map(repr, REDUCTIONS))}")
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator is given but reduction is {reduction!r}; it only applies to 'mean'")
    count = leading.numel()
    if token_weights is None:
        weights, active = torch.ones(count, dtype=dtype, device=device), None
    else:
        if not isinstance(token_weights, Tensor) or token_weights.shape != leading:
            shape = tuple(token_weights.shape) if isinstance(token_weights, Tensor) else type(token_weights).__name__
            raise ValueError(f"token_weights is {shape}; expected a tensor of shape {tuple(leading)}, one per token")
        if token_weights.requires_grad:
            raise ValueError("token_weights requires grad, but is treated as a constant; pass token_weights.detach()")
        if token_weights.is_complex():
            raise ValueError(f"token_weights has dtype {token_weights.dtype}; expected bool or float")
        weights = token_weights.to(device=device, dtype=dtype).reshape(-1)
        active = weights.nonzero().squeeze(1)
        if active.shape[0] == count:
            active = None
    if reduction != "mean":
        return Rows(weights, active, 1.0)
    return Rows(weights, active, _factor(denominator, weights, active, dtype, device))


def _factor(
    denominator: float | Tensor | None,
    weights: Tensor,
    active: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> float | Tensor:
    if denominator is None:
        n = weights.shape[0] if active is None else active.shape[0]
        if n == 0:
            return 0.0
        total = float(weights.sum())
        if not total > 0:
            raise ValueError(
                f"token_weights sum to {total}, so their mean is undefined; pass denominator= or reduction='sum'"
            )
        return 1.0 / total
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator has shape {tuple(denominator.shape)}; expected a number or a scalar tensor")
        # Stays a tensor: a count that was summed over ranks on the device is used without a synchronisation.
        return denominator.detach().reshape(()).to(device=device, dtype=dtype).reciprocal()
    if not (math.isfinite(denominator) and denominator > 0):
        raise ValueError(f"denominator is {denominator}; it must be a positive number")
    return 1.0 / float(denominator)


def check_finite(h_s: Tensor, student: LMHead, h_t: Tensor, teacher: LMHead, active: Tensor | None) -> None:
    """Raise ValueError naming the first row with a NaN or an infinity. A bias may be -inf: it forbids a
    token."""
    for name, rows in (("student_hidden", h_s), ("teacher_hidden", h_t)):
        used = rows if active is None else rows[active]
        _first_bad(name, "row", used.isfinite().all(dim=-1), active)
    for name, head in (("student_head", student), ("teacher_head", teacher)):
        size = head.valid_size
        _first_bad(f"{name}.weight", "vocabulary row", head.weight[:size].isfinite().all(dim=-1), None)
        if head.bias is not None:
            bias = head.bias[:size]
            _first_bad(f"{name}.bias", "entry", bias.isfinite() | (bias == -math.inf), None)


def check_logits(name: str, logits: Tensor, active: Tensor | None) -> None:
    """Raise ValueError naming the first row (N, V) with a NaN or +inf. A logit of -inf forbids a token."""
    used = logits if active is None else logits[active]
    _first_bad(name, "row", (used < math.inf).all(dim=-1), active)


def _first_bad(name: str, what: str, good: Tensor, index: Tensor | None) -> None:
    if bool(good.all()):
        return
    first = int(good.logical_not().nonzero()[0])
    row = first if index is None else int(index[first])
    raise ValueError(
        f"{name}: {what} {row} (of the flattened leading dimensions) is not finite; "
        "find where the model produced NaN or inf before the loss (OPCD_CHECK=1 looked for it)"
    )
