"""Attention over a packed row and over a shared prefix, forward and backward."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.attention import backends
    from opcd_fast.attention.dispatch import PackedCall
    from opcd_fast.attention.rows import KeysAndValues, PackedRow, PrefixGroup, on_device, packed_row, row_of
    from opcd_fast.attention.sdpa import sdpa_without_cudnn
    from opcd_fast.attention.shapes import flash_shapes
    from opcd_fast.attention.steps import Visible, step_attention
    from opcd_fast.attention.tree import TreeCall, TreeRow, tree_row

__getattr__, __dir__, __all__ = door(__name__)
