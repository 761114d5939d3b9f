"""Where a head's weight gradient is accumulated when it is not returned."""

from __future__ import annotations

import torch
from torch import Tensor

from opcd_fast.loss.chunks.rows import refuse_capture


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
