"""A finished run as a folder that other programs load: an adapter, or one model with the adapter folded in.

The folder is written beside its place, loaded again from there, compared with the trained model, and only then renamed:
what has the name is whole, and computes what was trained.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opcd_fast.errors import InputError
from opcd_fast.export.card import card_of, write_card
from opcd_fast.export.fidelity import LogitError, Probe, compare, logits_of, probe, require_equal
from opcd_fast.export.options import ExportOptions
from opcd_fast.export.source import CHOICES, Source, find_source, load_source, stored_dtype, tokenizer_of
from opcd_fast.models import first_line, load_settings, resolve, seam
from opcd_fast.rollout import stop_token_ids
from opcd_fast.runtime import check_replaceable, write_folder


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    kind: str
    """"adapter", "merged" or "model"."""
    dtype: str
    bytes: int
    """Of all files together."""
    shards: int
    """Files of weights."""
    comparison: LogitError
    has_card: bool


def export(
    run: str | Path,
    output_dir: str | Path,
    options: ExportOptions | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write the trained weights of `run` (a run's folder, or a folder of weights) as a new folder `output_dir`.

    Needs memory for one copy of the weights in float32. told: gets a line for each part as it begins.
    Raises InputError: nothing to export, `output_dir` exists, settings that contradict each other, a base in 4 bits
    without `dequantize`, a type that loses what was trained, or files that do not compute what was trained. Nothing is
    left in `output_dir` then.
    """
    options = options or ExportOptions()
    source, target = find_source(run, options.model, options.trust_remote_code), Path(output_dir).expanduser()
    refuse(source, target, options)
    card = card_of(source.folder)  # a stale card must not cost the loading of a model
    told("loading the trained model in float32")
    model = load_source(source, options.device, unpack=options.merged)
    asked = probe(model)
    dtype = _dtype_of(source, options)
    name = str(dtype).removeprefix("torch.")
    done: list[LogitError] = []

    def fill(folder: Path) -> None:
        nonlocal model
        tokenizer = tokenizer_of(source)
        _end_tokens(model, tokenizer, source)
        if options.merged:
            told("folding the adapter in")
            model = merged(model)
            # Before rounding: apart from the order of summation this is the trained model.
            require_equal(compare(logits_of(model, asked.ids), asked), torch.float32, "the model with the adapter in")
        told(f"writing {name}")
        _write_model(model, folder, source, options, dtype)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's form to be filled in
        if card is not None:
            write_card(folder, card, adapter=source.is_adapter and not options.merged)
        model = None
        gc.collect()
        told("loading what was written, and comparing its logits")
        done.append(_compared(folder, source, options, asked, dtype))

    write_folder(target, fill)
    files = [path for path in target.iterdir() if path.is_file()]
    shards = [path for path in files if path.suffix == ".safetensors"]
    kind = "merged" if options.merged else "adapter" if source.is_adapter else "model"
    size = sum(path.stat().st_size for path in files)
    return Exported(target, kind, name, size, len(shards), done[0], card is not None)


