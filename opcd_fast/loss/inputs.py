"""What a caller may hand to the losses: checks that name the argument and what would be right."""

from __future__ import annotations

import importlib.util
import math
import os

import torch
from torch import Tensor

from opcd_fast.kernels.csrc import native
from opcd_fast.kernels.reference import is_number
from opcd_fast.loss.heads import PLAIN, LMHead

REDUCTIONS = ("mean", "sum", "none")
PROJECTIONS = ("auto", "separate", "difference")
BACKENDS = ("auto", "triton", "native", "torch")


def as_head(head: LMHead | Tensor, name: str) -> LMHead:
    if isinstance(head, LMHead):
        return head
    if isinstance(head, Tensor):
        try:
            return LMHead(head)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    raise TypeError(
        f"{name} is a {type(head).__name__}; pass an LMHead or its (V, D) weight (LMHead.from_model(model) makes one)"
    )


def check_side(name: str, h: Tensor, head: LMHead, device: torch.device) -> None:
    """Hidden states `{name}_hidden` against the head `{name}_head`; everything on one device."""
    prefix = f"{name}_" if name else ""
    if not isinstance(h, Tensor) or h.dtype not in PLAIN or h.ndim < 1 or h.layout != torch.strided:
        kind = f"{h.dtype} tensor ({h.layout})" if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(f"{prefix}hidden is a {kind}; expected (..., D) in float32, bf16, fp16 or float64")
    if h.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden has width {h.shape[-1]}, {prefix}head expects {head.weight.shape[1]}; they must be equal"
        )
    for part, tensor in (("hidden", h), ("head", head.weight), ("head.bias", head.bias)):
        if tensor is not None and tensor.device != device:
            first = "student_hidden" if name else "hidden"
            raise ValueError(f"{prefix}{part} is on {tensor.device}, {first} on {device}; move one of them")


def check_pair(h_s: Tensor, student: LMHead, h_t: Tensor, teacher: LMHead) -> torch.Size:
    """Leading dimensions of the hidden states, after checking both sides against each other."""
    device = h_s.device if isinstance(h_s, Tensor) else torch.device("cpu")
    check_side("student", h_s, student, device)
    check_side("teacher", h_t, teacher, device)
    if h_s.shape[:-1] != h_t.shape[:-1]:
        raise ValueError(
            f"student_hidden has leading shape {tuple(h_s.shape[:-1])}, teacher_hidden "
            f"{tuple(h_t.shape[:-1])}; row i of both must predict the same response token"
        )
    if student.valid_size != teacher.valid_size:
        raise ValueError(
            f"student_head has {student.valid_size} valid tokens and teacher_head {teacher.valid_size}; "
            "both models must share one vocabulary. If the larger one is padded, pass "
            "LMHead(weight, vocab_size=<number of real tokens>)"
        )
    if student.group is not teacher.group:
        raise ValueError(
            "student_head and teacher_head have different groups; both must be sharded over the same ranks in the "
            "same slices, or neither"
        )
    return h_s.shape[:-1]


def check_projection(projection: str) -> str:
    if projection not in PROJECTIONS:
        raise ValueError(f"projection is {projection!r}; expected one of {', '.join(map(repr, PROJECTIONS))}")
    return projection


def check_temperature(temperature: float) -> float:
    if not is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}; it must be a positive number")
    return float(temperature)


def check_resources(workspace_bytes: int | None, backend: str) -> tuple[int | None, str]:
    if workspace_bytes is not None and not (is_number(workspace_bytes) and 1 <= workspace_bytes < 2**63):
        raise ValueError(f"workspace_bytes is {workspace_bytes!r}; it must be a positive number, or None for a default")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    return None if workspace_bytes is None else int(workspace_bytes), backend


def check_others(
    temperature: float = 1.0, backend: str = "auto", workspace_bytes: int | None = None, projection: str = "auto"
) -> None:
    """What `fused_linear_divergence` takes besides a divergence. Raises ValueError."""
    check_temperature(temperature)
    check_resources(workspace_bytes, backend)
    check_projection(projection)


