"""Reverse KL by a dual accumulator, in plain PyTorch: the specification of `dual_projection` and `dual_rows`.

Student and teacher logits z_s, z_t (divided by the temperature) of one tile of columns exist together, so their
difference d = z_s - z_t is formed in full precision and only then rounded to two bytes, centred on its tile's
mean. With p = softmax(z_s) and c = E_p[d], gradient and divergence need nothing else of the teacher:

    dKL/dz_s = p (d - c)            KL(p || q) = log E_p[exp(c - d)] = log(1 + E_p[phi(d - c)])

with phi(x) = exp(-x) - 1 + x >= 0: log q = log p - (d - c) - KL sums to one, and E_p[d - c] = 0.

Tiles merge exactly. With w the mass of a tile, m its mean difference and y = m - c, the tile adds
exp(-y) E[phi(d - m)] + w phi(y), E over the tile alone, weighted with p; both terms are >= 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opcd_fast.kernels.reference import transform_logits

TILE = 128  # columns that share one offset
# The planes of the tiles tensor (planes, n_tiles, n), in order; `tile_planes` says how many are there.
# max is over the tile, e = exp(z_s - max).
TILE_STATISTICS = (
    "student_max",  # 0 where the student forbids the whole tile
    "student_sum",  # sum e
    "difference",  # sum e d / sum e, which the stored differences are centred on; inf where the teacher forbids
    "phi_sum",  # sum e phi(d - difference); only written where no gradient is
    "shifted_sum",  # sum e (z_s - max)
    "teacher_max",
    "teacher_sum",  # sum exp(z_t - teacher_max)
    "student_top",  # column of the first maximum, exact in float32 below 2^24
    "teacher_top",
)

# A student logit is stored no further below its tile's maximum than this: exp(-104) is 0 in float32, and the
# teacher's probability of such a token is still there in stored logit - stored difference.
FLOOR = 104.0
LARGEST_DIFFERENCE = 6.0e4  # fits float16
# exp of it is finite in float32, and so is its sum over a vocabulary. A KL beyond 80 nats is reported as about 80.
LARGEST_EXPONENT = 80.0


class Merged(NamedTuple):
    """What turns the stored values of a tile into log p and d - c, and the rows that have no finite KL."""

    offsets: Tensor  # (2, n, n_tiles): log p = stored logit + [0], d - c = stored difference + [1]
    logsumexp: Tensor  # (n,) the student's
    infinite: Tensor  # (n,) bool: the teacher forbids what the student may say


def tile_count(columns: int) -> int:
    return -(-columns // TILE)


def tile_planes(gradient: bool, all_statistics: bool) -> int:
    """How many planes of TILE_STATISTICS a projection writes, with a gradient to follow or without."""
    if all_statistics:
        return len(TILE_STATISTICS)
    return 3 if gradient else 4


def dual_projection(
    h_s: Tensor,  # (n, D_s)
    w_s: Tensor,  # (V, D_s)
    h_t: Tensor,  # (n, D_t)
    w_t: Tensor,  # (V, D_t)
    bias_s: Tensor | None,  # (V,)
    bias_t: Tensor | None,
    out_s: Tensor | None,  # (n, pitch >= V) written: z_s - tile max; None: statistics only
    out_difference: Tensor | None,  # (n, pitch) written: z_s - z_t - tile mean
    tiles: Tensor,  # (tile_planes(...), tile_count(V), n) written
    *,
    scale_s: float,
    scale_t: float,
    softcap_s: float | None,
    softcap_t: float | None,
    temperature: float,
    all_statistics: bool,
) -> None:
    """Project both sides and write what gradient and statistics need, computed in the dtype of `tiles`.

    Columns from V to the pitch get probability 0.
    """
    n, v = h_s.shape[0], w_s.shape[0]
    z_s, z_t = (h.to(tiles.dtype) @ w.to(tiles.dtype).T for h, w in ((h_s, w_s), (h_t, w_t)))
    transform_logits(z_s, bias_s, scale_s, softcap_s, temperature)
    transform_logits(z_t, bias_t, scale_t, softcap_t, temperature)
    padding = tile_count(v) * TILE - v
    z_s, z_t = (torch.nn.functional.pad(z, (0, padding), value=-torch.inf).view(n, -1, TILE) for z in (z_s, z_t))
    inside = torch.arange(v + padding, device=z_s.device).view(-1, TILE) < v

    if all_statistics:
        m = _finite_max(z_t)
        tiles[5], tiles[6] = m.T, (z_t - m.unsqueeze(-1)).exp().sum(-1).T
        tiles[7], tiles[8] = _first_top(z_s).T, _first_top(z_t).T
    m = _finite_max(z_s)
    z_s = z_s - m.unsqueeze(-1)
    e = z_s.exp()
    z_s = z_s.clamp(min=-FLOOR)
    d = torch.where(inside, z_s + (m.unsqueeze(-1) - z_t), 0.0)
    total = e.sum(-1)
    mean = torch.where(e > 0, e * d, 0.0).sum(-1)
    mean = torch.where(total == 0, 0.0, mean / total)
    tiles[0], tiles[1], tiles[2] = m.T, total.T, mean.T
    mean = mean.masked_fill(mean == torch.inf, 0.0)
    d = torch.where(inside, (d - mean.unsqueeze(-1)).clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE), 0.0)
    if all_statistics:
        tiles[4] = (e * z_s).sum(-1).T
    if out_s is None or out_difference is None:
        tiles[3] = phi_terms(z_s, d).sum(-1).T
        return
    out_s[:, v:], out_difference[:, v:] = -torch.inf, 0.0
    out_s[:, :v], out_difference[:, :v] = z_s.reshape(n, -1)[:, :v], d.reshape(n, -1)[:, :v]


def _finite_max(z: Tensor) -> Tensor:
    m = z.amax(-1)
    return m.masked_fill(m == -torch.inf, 0.0)


def _first_top(z: Tensor) -> Tensor:
    columns = torch.arange(z.shape[1] * TILE, device=z.device, dtype=torch.float32).view(-1, TILE)
    return torch.where(z >= z.amax(-1, keepdim=True), columns, torch.inf).amin(-1)


def phi_terms(log_e: Tensor, x: Tensor) -> Tensor:
    """e phi(x), every one >= 0, without cancellation and also where e underflows and exp(-x) overflows."""
    series = x * x * (0.5 + x * (-1 / 6 + x * (1 / 24 + x * (-1 / 120 + x / 720))))
    e = log_e.exp()
    return torch.where(x.abs() < 0.25, e * series, (log_e - x).clamp(max=LARGEST_EXPONENT).exp() - e + e * x)


def merge_tiles(tiles: Tensor) -> Merged:
    """Normaliser and mean difference of each row from those of its tiles."""
    log_mass = tiles[0] + tiles[1].log()
    logsumexp = log_mass.logsumexp(0)
    mass = (log_mass - logsumexp).exp()
    forbidden = tiles[2] == torch.inf
    difference = tiles[2].masked_fill(forbidden, 0.0)
    # The masses sum to one but for the rounding of logsumexp; an offset common to all differences must cancel.
    center = (mass * difference).sum(0) / mass.sum(0)
    offsets = torch.stack(((tiles[0] - logsumexp).T, (difference - center).T))
    return Merged(offsets.contiguous(), logsumexp, (forbidden & (mass > 0)).any(0))


def merge_kl(tiles: Tensor, merged: Merged) -> Tensor:
    """KL (n,) from the tiles of a projection that stored nothing else."""
    log_scale, y = (plane.T for plane in merged.offsets)
    inner = (log_scale + tiles[3].log() - y).clamp(max=LARGEST_EXPONENT).exp()
    between = phi_terms(log_scale + tiles[1].log(), y)
    return finish_kl((inner + between).sum(0), merged)


def finish_kl(phi: Tensor, merged: Merged) -> Tensor:
    """KL from E_p[phi], inf where the teacher forbids what the student may say."""
    return phi.clamp(min=0.0).log1p().masked_fill(merged.infinite, torch.inf)


def merge_other_statistics(tiles: Tensor, merged: Merged, statistics: Tensor) -> None:
    """Write planes 1 to 4 of `reference.STATISTICS`."""
    log_scale = merged.offsets[0].T
    statistics[1] = -(log_scale.exp() * (tiles[4] + tiles[1] * log_scale)).sum(0)
    statistics[2] = merged.logsumexp
    statistics[3] = (tiles[5] + tiles[6].log()).logsumexp(0)
    # The first column of the tiles that hold the row's maximum. A tile that is forbidden whole has sum 0.
    tops = []
    for maximum, total, top in ((tiles[0], tiles[1], tiles[7]), (tiles[5], tiles[6], tiles[8])):
        maximum = maximum.masked_fill(total == 0, -torch.inf)
        tops.append(top.masked_fill(maximum < maximum.amax(0), torch.inf).amin(0))
    statistics[4] = tops[0] == tops[1]


def dual_gradient(
    out_s: Tensor,  # (n, pitch) as dual_projection wrote it
    out_difference: Tensor,  # (n, pitch)
    tiles: Tensor,
    row_weights: Tensor,  # (n,) multiplied into the gradient, not into the statistics
    statistics: Tensor,  # (5, n) written; see reference.STATISTICS
    gradient: Tensor,  # (n, pitch) written, 0 from V on; may share out_s's memory
    *,
    scale_s: float,
    softcap_s: float | None,
    temperature: float,
    all_statistics: bool,
) -> None:
    """Write the statistics and d(sum_n w_n KL_n)/d(raw student product); the derivatives of softcap, scale and
    1/temperature are in it. Without `all_statistics` only plane 0 (the KL) is written.

    A row whose KL is inf has gradient 0. NaN inputs give NaN outputs. The KL carries the float16 rounding of the
    differences: 1e-4 relative where the models are near, 1e-3 at 10 nats (`merge_kl` does not).
    """
    merged = merge_tiles(tiles)
    pitch = out_s.shape[1]
    spread = torch.arange(pitch, device=tiles.device).div(TILE, rounding_mode="floor").clamp(max=tiles.shape[1] - 1)
    log_scale, shift = merged.offsets[:, :, spread]
    log_p, x = out_s.to(tiles.dtype) + log_scale, out_difference.to(tiles.dtype) + shift
    statistics[0] = finish_kl(phi_terms(log_p, x).sum(-1), merged)
    if all_statistics:
        merge_other_statistics(tiles, merged, statistics)
    factor = gradient_factor(row_weights, merged, scale_s, temperature).unsqueeze(-1)
    g = log_p.exp() * x * factor
    if softcap_s is not None:
        tanh = ((log_p + merged.logsumexp.unsqueeze(-1)) * (temperature / softcap_s)).clamp(min=-1.0)
        g = g * (1.0 - tanh * tanh)
    gradient.copy_(g)


def gradient_factor(row_weights: Tensor, merged: Merged, scale_s: float, temperature: float) -> Tensor:
    return row_weights.masked_fill(merged.infinite, 0.0) * (scale_s / temperature)
