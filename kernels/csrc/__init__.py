"""The kernels in C++, and `native.py`, which loads and calls them."""

from __future__ import annotations

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {},
    modules=("native",),
)
