"""Log-probabilities of given tokens from hidden states, differentiable, without the logits of more than a few rows."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor

from opcd_fast.loss.chunks import Spec, Wanted, refuse_capture, sharding
from opcd_fast.loss.heads import LMHead
from opcd_fast.loss.inputs import as_head, check_finite, check_resources, check_side, check_temperature, flat_ids
from opcd_fast.loss.operators import LinearLogprobs


def fused_linear_logprobs(
    hidden: Tensor,
    head: LMHead | Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """log p(token) of one token per position, differentiable in hidden states, head weight and bias.

    hidden: (..., D). head: `LMHead` or a bare (V, D) weight. token_ids: (...,) integers; a negative id (-100 by
    custom) marks a position that costs nothing, may hold anything and gets 0. temperature divides the logits.
    workspace_bytes and backend as in `fused_linear_reverse_kl`. The logits are recomputed in backward.

    A token of probability 0 has log-probability -inf and gradient 0.

    Returns (...,) float32 (float64 with float64 inputs), natural logarithms.

    Raises ValueError, naming the argument and what would be right.
    """
    head = as_head(head, "head")
    check_side("", hidden, head, hidden.device if isinstance(hidden, Tensor) else torch.device("cpu"))
    leading = hidden.shape[:-1]
    if head.group is not None:
        raise ValueError("head is sharded over a group, which log-probabilities do not support; gather it first")
    h, ids = hidden.reshape(-1, hidden.shape[-1]), flat_ids(token_ids, leading, hidden.device)
    refuse_capture(h.device, "fused_linear_logprobs")
    weight, bias = sharding.whole(head.weight), sharding.whole(head.bias)
    assert weight is not None
    check = os.environ.get("OPCD_CHECK") == "1"
    if check:
        check_finite({"": (h, replace(head, weight=weight, bias=bias))}, ids >= 0)
    # On a device looking would synchronise; there such a token has probability 0.
    if (check or not ids.is_cuda) and not torch.compiler.is_compiling() and bool((ids >= head.valid_size).any()):
        raise ValueError(f"token_ids holds {int(ids.max())}; the head has {head.valid_size} tokens")
    spec = Spec(
        head.valid_size, *check_resources(workspace_bytes, backend), scale_s=float(head.scale), softcap_s=head.softcap,
        temperature=check_temperature(temperature), keep=not torch.compiler.is_compiling(),
    )  # fmt: skip
    wanted = Wanted.of(torch.is_grad_enabled(), h, weight, bias)
    return LinearLogprobs.apply(h, weight, bias, ids, spec, wanted).reshape(leading)
