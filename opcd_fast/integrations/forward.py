"""What every trainer's integration needs: hidden states without logits, heads, and the loss between them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from opcd_fast.errors import InputError
from opcd_fast.loss import PARAMETERS, LMHead, check_divergence, check_others, fused_linear_divergence, unused_parameter
from opcd_fast.models import seam
from opcd_fast.training.step import present_head

Result = TypeVar("Result")


def inside_forward(wrapped: nn.Module, inner: nn.Module, function: Callable[[], Result]) -> Result:
    """`function()`, run where `inner`'s forward would run when `wrapped` (DDP or another wrapper of it) is called.

    A wrapper gathers parameters and prepares the reduction of gradients around the forward it is asked for; a body that
    is called beside it would train every process by itself. Without a wrapper this is `function()`.
    """
    if wrapped is inner:
        return function()
    own = vars(inner).get("forward")  # accelerate's mixed precision leaves one on the instance

    def put_back() -> None:
        if own is None:
            vars(inner).pop("forward", None)
        else:
            inner.forward = own

    def stand_in(*args: Any, **kwargs: Any) -> Result:
        put_back()  # function may call inner, and LMHead.from_model looks at its forward
        return function()

    inner.forward = stand_in
    try:
        return wrapped()
    finally:
        put_back()


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, T) token ids -> (B, T, D): what the lm-head of `model` would read. The head itself is not run.

    Positions are those that the model's own forward takes for these arguments. Raises ValueError for PEFT methods that
    add virtual tokens, which a body alone leaves out.
    """
    seam.refuse_virtual_tokens(model)
    return seam.run_body(seam.body_of(model), input_ids, attention_mask=attention_mask)


class Heads:
    """`LMHead.from_model`, once per model: looking at a model's forward takes tens of milliseconds.

    plain: the forward to look at, of models whose class got another one, without logits.
    """

    def __init__(self, plain: Callable[..., Any] | None = None) -> None:
        self._plain = plain
        self._known: WeakKeyDictionary[nn.Module, LMHead] = WeakKeyDictionary()

    def __call__(self, model: nn.Module) -> LMHead:
        lm = seam.causal_lm(model)
        if lm not in self._known:
            with seam.holding([] if self._plain is None else [(type(lm), "forward", self._plain)]):
                self._known[lm] = LMHead.from_model(lm)
        return present_head(self._known[lm], lm)


def divergence(h_s: Tensor, head_s: LMHead, h_t: Tensor, head_t: LMHead, **options: Any) -> Any:
    """`fused_linear_divergence`; under autocast in the type in which the model's own lm-head would run."""
    kind = h_s.device.type
    if not torch.is_autocast_enabled(kind):
        return fused_linear_divergence(h_s, head_s, h_t, head_t, **options)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return fused_linear_divergence(h_s.to(dtype), head_s.to(dtype), h_t.to(dtype), head_t.to(dtype), **options)


def chosen_divergence(distillation: dict[str, Any], more: Collection[str] = ()) -> dict[str, Any]:
    """`distillation=` of a trainer: a divergence, its parameters, and `more`. Raises InputError for anything else."""
    known = ("divergence", *PARAMETERS, *more)
    unknown = distillation.keys() - set(known)
    if unknown:
        raise InputError(f"distillation has {', '.join(sorted(unknown))}; it takes {', '.join(known)}")
    parameters = {name: value for name, value in distillation.items() if name in PARAMETERS}
    try:
        check_divergence(distillation["divergence"], parameters)
        check_others(**{name: value for name, value in distillation.items() if name in more})
    except ValueError as error:
        raise InputError(f"distillation: {error}") from error
    unused = unused_parameter(distillation["divergence"], parameters)
    if unused is not None:
        raise InputError(f"distillation: {distillation['divergence']!r} has no {unused}; drop one of them")
    return distillation


def refuse_settings(trainer: Any) -> None:
    """InputError for settings of a `transformers.Trainer` with which the fused loss cannot work."""
    for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
        if callable(getattr(trainer, name, None)):  # TRL says "non-None value" in the last one
            raise InputError(f"{name} needs logits, which the fused loss does not make; leave it out")
    if getattr(trainer.args, "label_smoothing_factor", 0):
        raise InputError("label_smoothing_factor is for a loss on labels, which the fused loss is not; set it to 0")
    if getattr(trainer.args, "use_liger_kernel", False):
        raise InputError(
            "use_liger_kernel=True replaces the model's forward, so what its head does cannot be seen; set it to False "
            "(no logits are computed either way)"
        )
    processing = getattr(trainer, "processing_class", None)
    if hasattr(processing, "image_processor") or hasattr(processing, "feature_extractor"):
        raise InputError(
            f"processing_class is a {type(processing).__name__}: images and sound are not supported by the fused loss; "
            "pass the tokenizer of a text model"
        )


def refuse_sharding(trainer: Any) -> None:
    """InputError for engines that hold a model in pieces."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise InputError(f"{type(trainer).__name__} runs in one process or with DDP; switch FSDP or DeepSpeed off")
