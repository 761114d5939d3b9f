"""Autograd functions whose backward has no derivative of its own."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def first_order(backward: Any) -> Any:
    """A `backward` that raises RuntimeError where its gradients are to be differentiated (`create_graph=True`).

    torch's `once_differentiable` alone does where the upstream gradient requires grad, which that of a loss does not.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph=True: fused losses and attention have no second derivatives; use plain torch for them"
            )
        return once(ctx, *upstream)

    return checked
