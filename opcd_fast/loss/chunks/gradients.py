"""The gradients of the student's side, collected chunk by chunk, and where dW goes when it is not returned."""

from __future__ import annotations

import torch
from torch import Tensor

from opcd_fast.loss.chunks import sharding
from opcd_fast.loss.chunks.products import Weight, add_weight_gradient, hidden_gradient, scale_
from opcd_fast.loss.chunks.rows import Rows, refuse_capture
from opcd_fast.loss.chunks.spec import Spec, Wanted
from opcd_fast.loss.chunks.workspace import Side, returned_dtype


class Gradients:
    """Of rows.factor * sum(row_weights * D): dH (N, D), dW (V, D) and db (V,), each None where it is not wanted.

    into: where dW is added, in float32, instead of being returned.
    """

    def __init__(
        self, side: Side, rows: Rows, spec: Spec, wanted: Wanted, dtype: torch.dtype, into: Tensor | None = None
    ) -> None:
        device, shape = side.h.device, side.weight.shape
        self.side, self.factor, self.group, self.into = side, rows.factor, spec.group, into
        self.hidden: Tensor | None = None
        self.weight = into if wanted.weight else None
        self.bias = torch.zeros(shape[0], dtype=dtype, device=device) if wanted.bias else None
        self.fresh = wanted.weight and into is None  # dW holds nothing yet
        if wanted.hidden:
            self.hidden = torch.zeros(side.h.shape, dtype=returned_dtype(side.h.dtype), device=device)
        if wanted.weight and into is None:
            # Its first chunk writes it whole but for the padding: a (V, D) of zeros would be a pass for nothing.
            self.weight = torch.empty(shape, dtype=dtype, device=device)
            self.weight[spec.vocab_size if rows.count > 0 else 0 :].zero_()
        # A factor that is a number rides on the product. One on the device waits for the upstream gradient, unless dW
        # is added to somebody's running sum.
        self.weight_factor = 1.0 if into is None and isinstance(rows.factor, Tensor) else float(rows.factor)

    def add(self, g: Tensor, h: Tensor, weight: Weight, chosen: slice | Tensor) -> None:
        """What these rows of the call give. g: (m, V); h: (m, D) as multiplied."""
        v = g.shape[1]
        if self.hidden is not None:
            part = hidden_gradient(g, h, weight)
            if self.group:
                sharding.sum_(part, self.group)  # in float32, before it is rounded
            scale_(part, self.factor)  # after the last product, so that G keeps its range
            self.hidden[chosen] = part.to(self.hidden.dtype)
        if self.weight is not None:
            add_weight_gradient(self.weight[:v], g, h, weight, self.weight_factor, fresh=self.fresh)
            self.fresh = False
        if self.bias is not None:
            self.bias[:v].add_(g.sum(dim=0, dtype=self.bias.dtype))

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dH, dW, db): dW as it was added up, without a factor that is a tensor; the others in the type of what they
        belong to, rounded once."""
        dw = None if self.into is not None else self.weight
        if self.bias is None or self.side.bias is None:
            return self.hidden, dw, None
        scale_(self.bias, self.factor)
        return self.hidden, dw, self.bias.to(returned_dtype(self.side.bias.dtype))


def placeholder(weight: Tensor) -> Tensor | None:
    """The gradient to return for a weight whose gradient has been added already.

    Megatron's protocol: its data-parallel hook runs on any gradient, and a set `grad_added_to_main_grad` tells it that
    the numbers in it mean nothing.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight, requires_grad=False)


def accumulation_target(weight: Tensor, reduction: str, denominator: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`weight.main_grad` (Megatron's float32 buffer), else a float32 `weight.grad`, made here if there is none.

    Raises ValueError where adding to it in forward would give another gradient than backward does.
    """
    if reduction == "none" or (reduction == "mean" and denominator is None):
        raise ValueError(
            "accumulate_weight_grad=True needs reduction='sum', or reduction='mean' with denominator=: the gradient "
            "is added in forward, when nothing later may change its scale"
        )
    if not weight.is_leaf or type(weight) not in (Tensor, torch.nn.Parameter):
        raise ValueError(
            "accumulate_weight_grad=True needs student_head.weight to be the parameter itself, not a cast, a view or "
            "a DTensor of it; its gradient has nowhere else to go"
        )
    if dtype == torch.float64:
        raise ValueError("accumulate_weight_grad=True adds in float32, but some input is float64; pass False")
    refuse_capture(weight.device, "accumulate_weight_grad=True")
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise ValueError(
            "accumulate_weight_grad=True inside a backward pass (activation checkpointing recomputes the loss) would "
            "add dW twice; call the loss outside the checkpointed region"
        )
    target = getattr(weight, "main_grad", None)
    name = "weight.main_grad"
    if target is None:
        name = "weight.grad"
        if weight.grad is None and weight.dtype == torch.float32:
            weight.grad = torch.zeros_like(weight)
        target = weight.grad
    if target is None or target.dtype != torch.float32 or target.shape != weight.shape or not target.is_contiguous():
        found = "missing" if target is None else f"{target.dtype} of shape {tuple(target.shape)}"
        raise ValueError(
            f"accumulate_weight_grad=True: {name} is {found}; it must be a contiguous float32 tensor of shape "
            f"{tuple(weight.shape)}. Set weight.main_grad = torch.zeros_like(weight, dtype=torch.float32) and let the "
            "optimizer read it"
        )
    return target