def refuse(source: Source, target: Path, options: ExportOptions) -> None:
    """Raises InputError for what can be seen before anything is loaded."""
    inside = source.folder.resolve()
    for path in source.folder.rglob("*"):
        real = path.resolve()  # the Hub's cache links a snapshot's files to its blobs
        if not real.is_relative_to(inside) and real.parent != inside.parent.parent / "blobs":
            raise InputError(
                f"{str(path)!r} is a link to {str(real)!r}, which is not the run's and would be exported; put a copy "
                "in its place, or remove it"
            )
    check_replaceable(target, "output_dir=")
    if target.exists() and any(target.iterdir()):
        raise InputError(f"output_dir={str(target)!r} exists already; choose another folder, or remove it")
    if options.dtype != "auto" and options.dtype not in CHOICES:
        raise InputError(f"dtype={options.dtype!r} is unknown; use 'auto', {', '.join(map(repr, CHOICES))}")
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", options.max_shard_size):
        raise InputError(f"max_shard_size={options.max_shard_size!r} must be a number and a unit, such as '5GB'")
    if options.dequantize and not options.merged:
        raise InputError("dequantize: only a merged model needs it; add --merged, or drop it")
    if options.base_name is not None and (options.merged or not source.is_adapter):
        raise InputError(f"base_name={options.base_name!r} is written into adapters, this is a whole model; drop it")
    if not options.merged:
        return
    if not source.is_adapter:
        raise InputError(f"merged: {str(source.folder)!r} is a whole model already; drop --merged")
    _refuse_unmergeable(source.folder)
    assert source.base is not None
    stored = load_settings(source.base, source.trust_remote_code)
    packed = source.trained_in_4bit or getattr(stored, "quantization_config", None) is not None
    if packed and not options.dequantize:
        raise InputError(
            "merged: the adapter was trained on a base in 4 bits, and the base's full weights with it would be another "
            "model; add --dequantize to merge into the 4-bit weights unpacked (16 bits each on disk), or export the "
            "adapter without --merged"
        )
    if options.dequantize and not packed:
        raise InputError("dequantize: the base is not in 4 bits; drop it")


def _refuse_unmergeable(folder: Path) -> None:
    from peft import PeftConfig

    try:
        settings = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise InputError(f"adapter {str(folder)!r} cannot be loaded: {error}") from error
    if settings.is_prompt_learning:
        raise InputError(
            "merged: this adapter is a trained prefix, which no weight can take in; export it without --merged"
        )


def merged(model: Any) -> Any:
    """The base with its adapters folded into float32 weights, in place. Raises InputError where peft cannot."""
    try:
        return model.merge_and_unload(safe_merge=True).eval()
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise InputError(f"merged: {first_line(error)}; export the adapter without --merged") from error


def _dtype_of(source: Source, options: ExportOptions) -> torch.dtype:
    if options.dtype != "auto":
        return CHOICES[options.dtype]
    return torch.float32 if source.is_adapter and not options.merged else stored_dtype(source)


def _end_tokens(model: Any, tokenizer: Any, source: Source) -> None:
    """Into the generation settings: other programs end an answer where the run did."""
    lm: Any = seam.causal_lm(model)
    ids = stop_token_ids(tokenizer, lm, tuple(source.settings.get("stop_tokens") or ()))
    if ids and lm.generation_config is not None:
        lm.generation_config.eos_token_id = list(ids) if len(ids) > 1 else ids[0]


def _write_model(model: Any, folder: Path, source: Source, options: ExportOptions, dtype: torch.dtype) -> None:
    if not (source.is_adapter and not options.merged):
        for parameter in model.parameters():  # not the buffers: RoPE's frequencies are fp32 in a model of any type
            parameter.data = parameter.data.to(dtype)
        model.save_pretrained(folder, max_shard_size=options.max_shard_size)
        return
    adapter = next(iter(model.peft_config.values()))
    adapter.base_model_name_or_path = options.base_name or base_for_others(source)
    # An adapter on linear layers leaves the embeddings alone; "auto" would ask the hub whether it did.
    model.save_pretrained(folder, save_embedding_layers=False)
    if dtype != torch.float32:
        _round_file(folder / "adapter_model.safetensors", dtype)
    generation: Any = seam.causal_lm(model)
    if generation.generation_config is not None:
        generation.generation_config.save_pretrained(folder)


def _round_file(path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


def base_for_others(source: Source) -> str:
    """Name of the base that means the same from everywhere on this machine: a whole path, or a hub id."""
    assert source.base is not None
    place = resolve(source.base)
    return str(Path(place).resolve()) if Path(place).is_dir() else place


def _compared(folder: Path, source: Source, options: ExportOptions, asked: Probe, dtype: torch.dtype) -> LogitError:
    """What lies in `folder`, loaded as a user would, against the trained model. Raises InputError when it differs."""
    base = source.base if source.is_adapter and not options.merged else None
    again = load_source(replace(source, folder=folder, base=base), options.device, unpack=False)
    found = compare(logits_of(again, asked.ids), asked)
    require_equal(found, dtype, "what was written")
    return found
