"""Statistics of the reverse KL from hidden states, at any N, with no logits in memory.

The mainloop of `dual_projection` with nothing stored but a few floats per row and tile of 128 columns, merged in
plain PyTorch. For evaluation and logging, and for a loss under `torch.no_grad`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opcd_fast.kernels import reference_dual

MERGE_PLANES = 9  # (n_tiles, n) temporaries of the merge, counted by hand: a share of scratch, not a hard bound
ROW_BLOCK = 128  # rows of one program: chunks are whole blocks


def linear_statistics(
    h_s: Tensor,  # (N, D_s)
    w_s: Tensor,  # (V, D_s)
    h_t: Tensor,  # (N, D_t)
    w_t: Tensor,  # (V, D_t)
    bias_s: Tensor | None,  # (V,) float32
    bias_t: Tensor | None,
    statistics: Tensor,  # (5, N) float32, written; see reference.STATISTICS
    *,
    scale_s: float,
    scale_t: float,
    softcap_s: float | None,
    softcap_t: float | None,
    temperature: float,
    all_statistics: bool,
    projection: Callable[..., None] | None = None,
    scratch_bytes: int = 64 << 20,
) -> None:
    """Write the KL of every row, and with `all_statistics` the other four planes.

    Works through the rows in chunks whose tile statistics (tile_planes * V / 128 floats a row) and the temporaries
    of their merge, about as many again, about fit `scratch_bytes`. projection: `dual_projection.dual_projection` by
    default, or the reference's, which holds the logits of a chunk.

    A row of infinite KL has its other statistics all the same.
    """
    if projection is None:
        from opcd_fast.kernels.dual_projection import dual_projection

        projection = dual_projection
    n, n_tiles = h_s.shape[0], reference_dual.tile_count(w_s.shape[0])
    planes = reference_dual.tile_planes(False, all_statistics)
    row_bytes = 4 * n_tiles * (planes + MERGE_PLANES)
    chunk = max(1, min(n, scratch_bytes // row_bytes))
    if chunk > ROW_BLOCK:
        chunk = chunk // ROW_BLOCK * ROW_BLOCK
    buffer = torch.empty(planes * n_tiles * chunk, dtype=torch.float32, device=h_s.device)
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        size = rows.stop - start
        tiles = buffer[: planes * n_tiles * size].view(planes, n_tiles, size)
        projection(
            h_s[rows], w_s, h_t[rows], w_t, bias_s, bias_t, None, None, tiles,
            scale_s=scale_s, scale_t=scale_t, softcap_s=softcap_s, softcap_t=softcap_t,
            temperature=temperature, all_statistics=all_statistics,
        )  # fmt: skip
        merged = reference_dual.merge_tiles(tiles)
        statistics[0, rows] = reference_dual.merge_kl(tiles, merged)
        if all_statistics:
            reference_dual.merge_other_statistics(tiles, merged, statistics[:, rows])
