"""Other libraries' fused reverse KL: the mean over rows of (h_s, w_s, h_t, w_t), whose gradients autograd gets.

Nothing of theirs is part of this repository and none is needed: each loader imports what the machine has, and
raises `Missing` with the reason where it has not, which becomes a row "skipped" in the table.

Which are exact, read from the versions named here and checked by the gradient error that stands in the same row:

- TRL 1.16 (`ChunkedDivergenceFunction`, beta = 1): float32 logits from bf16 inputs on every device. Exact.
- Liger-Kernel 0.8.5, fused (`LigerFusedLinearJSDFunction`, jsd_beta = 1; Triton): float32 logits on CUDA devices
  of compute capability 8 and up, so dL/dh is exact there. By default dL/dW is summed over its chunks in the
  weight's dtype.
- Liger-Kernel 0.8.5, chunked (`LigerFusedLinearJSDLoss`, beta = 1; torch.compile): logits in the inputs' dtype,
  so inexact in bf16. It computes dL/dW for a frozen head too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TRL_ALIAS = "_benchmarked_trl"


class Missing(Exception):
    """A peer that this machine cannot run; the message is the reason."""


def trl(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    divergence, _entropy = load_trl().apply(h_s, w_s, None, h_t, w_t, None, 1.0)
    return divergence.mean()


def liger_fused(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    return load_liger("ops.fused_linear_jsd", "LigerFusedLinearJSDFunction").apply(h_s, w_s, h_t, w_t, None, 1.0)


def liger_chunked(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    # Chunks and compilation are its defaults; the soft loss alone is the mean reverse KL.
    loss = load_liger("chunked_loss.jsd_loss", "LigerFusedLinearJSDLoss")(0.0, 1.0, beta=1.0)
    return loss(h_s, w_s, h_t, w_t, torch.zeros(len(h_s), dtype=torch.long, device=h_s.device))  # no label is ignored


@functools.cache
def load_trl() -> Any:
    """TRL's autograd function, from its own files but without TRL's package: importing that takes datasets,
    accelerate and more, and seconds, of which the function needs nothing.

    The one name it takes from there, a context that gathers weights sharded by DeepSpeed ZeRO-3 and does
    nothing otherwise, is a context that does nothing.
    """
    folder = _folder("trl")
    if not (folder / "kernels" / "chunked_divergence.py").exists():
        raise Missing("this trl has no kernels/chunked_divergence.py (it came with 1.16)")
    for name in ("", ".kernels", ".trainer", ".trainer.utils"):  # packages whose __init__.py does not run
        package = types.ModuleType(_TRL_ALIAS + name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[package.__name__] = package
    package.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()  # type: ignore[attr-defined]
    try:
        module = importlib.import_module(f"{_TRL_ALIAS}.kernels.chunked_divergence")
    except ImportError as error:
        raise Missing(f"trl: {error}") from None
    return module.ChunkedDivergenceFunction


@functools.cache
def load_liger(module: str, name: str) -> Any:
    _folder("liger_kernel")
    try:
        return getattr(importlib.import_module(f"liger_kernel.{module}"), name)
    except ImportError as error:
        raise Missing(f"liger_kernel: {error}") from None


def liger_fused_is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    if dtype == torch.float32:
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def why_not(name: str, device: torch.device) -> str | None:
    """The reason why an implementation cannot run here, or None."""
    try:
        if name == "trl":
            load_trl()
        elif name == "liger-fused":
            _folder("liger_kernel")
            if device.type != "cuda":
                raise Missing("Liger-Kernel's fused loss is a Triton kernel and needs a GPU")
            load_liger("ops.fused_linear_jsd", "LigerFusedLinearJSDFunction")
        elif name == "liger-chunked":
            load_liger("chunked_loss.jsd_loss", "LigerFusedLinearJSDLoss")
        if name == "liger-chunked" or name.startswith("compile-"):
            _compiler(device)
    except Missing as missing:
        return str(missing)
    except Exception as error:  # noqa: BLE001 - whatever their import raises is a row, not the end of the table
        return f"{name} does not load: {type(error).__name__}: {error}"[:300]
    return None


def _compiler(device: torch.device) -> None:
    """torch.compile needs a C++ compiler for CPU kernels, and Triton a C compiler for GPU ones."""
    if not any(shutil.which(compiler) for compiler in ("g++", "clang++", "gcc", "clang")):
        raise Missing("torch.compile needs a C++ compiler, and none is on PATH")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise Missing("torch.compile needs Triton on a GPU, and it is not installed")


def _folder(package: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Missing(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])