def triton_can_run(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the Triton kernels can run, otherwise why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32, not float64"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {device.type}, Triton runs on cuda (or, for tests, with TRITON_INTERPRET=1)"
    return None


def native_can_run(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the compiled CPU library can run, otherwise why not."""
    if not native.available():
        return f"the CPU library is {native.status()}"
    if dtype == torch.float64:
        return "the CPU library computes in float32, not float64"
    if device.type != "cpu":
        return f"tensors are on {device.type}, the CPU library runs on cpu"
    return None


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "torch", "triton" or "native" for what the caller asked for.

    Raises ValueError when a backend is asked for that cannot run here.
    """
    if backend == "torch":
        return backend
    if backend == "auto":
        if device.type == "cuda" and triton_can_run(device, dtype) is None:
            return "triton"
        return "native" if native_can_run(device, dtype) is None else "torch"
    reason = (triton_can_run if backend == "triton" else native_can_run)(device, dtype)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot run: {reason}; use backend='torch' or 'auto'")
    return backend


def flat_weights(token_weights: Tensor | None, leading: torch.Size, device: torch.device) -> Tensor | None:
    """token_weights as (N,) on the device, after checking that they are one constant per token."""
    if token_weights is None:
        return None
    if not isinstance(token_weights, Tensor) or token_weights.shape != leading:
        shape = tuple(token_weights.shape) if isinstance(token_weights, Tensor) else type(token_weights).__name__
        raise ValueError(f"token_weights is {shape}; expected a tensor of shape {tuple(leading)}, one per token")
    if token_weights.requires_grad:
        raise ValueError("token_weights requires grad, but is treated as a constant; pass token_weights.detach()")
    if token_weights.is_complex():
        raise ValueError(f"token_weights has dtype {token_weights.dtype}; expected bool or float")
    return token_weights.reshape(-1).to(device)


def flat_ids(token_ids: Tensor, leading: torch.Size, device: torch.device) -> Tensor:
    """token_ids as (N,) int64 on the device, after checking that they are one integer per position."""
    numbers = isinstance(token_ids, Tensor) and not (token_ids.is_floating_point() or token_ids.is_complex())
    integers = numbers and token_ids.dtype != torch.bool
    if not integers or token_ids.shape != leading:
        kind = f"{token_ids.dtype} {tuple(token_ids.shape)}" if isinstance(token_ids, Tensor) else type(token_ids)
        raise ValueError(f"token_ids is {kind}; expected integers of shape {tuple(leading)}, one per position")
    return token_ids.reshape(-1).to(device, torch.int64).contiguous()


def check_reduction(reduction: str, denominator: float | Tensor | None) -> tuple[str, float, Tensor | None]:
    """(reduction, factor, denominator) as the operator takes them: a number becomes the factor of a sum, a tensor
    stays one."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(map(repr, REDUCTIONS))}")
    if denominator is None:
        return reduction, 1.0, None
    if reduction != "mean":
        raise ValueError(f"denominator is given but reduction is {reduction!r}; it only applies to 'mean'")
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1 or denominator.is_complex():
            raise ValueError(f"denominator is {denominator}; expected a number or a real scalar tensor")
        if denominator.requires_grad:
            raise ValueError("denominator requires grad, but is treated as a constant; pass denominator.detach()")
        return reduction, 1.0, denominator
    if not is_number(denominator) or not 0 < denominator < math.inf:
        raise ValueError(f"denominator is {denominator!r}; it must be a positive number")
    return "sum", 1.0 / float(denominator), None


def check_finite(sides: dict[str, tuple[Tensor, LMHead]], token_weights: Tensor | None) -> None:
    """Raise ValueError naming the first row with a NaN or an infinity. A bias may be -inf: it forbids a token.

    sides: name prefix ("student_", …) -> hidden states (N, D) and head.
    """
    active = None if token_weights is None else token_weights.nonzero().squeeze(1)
    if token_weights is not None:
        _first_bad("token_weights", "entry", token_weights.isfinite(), None)
    for prefix, (rows, _) in sides.items():
        used = rows if active is None else rows[active]
        _first_bad(f"{prefix}hidden", "row", used.isfinite().all(dim=-1), active)
    for prefix, (_, head) in sides.items():
        size = head.valid_size
        _first_bad(f"{prefix}head.weight", "vocabulary row", head.weight[:size].isfinite().all(dim=-1), None)
        if head.bias is not None:
            bias = head.bias[:size]
            _first_bad(f"{prefix}head.bias", "entry", bias.isfinite() | (bias == -math.inf), None)


def check_logits(name: str, logits: Tensor, token_weights: Tensor | None) -> None:
    """Raise ValueError naming the first row (N, V) with a NaN or +inf. A logit of -inf forbids a token."""
    active = None if token_weights is None else token_weights.nonzero().squeeze(1)
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
