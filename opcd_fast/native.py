"""The optional CPU library: whether it is there, and why not."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

ABI = 1


def library_path() -> Path | None:
    for name in ("libopcd_native.so", "libopcd_native.dylib", "libopcd_native.dll"):
        path = Path(__file__).parent / name
        if path.is_file():
            return path
    return None


def status() -> str:
    """One line: "built, ABI 1", or what is missing and how to get it."""
    path = library_path()
    if path is None:
        tools = {"CMake": shutil.which("cmake"), "a C++ compiler": shutil.which("c++") or shutil.which("g++")}
        missing = [name for name, where in tools.items() if where is None]
        if missing:
            return f"not built: {' and '.join(missing)} missing (apt-get install cmake g++), then reinstall"
        return "not built: reinstall opcd-fast (pip install --no-build-isolation --force-reinstall --no-deps .)"
    try:
        found = int(ctypes.CDLL(str(path)).opcd_native_abi())
    except (OSError, AttributeError) as error:
        return f"unusable: {error}; reinstall opcd-fast"
    if found != ABI:
        return f"unusable: its ABI is {found}, this version needs {ABI}; reinstall opcd-fast"
    return f"built, ABI {found} (no kernel in it yet: the CPU runs the torch backend)"
