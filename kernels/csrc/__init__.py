"""The kernels in C++, and `native.py`, which loads and calls them."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.kernels.csrc import native

__getattr__, __dir__, __all__ = door(__name__)
