"""How one call of a fused loss cuts its scratch memory: which buffers, which dtypes, how many rows at a time.

Functions of the shapes, the dtypes, `workspace_bytes` and the kind of device, never of free memory: the same call
always does the same arithmetic in the same order. Nor does the number of rows matter once they fill a chunk, so that
micro-batches of different sizes ask the allocator for the same blocks.

On a device there are two levels: the logits of a few rows, and G of several such chunks. The product G W has few
output tiles, because a hidden state is narrow: over the rows of one logit chunk it would occupy a fraction of the
multiprocessors. (The other products are as wide as the vocabulary.) So G is collected over as many rows as fill whole
waves of tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opcd_fast.loss.chunks.spec import Spec, Wanted

GIB = 1 << 30
DEFAULT_WORKSPACE = GIB
# dW is read and written once per gradient chunk, so chunks are larger.
DEFAULT_WORKSPACE_WITH_DW = 5 * GIB // 2
# On a device, with any gradient. A wave over 132 multiprocessors needs 4,224 rows of G where D is 1,024, which are 1.3
# GB of 151,936 and 2.2 GB of 256,000 tokens; up to 1,024 rows of logits come on top. At these vocabularies that is at
# least nine tenths of every wave for D from 1,024 to 4,096 on up to 148 multiprocessors. Wider models take 1.5 to 2.5
# GB of it.
DEFAULT_DEVICE_WORKSPACE = 3 * GIB
PITCH = 64  # elements; row starts stay 128-byte aligned in 2-byte buffers, whatever V is
GRADIENT_CHUNKS = 4  # gradient chunk / logit chunk, where the workspace is too small for whole tiles

TILE_ROWS, TILE_COLUMNS = 128, 256  # what a multiprocessor computes of a large bf16 product at a time
GOOD_FILL = 0.9  # of the multiprocessors, over the waves of a product
# Rows of logits, in tiles: 512 if that leaves room for a full wave; 256, with which reading the head already takes as
# long as multiplying with it; 128 if there is room for nothing else. Up to 1,024; more bring nothing.
LOGIT_TILES = (4, 2, 1)
MOST_LOGIT_TILES = 8
FROZEN_GRADIENT_TILES = 8  # so that logit chunks are not kept small
TRAINED_GRADIENT_TILES = 32  # dW's sum, in float32, is read and written once for so many
# By compute capability, as NVIDIA's architecture papers give them: A100, RTX 4090, H100 and H200, B200, RTX PRO 6000.
MULTIPROCESSORS = {(8, 0): 108, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 188}
ASSUMED_CAPABILITY = (9, 0)  # for plans that are made where no device is


class Side(NamedTuple):
    """One model's half of the products."""

    h: Tensor  # (n, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)

    def valid(self, v: int, dtype: torch.dtype) -> Side:
        """Its head's first v rows, with the bias in the compute type."""
        bias = None if self.bias is None else self.bias[:v].to(dtype).contiguous()
        return Side(self.h, self.weight[:v], bias)


class Plan(NamedTuple):
    """How scratch is cut. In rows, but for tile (vocabulary rows of a weight upcast at once) and nbytes (of it all)."""

    logit_rows: int
    gradient_rows: int
    block_rows: int
    tile: int
    nbytes: int


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def returned_dtype(dtype: torch.dtype) -> torch.dtype:
    """How a gradient is kept until the upstream gradient is known: a loss scaler's 65536 would come too late for
    one that was rounded to fp16."""
    return torch.float32 if dtype == torch.float16 else dtype


def runs_native(side: Side) -> bool:
    """Whether one GEMM can read both as they are and write float32. Only bf16 on a device: cuBLAS gives bf16
    inputs a float32 output, CPU libraries do not, and an fp16 gradient would underflow."""
    return side.h.is_cuda and side.h.dtype == side.weight.dtype == torch.bfloat16


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride() and a.shape == b.shape


