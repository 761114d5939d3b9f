"""What is to be exported: the trained weights of a run, or a folder of weights, and what belongs to them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opcd_fast.errors import InputError
from opcd_fast.models import (
    first_line,
    is_quantized,
    load_model,
    load_tokenizer,
    pick_dtype,
    quantize_4bit,
    require_bitsandbytes,
    resolve,
)

CHOICES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Trained weights on disk. base: name of the model under an adapter, None for a whole model."""

    folder: Path
    base: str | None
    settings: dict[str, Any]
    """config.json of the run, empty for a bare folder."""

    @property
    def is_adapter(self) -> bool:
        return self.base is not None

    @property
    def trained_in_4bit(self) -> bool:
        return self.settings.get("quantization") == "4bit"


def find_source(run: str | Path, model: str | None = None) -> Source:
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
        settings = _json(root / "config.json") if (root / "config.json").is_file() else {}
    elif root.parent.joinpath("checkpoints").is_dir() and (root.parent / "config.json").is_file():
        settings = _json(root.parent / "config.json")  # RUN/final itself
    if (folder / "adapter_config.json").is_file():
        base = model or _json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise InputError(f"adapter {str(folder)!r} does not name its base; give it with --model")
        return Source(folder, base, settings)
    if "model_type" not in (_json(folder / "config.json") if (folder / "config.json").is_file() else {}):
        raise InputError(f"{str(folder)!r} holds no adapter and no model; give the output folder of `opcd train`")
    if model is not None:
        raise InputError(f"model={model!r}: {str(folder)!r} is a whole model and needs no base; drop it")
    return Source(folder, None, settings)


def load_source(source: Source, device: str, unpack: bool) -> Any:
    """The trained model in float32 (exact for weights of any type), with its adapter in place, in eval mode.

    unpack: 4-bit weights under an adapter come back as the float32 numbers that they stood for in training.
    Raises InputError where something cannot be loaded.
    """
    if source.base is None:
        return load_model(source.folder, dtype="float32", device=device)
    if unpack and source.trained_in_4bit:
        base = _unpacked_again(source, device)
    else:
        base = load_model(source.base, dtype="float32", device=device)
        if hasattr(base, "peft_config"):
            raise InputError(f"base {source.base!r} is an adapter itself; merge that one into its base first")
        if unpack and is_quantized(base):
            base = dequantized(base)
    return with_adapter_of(base, source.folder)


def with_adapter_of(base: Any, folder: str | Path) -> Any:
    """PEFT around `base` with the adapter in `folder`. Raises InputError when it does not fit."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, str(folder)).eval()
    except Exception as error:  # whatever a library raises over these files is about these files
        raise InputError(f"adapter {str(folder)!r} cannot be loaded: {first_line(error)}") from error


def _unpacked_again(source: Source, device: str) -> Any:
    """Rounding to 4 bits has one result, so the weights that the adapter was trained on can be made again."""
    assert source.base is not None
    setting = "dequantize"
    require_bitsandbytes(setting)
    dtype = source.settings.get("dtype") or "auto"
    base = load_model(source.base, dtype=dtype, device=device)
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
    from transformers import AutoConfig

    name = source.base if source.base is not None else str(source.folder)
    found = getattr(AutoConfig.from_pretrained(resolve(name)), "dtype", None)
    return found if isinstance(found, torch.dtype) and found in CHOICES.values() else torch.float32


def tokenizer_of(source: Source) -> Any:
    """The tokenizer that was saved with the weights, or the base's."""
    if (source.folder / "tokenizer_config.json").is_file() or source.base is None:
        return load_tokenizer(source.folder)
    return load_tokenizer(source.base)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{str(path)!r} must hold a JSON object")
    return value
