"""The optional CPU library: whether it is there, why not, and its kernels.

The library (kernels/csrc) is plain C on raw pointers, called through ctypes, which releases the GIL meanwhile.

Threads are those of the OpenMP runtime that torch has loaded, found by the name of its entry point. A pool of our
own, or a second OpenMP runtime, would wait for cores on which torch's idle threads still spin after the GEMM
before, and torch's threads for ours. Where torch brings no such runtime the library starts threads for each call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from opcd_fast.kernels.reference import Logits

ABI = 6
LEVELS = ("portable", "avx2", "avx512", "avx512bf16")  # numbered as in native.cpp; each includes those before it
LEVEL_VARIABLE = "OPCD_NATIVE_LEVEL"  # forces one of them
BF16_DOT_LEVEL = "avx512bf16"


class RowsCall(ctypes.Structure):
    """`opcd::RowsCall` of kernels/csrc/calls.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("z_s", "z_t", "bias_s", "bias_t", "row_weights", "statistics")),
        ("gradient", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_int64) for name in ("stride_s", "stride_t", "stride_gradient", "stride_statistics")),
        *((name, ctypes.c_float) for name in ("inner_s", "inner_t", "outer_s", "outer_t", "derivative")),
        *((name, ctypes.c_float) for name in ("parameter", "remainder")),
        ("divergence", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in ("bf16_s", "bf16_t", "bf16_gradient", "softcap_s", "softcap_t")),
        *((name, ctypes.c_int32) for name in ("all_statistics", "total_variation_gate")),
    )


class ProductCall(ctypes.Structure):
    """`opcd::ProductCall` of kernels/csrc/calls.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("h", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "width", "stride_h", "stride_weight", "stride_out")),
    )


def library_path() -> Path | None:
    for name in ("libopcd_native.so", "libopcd_native.dylib", "libopcd_native.dll"):
        path = Path(__file__).parents[2] / name
        if path.is_file():
            return path
    return None


@functools.cache
def _open(path: Path) -> ctypes.CDLL | str:
    """The library, or why it cannot be used."""
    try:
        library = ctypes.CDLL(str(path))
        found = int(library.opcd_native_abi())
        if found != ABI:
            return f"unusable: its ABI is {found}, this version needs {ABI}; reinstall opcd-fast"
        library.opcd_native_use_openmp.restype = None
        library.opcd_native_use_openmp.argtypes = (ctypes.c_void_p,)
        for name, call in (("divergence_rows", RowsCall), ("product", ProductCall)):
            function = getattr(library, f"opcd_native_{name}")
            function.argtypes = (ctypes.POINTER(call), ctypes.c_int, ctypes.c_int)
    except (OSError, AttributeError) as error:
        return f"unusable: {error}; reinstall opcd-fast"
    return library


def _openmp_of_torch() -> int | None:
    """Address of GOMP_parallel. `import torch` makes its OpenMP runtime global; LLVM's runtime has this entry too."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, TypeError, AttributeError):  # TypeError: Windows has no handle for the whole process
        return None


@functools.cache
def _with_threads(path: Path) -> ctypes.CDLL | str:
    import torch  # noqa: F401 (before its OpenMP runtime is looked for)

    library = _open(path)
    if not isinstance(library, str):
        library.opcd_native_use_openmp(_openmp_of_torch())
    return library


def _library() -> ctypes.CDLL:
    path = library_path()
    library = "not built" if path is None else _with_threads(path)
    if isinstance(library, str):
        raise RuntimeError(f"the CPU library is {status()}")
    return library


def available() -> bool:
    """Whether the kernels below can be called."""
    try:
        _library()
    except (ImportError, RuntimeError):
        return False
    return True


def status() -> str:
    """One line: "built, ABI 6, avx512", or what is missing and how to get it."""
    path = library_path()
    if path is None:
        tools = {"CMake": shutil.which("cmake"), "a C++ compiler": shutil.which("c++") or shutil.which("g++")}
        missing = [name for name, where in tools.items() if where is None]
        if missing:
            return f"not built: {' and '.join(missing)} missing (apt-get install cmake g++), then reinstall"
        return "not built: reinstall opcd-fast (pip install --no-build-isolation --force-reinstall --no-deps .)"
    library = _open(path)
    if isinstance(library, str):
        return library
    best = [name for number, name in enumerate(LEVELS) if library.opcd_native_has_level(number)][-1]
    return f"built, ABI {ABI}, {best}"


def supported_levels() -> tuple[str, ...]:
    """The instruction sets that both this build and this CPU have, the best one last."""
    library = _library()
    return tuple(name for number, name in enumerate(LEVELS) if library.opcd_native_has_level(number))


def level() -> str:
    """The instruction set that runs: the best, or what OPCD_NATIVE_LEVEL says.

    Raises ValueError when that is not one of those supported here.
    """
    forced, supported = os.environ.get(LEVEL_VARIABLE, ""), supported_levels()
    if forced and forced not in supported:
        raise ValueError(f"{LEVEL_VARIABLE} is {forced!r}; this CPU and this build have {', '.join(supported)}")
    return forced or supported[-1]


