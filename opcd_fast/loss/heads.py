"""The language-model head as data: everything that stands between a hidden state and the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opcd_fast.kernels.reference import is_number

# Quantised numbers, float8 among them, come with scales of their own beside.
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class LMHead:
    """logits = softcap(scale * (h @ weight.T + bias)), softcap(x) = softcap * tanh(x / softcap).

    weight: (V, D). bias: (V,) or None. scale: Cohere's `logit_scale`, Granite's 1 / `logits_scaling`.
    softcap: Gemma-2's `final_logit_softcapping`, None for none. vocab_size: how many of the V rows are real
    tokens; rows beyond it are padding and have probability 0. None means all V.
    group: process group over which the vocabulary is sharded; weight and bias are then this rank's slice of it, in rank
    order, and vocab_size counts the slice's tokens.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    group: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.weight, Tensor) and self.weight.numel() == 0 and hasattr(self.weight, "ds_shape"):
            raise ValueError(
                "LMHead: weight is partitioned by ZeRO-3 and empty on this rank; compute the loss inside "
                "deepspeed.zero.GatheredParameters([weight]) or inside the module's forward"
            )
        for name, value in (("scale", self.scale), ("softcap", self.softcap)):
            if not is_number(value) and (name, value) != ("softcap", None):
                what = "a tensor, and no gradient would reach it" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"LMHead: {name} is {what}; pass its number, float({name})")
        if not isinstance(self.weight, Tensor):
            raise TypeError(f"LMHead: weight is a {type(self.weight).__name__}; pass a (V, D) tensor")
        if self.weight.ndim != 2 or 0 in self.weight.shape or self.weight.dtype not in PLAIN:
            raise ValueError(
                f"LMHead: weight has shape {tuple(self.weight.shape)} and dtype {self.weight.dtype}; it must be a "
                "matrix (V, D) in float32, bf16, fp16 or float64 (multiply quantised weights with their scales first)"
            )
        rows = self.weight.shape[0]
        if self.bias is not None and not isinstance(self.bias, Tensor):
            raise TypeError(f"LMHead: bias is a {type(self.bias).__name__}; pass a tensor ({rows},), or None for none")
        if self.bias is not None and (tuple(self.bias.shape) != (rows,) or self.bias.dtype not in PLAIN):
            kind = f"shape {tuple(self.bias.shape)} and dtype {self.bias.dtype}"
            raise ValueError(f"LMHead: bias has {kind}; it must be ({rows},), as weight has rows, and floating point")
        if not abs(self.scale) < math.inf:  # comparisons are traced by torch.compile, isfinite is not
            raise ValueError(f"LMHead: scale is {self.scale}; it must be a finite number")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"LMHead: softcap is {self.softcap}; it must be a positive number, or None for none")
        if self.vocab_size is not None and not (type(self.vocab_size) is int and 1 <= self.vocab_size <= rows):
            raise ValueError(
                f"LMHead: vocab_size is {self.vocab_size!r}; weight has {rows} rows, so an integer in 1..{rows}"
            )
        if self.group is not None and not hasattr(self.group, "group_name"):
            raise ValueError(f"LMHead: group is a {type(self.group).__name__}; pass a torch.distributed ProcessGroup")

    @property
    def valid_size(self) -> int:
        """Number of rows that are tokens."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    def logits(self, hidden: Tensor) -> Tensor:
        """Plain logits (..., valid_size) of hidden (..., D), in the weight's dtype; differentiable.

        For sampling a token or checking a head against its model. The losses never call it.
        """
        size = self.valid_size
        bias = None if self.bias is None else self.bias[:size]
        out = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight[:size], bias)
        if self.scale != 1.0:
            out = out * self.scale
        if self.softcap is not None:
            out = torch.tanh(out / self.softcap) * self.softcap
        return out

    def to(self, dtype: torch.dtype) -> LMHead:
        """The same head with weight and bias of this type."""
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    @classmethod
    def from_model(cls, model: Any, vocab_size: int | None = None) -> LMHead:
        """The head of a transformers causal language model, PEFT-wrapped or not.

        It belongs to the hidden states `model.base_model(...).last_hidden_state`, and shares the model's tensors:
        gradients reach `model`. What the model's forward does around its output embeddings is not looked up but
        observed (see `_observe`), so an architecture this library has never heard of is either right or refused.
        vocab_size as for `LMHead`; give it when the embedding matrix is padded. The default is what the model's own
        forward keeps.

        Raises ValueError when the model has no output embeddings, when they are quantised, when an adapter sits on
        them (its contribution would be silently lost), and when logits are anything but
        softcap(scale * (h @ weight.T + bias)).
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base = getattr(base, "_orig_mod", base)  # looking at a compiled forward would compile it
        name = type(base).__name__
        if isinstance(base, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            raise ValueError(
                f"LMHead.from_model: {name} averages the gradients of what its own forward computes; compute the loss "
                "in the forward of the module that it wraps, and give the model there"
            )
        layer = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if layer is None:
            raise ValueError(
                f"LMHead.from_model: {name} has no output embeddings; pass a causal language "
                "model (…ForCausalLM), or build LMHead(weight=…) yourself"
            )
        if type(layer).__module__.startswith("peft."):
            raise ValueError(
                "LMHead.from_model: a PEFT adapter sits on the model's output embeddings, and a fused loss "
                "cannot see it; remove the head (usually 'lm_head') from target_modules and "
                "modules_to_save, or call model.merge_and_unload() first"
            )
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.dtype not in PLAIN:
            raise ValueError(
                f"LMHead.from_model: the output embeddings are a {type(layer).__name__} without a plain "
                "floating-point (V, D) weight (quantised?); load the model with its head unquantised"
            )
        if not isinstance(layer, torch.nn.Linear) or type(layer).forward is not torch.nn.Linear.forward:
            raise ValueError(
                f"LMHead.from_model: the output embeddings are a {type(layer).__name__}, whose output need not be "
                "h @ weight.T + bias; build LMHead(weight=…) yourself if it is"
            )
        try:
            before, scale, softcap, kept = _observe(base, layer)
            if before != 1.0 and bias is not None:
                raise ValueError(f"its hidden states are multiplied by {before:.6g} before a head that has a bias")
        except ValueError as error:
            raise ValueError(
                f"LMHead.from_model: the logits of {name} are not known to be softcap(scale·(h·Wᵀ + bias)): {error}. "
                "If you know them to be, build LMHead(weight=…, …) and compare its logits() with the model's"
            ) from error
        if vocab_size is None:
            vocab_size = None if kept == weight.shape[0] else kept
        elif vocab_size > kept:
            raise ValueError(f"LMHead.from_model: vocab_size is {vocab_size}, but {name} has logits for {kept} tokens")
        return cls(weight, bias, before * scale, softcap, vocab_size)


def same_vocabulary(student: LMHead, teacher: LMHead) -> tuple[LMHead, LMHead]:
    """Both heads over the same tokens: where one has more rows, the extra ones are padding.

    Models of one family pad the vocabulary of one tokenizer to different multiples (Qwen2.5: 151936 rows at 0.5B,
    152064 at 7B). That the models share a tokenizer is for the caller to know; then rows beyond the shorter head cannot
    be its tokens. Sizes alone cannot tell padding from another tokenizer, which is why the losses refuse unequal ones.
    """
    size = min(student.valid_size, teacher.valid_size)
    heads = (head if head.valid_size == size else replace(head, vocab_size=size) for head in (student, teacher))
    return next(heads), next(heads)


class _Stand(torch.nn.Module):
    """Stands in a model for one of its modules: `answer` is its forward, every other attribute is the module's."""

    def __init__(self, real: torch.nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "real", real)  # not as a child, which parameters() would count twice
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["real"], name)


