"""Which kernel runs each part of attention on a packed row: a table, decided by what a call needs.

On the CPU every entry has been run. The entries for CUDA follow the contracts in the kernels' sources; their order
(fastest first) is that of published measurements, none of which was repeated here. An entry whose contract a call does
not meet is never taken, and the teacher's check at first use runs the chosen ones on the model's own device, dtype and
head size.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opcd_fast.attention import kernels, shapes

FA2, FA4 = "FlashAttention-2", "FlashAttention-4"
_HALF = (torch.float16, torch.bfloat16)


class Kernel(NamedTuple):
    name: str
    run: Callable[..., Any]


@dataclass(frozen=True)
class Need:
    """What a call asks of a kernel."""

    device: str  # "cpu", "cuda", …
    capability: tuple[int, int]  # (0, 0) for devices other than CUDA
    dtype: torch.dtype
    head_size: int
    softcap: bool = False
    gradient: bool = False  # through the output
    lse_gradient: bool = False  # through the logsumexp too
    dropout: bool = False

    @property
    def half_on_cuda(self) -> bool:
        """What all flash kernels for CUDA ask: half precision, compute capability 8, head sizes in eights."""
        return self.device == "cuda" and self.capability >= (8, 0) and self.dtype in _HALF and self.head_size % 8 == 0


def need_of(
    query: Tensor, *others: Tensor, softcap: float | None = None, dropout: float = 0.0, with_lse: bool = False
) -> Need:
    """The facts of a call with `query` (1, H, N, d); `others` may want gradients as well.

    with_lse: the caller goes on to differentiate through the logsumexp.
    """
    device = query.device
    capability = torch.cuda.get_device_capability(device) if query.is_cuda else (0, 0)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, *others))
    return Need(
        device=device.type,
        capability=capability,
        dtype=query.dtype,
        head_size=query.shape[-1],
        softcap=softcap is not None,
        gradient=gradient,
        lse_gradient=gradient and with_lse,
        dropout=dropout > 0.0,
    )


@functools.cache
def installed() -> frozenset[str]:
    """Optional packages that import here: FlashAttention-4 (flash_attn.cute), FlashAttention-2 (flash_attn)."""
    found = set()
    for name, module in ((FA4, "flash_attn.cute"), (FA2, "flash_attn")):
        with contextlib.suppress(Exception):  # whatever a broken build raises means: not there
            package = importlib.import_module(module)
            _ = package.flash_attn_func, package.flash_attn_varlen_func
            found.add(name)
    return frozenset(found)


def phase_1(need: Need, packages: frozenset[str] | None = None) -> Kernel:
    """The kernel for all queries against a prefix; it has no gradient but for "blocked".

    packages: see `installed`, which is the default. On CUDA: unmeasured.
    """
    packages = installed() if packages is None else packages
    if shapes.only_shapes():
        return Kernel("shapes", shapes.attend)
    if need.gradient or need.lse_gradient:
        return Kernel("blocked", kernels.prefix_blocked)
    if need.device == "cpu" and not need.softcap:
        return Kernel("CPU flash", kernels.prefix_cpu_flash)
    if need.device == "cuda":
        # Not cuDNN's, whose plans hold for exact sizes: the sum of lengths differs from call to call.
        if not need.softcap and need.half_on_cuda and need.head_size <= 256:
            return Kernel("flash", kernels.prefix_flash)
        if FA4 in packages and _fa4_takes(need):
            return Kernel(FA4, kernels.prefix_fa4)
        if FA2 in packages and _fa2_takes(need):
            return Kernel(FA2, kernels.prefix_fa2)
        if need.softcap and _flex_takes(need):
            return Kernel("flex", kernels.prefix_flex)
        if not need.softcap and need.dtype != torch.float64:
            return Kernel("memory-efficient", kernels.prefix_efficient)
    return Kernel("blocked", kernels.prefix_blocked)


def phase_2(need: Need, packages: frozenset[str] | None = None) -> Kernel:
    """The kernel for causal attention inside the sequences of a row. On CUDA: unmeasured.

    Raises NotImplementedError for dropout together with a softcap.
    """
    if shapes.only_shapes():
        return Kernel("shapes", shapes.attend)
    varlen = _varlen(need, packages, sinks=need.lse_gradient)
    if varlen is not None:
        return Kernel(varlen.name, kernels.row_varlen(varlen.run))
    if need.lse_gradient:
        return Kernel("blocked", kernels.row_blocked)
    if need.device in ("cpu", "cuda") and not need.softcap and need.dtype != torch.float64:
        return Kernel("CPU flash" if need.device == "cpu" else "memory-efficient", kernels.row_on_grid)
    if need.softcap and not need.gradient and _flex_takes(need):
        return Kernel("flex", kernels.row_flex)
    return Kernel("blocked", kernels.row_blocked)


def windowed(need: Need, packages: frozenset[str] | None = None, *, with_lse: bool = False) -> Kernel:
    """The kernel for layers whose window cuts keys off: one call for the row, or ("dense", "blocked") one for each
    sequence. Its `run` is a varlen kernel, or for the other two not called. On CUDA: unmeasured."""
    varlen = _varlen(need, packages, sinks=with_lse)
    if varlen is not None:
        return varlen
    blocked = need.softcap or with_lse or need.lse_gradient
    return Kernel("blocked" if blocked else "dense", kernels.blocked_attention)


def merge(need: Need) -> str:
    """ "Triton" on CUDA where nothing wants a gradient, else "torch"."""
    plain = not need.gradient and not need.lse_gradient and need.dtype != torch.float64
    return "Triton" if need.device == "cuda" and plain and _triton_ready() else "torch"


def _varlen(need: Need, packages: frozenset[str] | None, *, sinks: bool) -> Kernel | None:
    if need.dropout and (need.softcap or sinks):
        raise NotImplementedError("packed attention has no dropout together with capped scores or sinks")
    packages = installed() if packages is None else packages
    if need.dropout or need.lse_gradient or not need.half_on_cuda:
        return None
    if not need.softcap and need.head_size <= 256 and kernels.varlen_ready():
        return Kernel("varlen", kernels.varlen_torch)
    if FA4 in packages and not need.gradient and _fa4_takes(need):
        return Kernel(FA4, kernels.varlen_fa4)
    if FA2 in packages and _fa2_takes(need):
        return Kernel(FA2, kernels.varlen_fa2)
    return None


def _fa4_takes(need: Need) -> bool:
    """As its `_validate_head_dims` says for capability 9 and 10; where it checks nothing, what all chips have."""
    return need.half_on_cuda and need.head_size <= (256 if need.capability[0] == 9 else 128)


def _fa2_takes(need: Need) -> bool:
    return need.half_on_cuda and need.head_size <= 256


def _flex_takes(need: Need) -> bool:
    """Triton's matrix product needs 16 columns; fp64 has none."""
    kinds = (*_HALF, torch.float32)
    return need.device == "cuda" and need.capability >= (8, 0) and 16 <= need.head_size <= 256 and need.dtype in kinds


@functools.cache
def _triton_ready() -> bool:
    return importlib.util.find_spec("triton") is not None


def describe(need: Need, *, windows: bool, sinks: bool, packages: frozenset[str] | None = None) -> str:
    """One line: what runs each part of a call that `need` describes."""
    softcap = ", with softcap" if need.softcap else ""
    text = f"phase 1 {phase_1(need, packages).name}, phase 2 {phase_2(need, packages).name}{softcap}"
    text += f", merge {merge(need)}{' with sinks' if sinks else ''}"
    if windows:
        name = windowed(need, packages, with_lse=sinks).name
        text += f"; windowed layers: {name + ' per sequence' if name in ('dense', 'blocked') else name}"
    return text