def divergence_rows(
    student: Logits,  # z (n, V) float32 or bf16, unit column stride; bias float32
    teacher: Logits,
    row_weights: Tensor,  # (n,) float32
    statistics: Tensor,  # (6, n) float32
    gradient: Tensor | None,  # (n, V) float32 or bf16; may be the student's z, but no other view of the logits' memory
    *,
    divergence: str = "reverse_kl",
    parameter: float = 0.0,
    gate: str = "kl",
    all_statistics: bool = True,
    scratch: Tensor | None = None,  # the reference's; unused
) -> None:
    """`reference.divergences.divergence_rows` on the CPU; the logits survive unless the gradient is the student's z.

    The result does not depend on the number of threads (torch.get_num_threads()). A row that holds NaN has NaN
    statistics and gradient.

    Raises ValueError for an unknown divergence or gate, a parameter outside (0, 1) where one is needed, and a tensor of
    another dtype, layout or device; RuntimeError without the library, or where it does not know the divergence.
    """
    import torch

    from opcd_fast.kernels.reference import row_of

    row = row_of(divergence, parameter, gate)
    rows, columns = student.z.shape
    logit_dtypes = (torch.float32, torch.bfloat16)
    fields: dict[str, Any] = {}
    for name, side in (("s", student), ("t", teacher)):
        z, bias = side.z, side.bias
        _check(f"z_{name}", z, (rows, columns), logit_dtypes)
        if bias is not None:
            _check(f"bias_{name}", bias, (columns,), (torch.float32,))
        inner, outer = side.inner_and_outer()
        fields |= {
            f"z_{name}": z.data_ptr(), f"bias_{name}": None if bias is None else bias.data_ptr(),
            f"stride_{name}": z.stride(0), f"bf16_{name}": z.dtype == torch.bfloat16,
            f"inner_{name}": inner, f"outer_{name}": outer, f"softcap_{name}": side.softcap is not None,
        }  # fmt: skip
    _check("row_weights", row_weights, (rows,), (torch.float32,))
    _check("statistics", statistics, (6, rows), (torch.float32,))
    if gradient is not None:
        _check("gradient", gradient, (rows, columns), logit_dtypes)
        fields |= {
            "gradient": gradient.data_ptr(), "stride_gradient": gradient.stride(0),
            "bf16_gradient": gradient.dtype == torch.bfloat16,
        }  # fmt: skip
    if rows == 0:
        return
    call = RowsCall(
        **fields, rows=rows, columns=columns, row_weights=row_weights.data_ptr(), statistics=statistics.data_ptr(),
        stride_statistics=statistics.stride(0), derivative=student.derivative, parameter=parameter,
        remainder=1.0 - parameter, divergence=row.code, all_statistics=all_statistics,
        total_variation_gate=gate == "tv",
    )  # fmt: skip
    _run("divergence_rows", call, level())


def project_bf16(
    h: Tensor,  # (n, D) bf16, unit column stride
    weight: Tensor,  # (V, D) bf16, unit column stride
    out: Tensor,  # (n, V) float32, unit column stride; written
) -> None:
    """out = h @ weight.T with float32 accumulation.

    Fast where `has_bf16_dot()`; elsewhere the same blocking multiplies in float32. An element's value depends on
    its own row and column alone, not on n, V or the number of threads.

    Raises ValueError for a tensor of another dtype, layout or device, RuntimeError without the library.
    """
    import torch

    _check("h", h, tuple(h.shape), (torch.bfloat16,))
    _check("weight", weight, (weight.shape[0], h.shape[1]), (torch.bfloat16,))
    _check("out", out, (h.shape[0], weight.shape[0]), (torch.float32,))
    chosen = level()
    if chosen == BF16_DOT_LEVEL and not _bf16_dot_is_right():
        chosen = LEVELS[LEVELS.index(BF16_DOT_LEVEL) - 1]
    _project(h, weight, out, chosen)


def has_bf16_dot() -> bool:
    """Whether `project_bf16` uses this CPU's bf16 dot product (AVX512-BF16), which must have passed a self-check."""
    return available() and level() == BF16_DOT_LEVEL and _bf16_dot_is_right()


@functools.cache
def _bf16_dot_is_right() -> bool:
    """Compare it with float32 arithmetic, once: it was written on a machine that lacks the instruction."""
    import torch

    g = torch.Generator().manual_seed(0)
    h = torch.randn(29, 75, generator=g).bfloat16()  # no dimension is a multiple of the blocking
    weight = torch.randn(83, 75, generator=g).bfloat16()
    found = torch.empty(29, 83)
    _project(h, weight, found, BF16_DOT_LEVEL)
    exact = h.float() @ weight.float().t()
    return float((found - exact).norm()) < 1e-5 * float(exact.norm())


def _project(h: Tensor, weight: Tensor, out: Tensor, chosen: str) -> None:
    call = ProductCall(
        h=h.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(),
        rows=h.shape[0], columns=weight.shape[0], width=h.shape[1],
        stride_h=h.stride(0), stride_weight=weight.stride(0), stride_out=out.stride(0),
    )  # fmt: skip
    _run("product", call, chosen)


def _run(name: str, call: ctypes.Structure, chosen: str) -> None:
    import torch

    failed = getattr(_library(), f"opcd_native_{name}")(
        ctypes.byref(call), LEVELS.index(chosen), torch.get_num_threads()
    )
    if failed:
        raise RuntimeError(f"the CPU library's {name} failed with code {failed} at level {chosen}")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    right_layout = tensor.stride(-1) == 1 or tensor.shape[-1] == 1 if tensor.dim() else False
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device.type != "cpu" or not right_layout:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}; "
            f"expected {expected} {shape} with unit stride in the last dimension on cpu"
        )
