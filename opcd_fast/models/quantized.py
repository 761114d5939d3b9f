"""Weights in 4 bits (NF4 of QLoRA, arXiv 2305.14314, through bitsandbytes): for teachers, and for bases under LoRA."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from opcd_fast.errors import InputError, pip_install
from opcd_fast.models import seam

logger = logging.getLogger("opcd_fast")


def is_quantized(model: Any) -> bool:
    """Whether some weights of `model` are packed, so that it cannot change its type."""
    lm: Any = seam.causal_lm(model)
    return bool(getattr(lm, "is_quantized", False)) or not all(p.is_floating_point() for p in lm.parameters())


def require_bitsandbytes(setting: str) -> Any:
    """The module. Raises InputError, naming `setting`, when it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"{setting} needs the package bitsandbytes: {pip_install('quant')}")
    import bitsandbytes

    return bitsandbytes


@torch.no_grad()
def quantize_4bit(model: Any, device: torch.device, dtype: torch.dtype, setting: str) -> Any:
    """Pack the linear layers of `model`'s body in place, one by one on `device`; returns the model there.

    Weights are rounded to NF4 in blocks of 64 whose scales are rounded to 8 bits in turn; products are computed in
    `dtype`, which everything else is cast to. Embeddings and the lm-head stay whole: the loss reads the head's weight.
    A model on the CPU never is on `device` unpacked. setting: its name, for errors.

    Raises InputError: bitsandbytes is missing, the model is packed already, or nothing in it can be.
    """
    bnb = require_bitsandbytes(setting)
    if is_quantized(model):
        raise InputError(f"{setting}, but the model is quantised already; drop the setting")
    lm: Any = seam.causal_lm(model)
    if lm is not model:
        raise InputError(f"{setting}, but the model carries an adapter; load its base quantised and the adapter on it")
    body, packed = seam.body_of(lm), 0
    whole = sum(p.numel() for p in body.parameters()) - body.get_input_embeddings().weight.numel()  # type: ignore
    for parent in list(body.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:  # a subclass may compute something else
                setattr(parent, name, _packed(bnb, layer, device, dtype))
                packed += layer.weight.numel()
    if not packed:
        raise InputError(f"{setting}, but {type(lm).__name__} has no torch.nn.Linear layers to pack; load it whole")
    if packed < whole / 2:
        logger.warning("%s: only %.0f %% of the weights are in linear layers and packed", setting, 100 * packed / whole)
    for parameter in lm.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    _mark_4bit(lm)
    keep_plain_layout(lm)
    return lm.to(device).requires_grad_(False)


def _packed(bnb: Any, layer: nn.Linear, device: torch.device, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype)
    weight = layer.weight.detach().to(dtype)
    new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new).to(device)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().to(device, dtype), requires_grad=False)
    return new.train(layer.training)


def keep_plain_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights in the first forward pass without gradients.

    On CPUs with AVX512-BF16 it rearranges them for a kernel that multiplies in bfloat16 whatever the compute type is,
    has no backward pass (a student that shares the layer would lose gradients without a word), and fails for widths
    that are not multiples of 64. Without it a packed model gives the same numbers on every CPU.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            layer.state_dict()  # puts the plain layout back where a forward has rearranged it already


def _mark_4bit(model: Any) -> None:
    """Set what transformers sets on a model that it loads packed by bitsandbytes.

    It then refuses casts of the model, and peft picks its layers for 4 bits.
    """
    from transformers.utils.quantization_config import QuantizationMethod

    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES


def unmark_4bit(model: Any) -> None:
    """Take back what marks a model as packed, after its weights were unpacked."""
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
        if name in vars(model):
            delattr(model, name)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    # How the packed files were read; saving turns around every conversion that is noted here, and this has no inverse.
    noted = getattr(model, "_weight_conversions", None)
    if noted:
        model._weight_conversions = [
            one
            for one in noted
            if not any(type(step).__module__.endswith("bitsandbytes") for step in getattr(one, "operations", ()))
        ]