def pitch_of(columns: int) -> int:
    return -(-columns // PITCH) * PITCH


def block_rows(v: int) -> int:
    """Rows whose elementwise work is done together by plain PyTorch: about 16 MB a buffer.

    Smaller blocks fit more caches, but each operation on a block is a parallel region, and where other
    processes want the same cores every region waits for a descheduled thread.
    """
    return max(4, (1 << 22) // v)


def upcast_tile(sides: list[Side], dtype: torch.dtype, v: int) -> tuple[int, int]:
    """(vocabulary rows of a weight that are upcast at a time, bytes of the buffers for that); v if none is."""
    cast: list[Side] = []
    for side in sides:
        known = any(same_memory(side.weight, other.weight) for other in cast)
        if not runs_native(side) and side.weight.dtype != dtype and not known:
            cast.append(side)
    if not cast:
        return v, 0
    # 16 MB of float32: few enough parallel regions, and mostly still in cache when the product reads it.
    elements = 1 << (24 if sides[0].h.is_cuda else 22)
    tile = min(v, max(256, elements // max(side.h.shape[-1] for side in sides) // 64 * 64))
    return tile, tile * sum(side.h.shape[-1] for side in cast) * dtype.itemsize


def multiprocessors_of(device: torch.device) -> int:
    """Of the device; where it is none, of the one that plans are made for."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return MULTIPROCESSORS[ASSUMED_CAPABILITY]


def output_tiles(rows: int, columns: int) -> int:
    return -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS)


def wave_fill(tiles: int, multiprocessors: int) -> float:
    """The part of the multiprocessors that have a tile, over the waves in which that many tiles are computed."""
    return tiles / (-(-tiles // multiprocessors) * multiprocessors)


def default_workspace(two_levels: bool, wanted: Wanted) -> int:
    if two_levels:
        return DEFAULT_DEVICE_WORKSPACE
    return DEFAULT_WORKSPACE_WITH_DW if wanted.weight else DEFAULT_WORKSPACE


def operand_width(width: int) -> int:
    """Columns of what is multiplied in float16: hidden state, two for a bias, one for the shift, a multiple of 8."""
    return -(-(width + 3) // 8) * 8


def _difference_bytes(student: Side, v: int, tile: int, fixed: int) -> tuple[int, int, int]:
    """(bytes in all, for a row of logits, and for one of G) of z', over which G is written, and d', in float16.

    Beside them lie the head in float16, both operands, and float32 copies from which they are made. A CPU multiplies
    tiles of the head in float32, has z', d' and z' - d' in float64 for its row operation, and G in float32.
    """
    width, pitch = student.h.shape[-1], pitch_of(v)
    wide = operand_width(width)
    fixed, logit_row, gradient_row = fixed + v * wide * 2, pitch * 2 + 2 * wide * 2 + 5 * width * 4, pitch * 2
    if not student.h.is_cuda:
        fixed += tile * wide * 4
        logit_row += 3 * v * 8 + wide * 4 + tile * 4
        gradient_row += v * 4
    return fixed, logit_row, gradient_row


def make_plan(
    rows: int, sides: list[Side], v: int, spec: Spec, wanted: Wanted, planes: int, multiprocessors: int,
    default: int | None = None,
) -> Plan:  # fmt: skip
    """Cut `workspace_bytes` into buffers.

    sides: the student first. v: columns of the logits. planes: (block, V) buffers that the row operation needs beside
    the logits. multiprocessors: of the device (`multiprocessors_of`); nothing depends on them on a CPU. default: bytes
    where the caller of the loss names none.

    Raises ValueError when the workspace does not hold one row.
    """
    dtype = compute_dtype(*(tensor for side in sides for tensor in side[:2]))
    size = dtype.itemsize
    pitch = pitch_of(v)
    student = sides[0]
    on_device = spec.backend == "triton" or student.h.is_cuda
    two_levels = spec.backend == "triton" and any(wanted)
    width_s = student.h.shape[-1]
    others = sum(side.h.shape[-1] for side in sides[1:])

    budget = spec.workspace_bytes
    if default is None:
        default = default_workspace(two_levels, wanted)
    tile, fixed = upcast_tile(sides, dtype, v)
    # A row of G is the student's hidden state, dH before and after its cast, and G where it has a buffer of its own.
    gradient_row = 3 * width_s * size
    if spec.projection == "difference":
        fixed, logit_row, more = _difference_bytes(student, v, tile, fixed)
        gradient_row += more
    else:
        # A logit row is a logit buffer a side and the teacher's hidden state.
        logit_row = (len(sides) * pitch + others) * size
        if has_gradient_buffer(student, dtype, spec, wanted):
            gradient_row += pitch * gradient_dtype(student, dtype).itemsize

    block_row = planes * v * size
    smallest = fixed + logit_row + gradient_row + block_row
    if budget is None:
        budget = max(smallest, default)
    if budget < smallest:
        raise ValueError(
            f"workspace_bytes is {budget}, too small for one row of {v} logits; "
            f"give at least {smallest} (bytes), or None for the default"
        )
    block = 0
    if block_row:
        spare = 1 + (budget - smallest) // block_row
        block = max(1, min(rows, block_rows(v), budget // 4 // block_row, spare))
    room = budget - fixed - block * block_row
    if two_levels:
        columns = output_tiles(1, width_s) if wanted.hidden else 0
        least = TRAINED_GRADIENT_TILES if wanted.weight else FROZEN_GRADIENT_TILES
        logit_rows, gradient_rows = _two_levels(room, logit_row, gradient_row, columns, least, multiprocessors)
    else:
        logit_rows = room // (logit_row + gradient_row)
        if on_device and logit_rows > TILE_ROWS:
            # Whole tiles: a last tile of a few rows costs as much as a full one.
            tiles = logit_rows // TILE_ROWS
            logit_rows = (tiles if any(wanted) else min(tiles, MOST_LOGIT_TILES)) * TILE_ROWS
        gradient_rows = logit_rows
    # Less than a chunk: as it is on a CPU, a power of two of tiles on a device, where every size is a block that the
    # allocator keeps.
    needed = TILE_ROWS << (-(-rows // TILE_ROWS) - 1).bit_length() if on_device else rows
    logit_rows, gradient_rows = min(logit_rows, needed), min(gradient_rows, needed)
    nbytes = fixed + block * block_row + logit_rows * logit_row + gradient_rows * gradient_row
    return Plan(logit_rows, gradient_rows, block, tile, nbytes)


def _two_levels(
    room: int, logit_row: int, gradient_row: int, columns: int, least: int, multiprocessors: int
) -> tuple[int, int]:
    """(logit rows, gradient rows) in so many bytes. columns: of output tiles of dH; 0 if it is not wanted. least: tiles
    of gradient rows that are wanted where there is room."""
    found: list[int] = []  # tiles of gradient rows
    for logit_tiles in LOGIT_TILES:
        most = (room - logit_tiles * TILE_ROWS * logit_row) // (TILE_ROWS * gradient_row)
        if most >= logit_tiles and not (found and logit_tiles == 1):
            found.append(_filling(most, least, columns, multiprocessors))
    if not found:
        logit_rows = room // (logit_row + GRADIENT_CHUNKS * gradient_row)
        return (logit_rows, GRADIENT_CHUNKS * logit_rows) if logit_rows > 0 else (1, 1)
    good = (tiles for tiles in found if columns == 0 or wave_fill(tiles * columns, multiprocessors) >= GOOD_FILL)
    tiles = next(good, found[-1])
    fit = (room - tiles * TILE_ROWS * gradient_row) // (TILE_ROWS * logit_row)
    chunks = -(-tiles // min(fit, MOST_LOGIT_TILES))
    return -(-tiles // chunks) * TILE_ROWS, tiles * TILE_ROWS


def _filling(most: int, least: int, columns: int, multiprocessors: int) -> int:
    """Tiles of rows, of `most` that fit, whose `columns` output tiles each fill waves well: the fewest from `least` on,
    else the most below, else what fills best."""
    if columns == 0:
        return min(most, least)
    ends = [wave * multiprocessors // columns for wave in range(1, most * columns // multiprocessors + 1)]
    whole = [tiles for tiles in ends if tiles > 0]  # the most in each number of waves
    good = [tiles for tiles in whole if wave_fill(tiles * columns, multiprocessors) >= GOOD_FILL]
    if good:
        return next((tiles for tiles in good if tiles >= least), good[-1])
    return max([most, *whole], key=lambda tiles: wave_fill(tiles * columns, multiprocessors))


def gradient_dtype(student: Side, dtype: torch.dtype) -> torch.dtype:
    """The dtype of G = d(sum)/d(logits): bf16 where the GEMMs that consume it read bf16, else the logits'."""
    return torch.bfloat16 if runs_native(student) else dtype


def has_gradient_buffer(student: Side, dtype: torch.dtype, spec: Spec, wanted: Wanted) -> bool:
    """Whether G is stored beside the logits instead of over them.

    Over them is safe where G has the logits' dtype: every element is overwritten by what has read it last. A
    2-byte G over 4-byte logits would need a barrier between the reads and the writes of a row, and on a device G holds
    more rows than the logits.
    """
    return any(wanted) and (gradient_dtype(student, dtype) != dtype or spec.backend == "triton")
