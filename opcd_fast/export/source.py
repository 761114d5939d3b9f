"""What is to be exported: the trained weights of a run, or a folder of weights, and what belongs to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opcd_fast.errors import InputError
from opcd_fast.models import (
    is_quantized,
    load_model,
    load_settings,
    load_tokenizer,
    pick_dtype,
    quantize_4bit,
    require_bitsandbytes,
    with_adapter,
)
from opcd_fast.runtime import read_object

CHOICES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Trained weights on disk. base: name of the model under an adapter, None for a whole model."""

    folder: Path
    base: str | None
    settings: dict[str, Any]
    """config.json of the run, empty for a bare folder."""
    trust_remote_code: bool = False

    @property
    def is_adapter(self) -> bool:
        return self.base is not None

    @property
    def trained_in_4bit(self) -> bool:
        return self.settings.get("quantization") == "4bit"


def find_source(run: str | Path, model: str | None = None, trust_remote_code: bool = False) -> Source:
    """`run` is the output folder of a run, or a folder that holds an adapter or a model itself.

    model: where the base of an adapter is now; None: where its adapter_config.json says.
    Raises InputError: no trained weights there, or a `model` for weights that have no base.
    """
    root = Path(run).expanduser()
    if not root.is_dir():
        raise InputError(f"run {str(run)!r} does not exist; give the output folder of `opcd train`")
    settings: dict[str, Any] = {}
    folder = root
    if (root / "checkpoints").is_dir() or (root / "final").is_dir():
        folder = root / "final"
        if not folder.is_dir():
            raise InputError(f"run {str(run)!r} has no final/ (the trained weights); finish it with --resume")
        settings = read_object(root / "config.json") if (root / "config.json").is_file() else {}
    elif root.parent.joinpath("checkpoints").is_dir() and (root.parent / "config.json").is_file():
        settings = read_object(root.parent / "config.json")  # RUN/final itself
    if (folder / "adapter_config.json").is_file():
        base = model or read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise InputError(f"adapter {str(folder)!r} does not name its base; give it with --model")
        return Source(folder, base, settings, trust_remote_code)
    if "model_type" not in (read_object(folder / "config.json") if (folder / "config.json").is_file() else {}):
        raise InputError(f"{str(folder)!r} holds no adapter and no model; give the output folder of `opcd train`")
    if model is not None:
        raise InputError(f"model={model!r}: {str(folder)!r} is a whole model and needs no base; drop it")
    return Source(folder, None, settings, trust_remote_code)


def load_source(source: Source, device: str, unpack: bool) -> Any:
    """The trained model in float32 (exact for weights of any type), with its adapter in place, in eval mode.

    unpack: 4-bit weights under an adapter come back as the float32 numbers that they stood for in training.
    Raises InputError where something cannot be loaded.
    """
    if source.base is None:
        return load_model(source.folder, dtype="float32", device=device, trust_remote_code=source.trust_remote_code)
    if unpack and source.trained_in_4bit:
        base = _unpacked_again(source, device)
    else:
        base = load_model(source.base, dtype="float32", device=device, trust_remote_code=source.trust_remote_code)
        if hasattr(base, "peft_config"):
            raise InputError(f"base {source.base!r} is an adapter itself; merge that one into its base first")
        if unpack and is_quantized(base):
            base = dequantized(base)
    return with_adapter(base, source.folder).eval()


def _unpacked_again(source: Source, device: str) -> Any:
    """Rounding to 4 bits has one result, so the weights that the adapter was trained on can be made again."""
    assert source.base is not None
    setting = "dequantize"
    require_bitsandbytes(setting)
    dtype = source.settings.get("dtype") or "auto"
    base = load_model(source.base, dtype=dtype, device=device, trust_remote_code=source.trust_remote_code)
    place = next(base.parameters()).device
    if not is_quantized(base):
        base = quantize_4bit(base, place, pick_dtype(dtype, place), setting)
    return dequantized(base)


@torch.no_grad()
def dequantized(model: Any) -> Any:
    """A 4-bit model (bitsandbytes) with its packed layers replaced by float32 layers of the same numbers, in place."""
    from opcd_fast.models import unmark_4bit

    bnb = require_bitsandbytes("dequantize")
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, bnb.nn.Linear4bit):
                continue
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(weight.float(), requires_grad=False)
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.float(), requires_grad=False)
            setattr(parent, name, plain)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            raise InputError("dequantize: some weights are packed otherwise than by bitsandbytes to 4 bits")
        parameter.data = parameter.data.float()
    unmark_4bit(model)
    return model.eval()


def stored_dtype(source: Source) -> torch.dtype:
    """Type of the weights on disk: of the base under an adapter, else of the model. float32 where it is not said."""
    settings = load_settings(source.folder if source.base is None else source.base, source.trust_remote_code)
    found = getattr(settings, "dtype", None)
    return found if isinstance(found, torch.dtype) and found in CHOICES.values() else torch.float32


def tokenizer_of(source: Source) -> Any:
    """The tokenizer that was saved with the weights, or the base's."""
    if (source.folder / "tokenizer_config.json").is_file() or source.base is None:
        return load_tokenizer(source.folder, source.trust_remote_code)
    return load_tokenizer(source.base, source.trust_remote_code)