class _BodyOutput(tuple):
    """A body's output that holds a last hidden state; whatever else a model looks for in it is None."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


@torch.no_grad()
def _observe(model: Any, layer: torch.nn.Linear) -> tuple[float, float, float | None, int]:
    """(factor on the hidden state, scale, softcap, logits kept) of a forward, from what it does to known numbers.

    For one call, stand-ins replace the body (it returns chosen hidden states) and the head (it notes its input and
    returns chosen logits). None of the model's layers runs and no weight is read, so this costs little at any size, and
    sharded weights do not matter. The transform follows from the slope at 0 and the limit at infinity, and is then
    checked on every number. Raises, ValueError or what the forward raises, when it is not one that LMHead can express.
    """
    rows, (V, D), device = 3, layer.weight.shape, layer.weight.device
    generator = torch.Generator().manual_seed(0)
    # Integers survive any cast on the way, and in float64 what is computed from them stays exact.
    hidden = torch.randint(-8, 9, (1, rows, D), generator=generator).double()
    spread = (torch.arange(V) - V // 2).double() / V
    spread = (spread * 2**20).round() / 2**20 + (spread == 0) * 2.0**-20
    chosen = spread * torch.tensor([2.0**-30, 2.0**5, 2.0**60]).double()[None, :, None]  # (1, rows, V)
    asked, seen = 0, []

    def body(*args: Any, **kwargs: Any) -> _BodyOutput:
        nonlocal asked
        asked += 1
        return _BodyOutput((hidden.to(device),))

    def head(x: Tensor) -> Tensor:
        seen.append(x)
        return chosen.to(device)

    # Which of them the forward calls differs: base_model is the model itself in some, get_decoder() lies inside it.
    bodies = (getattr(model, "base_model", None), getattr(model, "model", None), model.get_decoder())
    stand_ins = {id(b): _Stand(b, body) for b in bodies if isinstance(b, torch.nn.Module) and b is not model}
    stand_ins[id(layer)] = _Stand(layer, head)
    places = [(p, n, c) for p in model.modules() for n, c in p._modules.items() if id(c) in stand_ins]
    try:
        for parent, name, child in places:
            setattr(parent, name, stand_ins[id(child)])
        output = model.forward(input_ids=torch.zeros(1, rows, dtype=torch.long, device=device))
    except Exception as error:  # of any kind: it is the forward of a model that may be unknown
        where = "after its head" if seen else "between its hidden states and its head"
        raise ValueError(
            f"its forward does something {where} that could not be followed ({type(error).__name__}: {error})"
        ) from error
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)

    if asked != 1 or len(seen) != 1:
        raise ValueError(f"its forward calls its body {asked} times and its output embeddings {len(seen)} times")
    reached = seen[0].double().cpu()
    if reached.shape != hidden.shape:
        raise ValueError(f"its head reads {tuple(reached.shape)} where the hidden states are {tuple(hidden.shape)}")
    factor = float((reached * hidden).sum() / (hidden * hidden).sum())
    if factor == 0.0 or not torch.allclose(reached, factor * hidden, rtol=1e-5, atol=1e-5 * abs(factor)):
        raise ValueError("its hidden states are transformed before they reach the head")

    logits = (output.logits if hasattr(output, "logits") else output[0]).double().cpu()
    if logits.shape[:2] != (1, rows) or not 1 <= logits.shape[2] <= V:
        raise ValueError(f"its logits are {tuple(logits.shape)} for a head with {V} rows and {rows} tokens")
    kept = logits.shape[2]
    z = chosen[..., :kept]
    scale = float(logits[0, 0, 0] / z[0, 0, 0])
    limit = float(logits[0, 2].abs().max())
    softcap = limit if limit < 0.5 * abs(scale) * float(z[0, 2].abs().max()) else None
    expected = scale * z if softcap is None else torch.tanh(scale * z / softcap) * softcap
    if scale == 0.0 or not torch.allclose(logits, expected, rtol=1e-5, atol=0.0):
        raise ValueError("its logits are changed after the head in some other way")
    return factor, scale, softcap, kept
