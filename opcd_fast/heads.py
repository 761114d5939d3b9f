"""The language-model head as data: everything that stands between a hidden state and the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LMHead:
    """logits = softcap(scale * (h @ weight.T + bias)), softcap(x) = softcap * tanh(x / softcap).

    weight: (V, D). bias: (V,) or None. scale: Cohere's `logit_scale`, Granite's 1 / `logits_scaling`.
    softcap: Gemma-2's `final_logit_softcapping`, None for none. vocab_size: how many of the V rows are real
    tokens; rows beyond it are padding and have probability 0. None means all V.
    group: reserved for a head sharded over ranks; must be None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    group: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Tensor):
            raise TypeError(f"LMHead: weight is a {type(self.weight).__name__}; pass a (V, D) tensor")
        if self.weight.ndim != 2 or not self.weight.is_floating_point():
            raise ValueError(
                f"LMHead: weight has shape {tuple(self.weight.shape)} and dtype {self.weight.dtype}; "
                "it must be a floating-point matrix (V, D)"
            )
        rows = self.weight.shape[0]
        if self.bias is not None and tuple(self.bias.shape) != (rows,):
            raise ValueError(f"LMHead: bias has shape {tuple(self.bias.shape)}; weight has {rows} rows, so ({rows},)")
        if self.bias is not None and not self.bias.is_floating_point():
            raise ValueError(f"LMHead: bias has dtype {self.bias.dtype}; it must be floating point")
        if not math.isfinite(self.scale):
            raise ValueError(f"LMHead: scale is {self.scale}; it must be a finite number")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"LMHead: softcap is {self.softcap}; it must be a positive number, or None for none")
        if self.vocab_size is not None and not 1 <= self.vocab_size <= rows:
            raise ValueError(f"LMHead: vocab_size is {self.vocab_size}; weight has {rows} rows, so 1..{rows}")
        if self.group is not None:
            raise ValueError(
                "LMHead: group is set, but vocabulary-parallel heads are not supported yet; "
                "gather the whole weight on every rank and leave group=None"
            )

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

    @classmethod
    def from_model(cls, model: Any, vocab_size: int | None = None) -> LMHead:
        """The head of a transformers causal language model, PEFT-wrapped or not.

        Shares the model's tensors: gradients reach `model`. vocab_size as for `LMHead`; give it when the
        embedding matrix is padded.

        Raises ValueError when the model has no output embeddings, when they are quantised, or when an adapter
        sits on them (its contribution would be silently lost).
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        layer = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if layer is None:
            raise ValueError(
                f"LMHead.from_model: {type(base).__name__} has no output embeddings; pass a causal language "
                "model (…ForCausalLM), or build LMHead(weight=…) yourself"
            )
        if hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save"):
            raise ValueError(
                "LMHead.from_model: a PEFT adapter sits on the model's output embeddings, and a fused loss "
                "cannot see it; remove the head (usually 'lm_head') from target_modules and "
                "modules_to_save, or call model.merge_and_unload() first"
            )
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                f"LMHead.from_model: the output embeddings are a {type(layer).__name__} without a "
                "floating-point (V, D) weight (quantised?); load the model with its head unquantised"
            )
        scale, softcap = _logit_transform(base)
        return cls(weight, getattr(layer, "bias", None), scale, softcap, vocab_size)


def _logit_transform(model: Any) -> tuple[float, float | None]:
    """(scale, softcap) that the model's forward applies after its output embeddings, read from its config.

    Granite divides by `logits_scaling`, HyperCLOVA X multiplies by the attribute of the same name.
    """
    config = getattr(model, "config", None)
    if config is None:
        return 1.0, None
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    model_type = getattr(text, "model_type", "") or ""
    softcap = getattr(text, "final_logit_softcapping", None)
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale *= float(getattr(text, name, None) or 1.0)
    scaling = float(getattr(text, "logits_scaling", None) or 1.0)
    scale = scale * scaling if model_type.startswith("hyperclovax") else scale / scaling
    return scale, None if softcap is None else float(softcap)
