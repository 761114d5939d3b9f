"""The buffers of one call, cut from a single block of memory, which a device keeps for the next call.

A workspace is large. Were it given back after each call, activations of the next micro-batch would be put where it was,
and there would be no room for it in one piece again: PyTorch's allocator moves nothing.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from opcd_fast.loss.chunks.rows import capturing

ALIGNMENT = 512  # bytes, as the allocator's own blocks
SHARE = 20  # a block is kept if it is at most this part of the memory that the process may use
HUGE_PAGES = 14  # MADV_HUGEPAGE

_kept: dict[tuple[torch.device, int], Tensor] = {}  # by device and stream


@contextmanager
def borrowed(
    device: torch.device, *wanted: tuple[tuple[int, ...], torch.dtype], keep: bool
) -> Iterator[list[Tensor]]:
    """Tensors of these shapes and dtypes, which hold anything, until it is left.

    While it is entered the block is nobody else's: a call in another thread gets one of its own, and so does one on
    another stream, which would not wait for this one's kernels. After an error nothing is kept, nor from a call that a
    CUDA graph captures, whose replays go on writing there.
    """
    nbytes = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted]
    sizes = [-(-size // ALIGNMENT) * ALIGNMENT for size in nbytes]
    place = _place(device, sum(sizes)) if keep else None
    block = None if place is None else _kept.pop(place, None)
    if block is None or len(block) < sum(sizes):
        block = None  # before its successor is made
        block = _block(sum(sizes), device)
    parts = block[: sum(sizes)].split(sizes)
    yield [
        part[:size].view(dtype).view(shape) for part, size, (shape, dtype) in zip(parts, nbytes, wanted, strict=True)
    ]
    if place is not None and len(block) >= len(_kept.get(place, ())):
        _kept[place] = block


def release_workspace() -> None:
    """Give back the memory that the fused losses keep on CUDA devices between calls: of each device and stream the
    workspace of its largest call, where that is at most a twentieth of the memory that the process may use.

    The next call allocates it again. Call it before something else that needs the room.
    """
    _kept.clear()


def _place(device: torch.device, nbytes: int) -> tuple[torch.device, int] | None:
    """Under what a block of so many bytes is kept; None where it is not."""
    if device.type != "cuda" or capturing(device):
        return None
    allowed = torch.cuda.get_per_process_memory_fraction(device)
    if nbytes * SHARE > allowed * torch.cuda.get_device_properties(device).total_memory:
        return None
    return device, torch.cuda.current_stream(device).cuda_stream


def _block(nbytes: int, device: torch.device) -> Tensor:
    block = torch.empty(nbytes, dtype=torch.uint8, device=device)
    if device.type == "cpu" and sys.platform == "linux":
        # In pages of 2 MB, where the system has them: to be handed one of 4 kB takes as long as to fill it three times.
        start = -(-block.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = max(0, block.data_ptr() + nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), HUGE_PAGES)
    return block
