"""The row operation of every divergence in plain PyTorch, for whole rows or for a slice of the vocabulary.

For one row with student logits z_s and teacher logits z_t (both already divided by the temperature), p and q their
softmaxes and l = log p - log q = z_s - z_t - (lse_s - lse_t), every divergence D here has a gradient of one form:

    dD/dz_s = p (phi - c)        phi = dD/dp up to a constant        c = E_p[phi]

with phi shifted so that it vanishes where p = q, and a value that is a sum of terms >= 0 because p, q and their
mixture m each sum to one. With psi(x) = exp(-x) - 1 + x:

    name (parameter)           mixture                       terms                                  phi
    reverse_kl                                               p psi(l)                               l
    forward_kl                                               q psi(-l)                              1 - q / p
    jsd (beta)                 m = (1 - beta) p + beta q     beta q psi(y) + (1 - beta) p psi(x)    (1 - beta) x
    skew_reverse_kl (alpha)    m = alpha p + (1 - alpha) q   p psi(x)                               x - alpha expm1(x)
    skew_forward_kl (alpha)    m = alpha q + (1 - alpha) p   q psi(y)                               (alpha - 1) expm1(y)
    gated_kl (gate)                                          (1 - w) p psi(l) + w q psi(-l)  (1 - w) l + w (1 - q / p)

x = log(p / m) and y = log(q / m). For m = (1 - w) p + w q, x = -log1p(w expm1(-l)). Where p or q underflows, its
term is the limit: the other one's contribution to m. In 32 bits the sum of p l alone would not do: where p is close to
q, which is where distillation ends up, its terms are a thousand times larger than their sum.

w, a constant for the gradient, is 1 - exp(-KL(p || q)) (gate "kl") or the total variation sum |p - q| / 2 ("tv"), and 1
where KL(p || q) is infinite.

Sources: the Jensen-Shannon divergence is that of generalized knowledge distillation (arXiv 2306.13649, with TRL's
meaning of beta: it weighs KL(q || m)), the skewed ones are DistiLLM's (arXiv 2402.03898).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opcd_fast.kernels.reference.logits import Logits, column, slices
from opcd_fast.kernels.reference.statistics import (
    TERMS,
    Gather,
    Rows,
    gate_from,
    merge_normalisers,
    merge_terms,
    normalise,
    write_statistics,
)
from opcd_fast.kernels.reference.table import row_of

# Those that know p phi where p is 0 and phi is not; the others know phi.
TIMES_P = ("forward_kl", "gated_kl")


def scratch_planes(softcap_s: float | None) -> int:
    """How many (block, V) buffers `divergence_rows` needs beside its inputs.

    Beyond them it allocates two such buffers and two masks of a byte per element, on a CPU only for blocks in which
    a probability underflows.
    """
    return 3 if softcap_s is None else 4


def divergence_rows(
    student: Logits,  # z (n, V) float32 or float64; destroyed
    teacher: Logits,  # z (n, V), same dtype; destroyed
    row_weights: Tensor,  # (n,) multiplied into the gradient, not into the statistics
    statistics: Tensor,  # (6, n) written; see STATISTICS, plane 0 is the divergence
    gradient: Tensor | None,  # (n, V) written; may be the student's z itself. None: statistics only
    *,
    divergence: str = "reverse_kl",
    parameter: float = 0.0,
    gate: str = "kl",
    all_statistics: bool = True,
    scratch: Tensor | None = None,  # (scratch_planes(student.softcap), block, V) same dtype as z; None: its own
    gather: Gather = None,
    first_column: int = 0,
) -> None:
    """Write the statistics of n rows and d(sum_n w_n D_n)/d(raw student product) into `gradient`.

    parameter: beta or alpha, gate: that of gated_kl; ignored by what has none. Without all_statistics only plane 0 is
    written.

    gather: for a head whose vocabulary is sharded; this call sees the columns from `first_column` on. It is called
    twice (with a gate three times), for all n rows together, on every rank alike. The statistics written are then
    those of the whole vocabulary, the gradient is the slice's.

    Infinite rows, value inf and gradient 0: reverse_kl where the teacher forbids what the student may say, forward_kl
    and gated_kl the other way round. A token that both forbid does not exist. NaN inputs give NaN outputs.

    Raises ValueError for an unknown divergence or gate and for a jsd or skew parameter outside (0, 1).
    """
    row_of(divergence, parameter, gate)
    n = len(student.z)
    if n == 0:
        return
    scratch, blocks = student.blocks(scratch, scratch_planes(student.softcap))
    # Whole rows go through all passes block by block. Ranks need not agree on a block, so they meet for all rows at
    # once.
    for rows in blocks if gather is None else [slice(0, n)]:
        _passes(
            student.rows(rows), teacher.rows(rows), row_weights[rows], statistics[:, rows],
            None if gradient is None else gradient[rows], divergence, parameter, gate, all_statistics, scratch,
            gather, first_column,
        )  # fmt: skip


def _passes(
    student: Logits,
    teacher: Logits,
    row_weights: Tensor,
    statistics: Tensor,
    gradient: Tensor | None,
    divergence: str,
    parameter: float,
    gate: str,
    all_statistics: bool,
    scratch: Tensor,
    gather: Gather,
    first_column: int,
) -> None:
    z_s, z_t, n = student.z, teacher.z, len(student.z)
    blocks = list(slices(n, scratch.shape[1]))
    normalisers = z_s.new_zeros(4, n)
    for block in blocks:
        for plane, side in ((0, student), (2, teacher)):
            z = side.rows(block).transform_()
            top = normalisers[plane, block] = z.amax(-1)
            exponentials = torch.sub(z, column(top.masked_fill(top == float("-inf"), 0.0)), out=scratch[0, : len(z)])
            normalisers[plane + 1, block] = exponentials.exp_().sum(-1)
    if gather is not None:
        normalisers = merge_normalisers(gather(normalisers))
    rows = normalise(normalisers)

    gates = None
    if divergence == "gated_kl":
        distance = z_s.new_empty(1, n)
        for block in blocks:
            distance[0, block] = _distance(z_s[block], z_t[block], rows.part(block), gate, scratch)
        if gather is not None:
            distance = gather(distance).sum(0)
        gates = torch.stack(gate_from(distance[0], gate))

    terms = z_s.new_empty(len(TERMS), n)
    for block in blocks:
        terms[:, block] = _terms(
            student.rows(block), teacher.rows(block), rows.part(block), divergence, parameter,
            None if gates is None else gates[:, block], all_statistics, gradient is not None,
            scratch[:, : block.stop - block.start], first_column,
        )  # fmt: skip
    if gather is not None:
        terms = merge_terms(gather(terms))
    write_statistics(statistics, rows, terms, all_statistics, None if gates is None else gates[0])
    if gradient is None:
        return

    infinite = terms[0] == float("inf")
    weights = row_weights * student.derivative
    for block in blocks:
        # The second pass has left phi, and p times the softcap's derivative, where the logits were. Centring with the
        # same phi that is centred makes the gradient's row sum vanish whatever the rounding of the normalisers was.
        if divergence in TIMES_P:
            g = z_t[block].addcmul_(z_s[block], column(terms[4, block]), value=-1.0)
        else:
            g = z_t[block].sub_(column(terms[4, block])).mul_(z_s[block])
        g.mul_(column(weights[block]))
        if g.is_cuda or bool(infinite[block].any()):
            g.masked_fill_(column(infinite[block]), 0.0)
        gradient[block] = g


def _distance(z_s: Tensor, z_t: Tensor, rows: Rows, gate: str, scratch: Tensor) -> Tensor:
    """What opens the gate, KL(p || q) or the total variation of one block, (rows,); of a slice, its part of the sum."""
    l, a, b, *_ = scratch[:, : len(z_s)]
    log_p = torch.sub(z_s, column(rows.lse_s), out=b)
    p = log_p.exp_()
    if gate == "tv":
        q = torch.sub(z_t, column(rows.lse_t), out=l).exp_()
        terms = torch.sub(p, q, out=a).abs_().mul_(0.5)
        never = z_t == float("-inf")
        if never.is_cuda or bool(never.any()):
            terms.masked_fill_(never & (q == 0.0) & (p >= torch.finfo(p.dtype).tiny), float("inf"))
        return terms.sum(-1)
    torch.sub(z_s, z_t, out=l).sub_(column(rows.log_ratio)).mul_(p)
    none_p = _underflown(p)
    return (l if none_p is None else l.masked_fill_(none_p, 0.0)).sum(-1)


def _terms(
    student: Logits,  # z is logits / temperature; becomes p times the softcap's derivative
    teacher: Logits,  # likewise; becomes phi, or for TIMES_P p phi, times that derivative
    rows: Rows,
    divergence: str,
    parameter: float,
    gates: Tensor | None,  # (2, rows): w and 1 - w
    all_statistics: bool,
    with_phi: bool,
    scratch: Tensor,
    first_column: int,
) -> Tensor:
    """TERMS of one block, (5, rows)."""
    z_s, z_t = student.z, teacher.z
    l, a, b, *slope_plane = scratch.unbind(0)
    slope = student.slope(slope_plane, with_phi)
    out = z_s.new_zeros(len(TERMS), len(z_s))
    if all_statistics:
        out[2] = _top_column(z_s, rows.max_s, first_column)
        out[3] = _top_column(z_t, rows.max_t, first_column)
    torch.sub(z_s, z_t, out=l).sub_(column(rows.log_ratio))
    log_p = torch.sub(z_s, column(rows.lse_s), out=b)
    p = torch.exp(log_p, out=z_s)
    none_p = _underflown(p)
    if all_statistics:
        out[1] = _total(log_p.mul_(p), none_p, p, 0.0)
    if divergence == "reverse_kl":
        q = p if none_p is None else z_t.sub_(column(rows.lse_t)).exp_()  # not looked at, or only where p underflows
        phi = l
        out[0] = _total(torch.neg(l, out=b).expm1_().add_(l).mul_(p), none_p, q)
    else:
        q = z_t.sub_(column(rows.lse_t)).exp_()
        none_q = _underflown(q)
        if divergence in TIMES_P:
            out[0] = _total(torch.expm1(l, out=a).sub_(l).mul_(q), none_q, p)
            # p phi = p - q; its sum is 0.
            phi = torch.neg(l, out=a).expm1_().neg_().mul_(p)
            if none_p is not None:
                phi = torch.where(none_p, -q, phi)
            if gates is not None:
                out[0], out[4] = _gated(gates, out[0], p, q, l, b, none_p, phi)
        else:
            out[0], phi = _mixture(divergence, parameter, p, q, l, a, b, none_p, none_q)
    if with_phi:
        if divergence not in TIMES_P:
            if none_p is not None:
                phi.masked_fill_(none_p, 0.0)
            out[4] = torch.mul(phi, p, out=z_t).sum(-1)
        elif slope is not None:
            phi.mul_(slope)
        if slope is not None:
            p.mul_(slope)
        z_t.copy_(phi)
    return out


def _gated(
    gates: Tensor,  # (2, rows): w and 1 - w
    forward: Tensor,  # (rows,) KL(q || p)
    p: Tensor,  # (rows, V), like all that follow
    q: Tensor,
    l: Tensor,  # overwritten
    b: Tensor,  # scratch
    none_p: Tensor | None,  # where p underflows; None: nowhere
    phi: Tensor,  # p - q; becomes (1 - w) p l + w (p - q)
) -> tuple[Tensor, Tensor]:
    """The gated divergence and (1 - w) E_p[l], (rows,) each."""
    w, rest = gates
    reverse = _total(torch.neg(l, out=b).expm1_().add_(l).mul_(p), none_p, q)
    # Closed, it lets through neither an infinite KL(p || q) nor hides that the student forbids what the teacher says.
    value = w * forward + torch.where(rest == 0.0, 0.0, rest * reverse)
    value = torch.where(forward == float("inf"), forward, value)
    p_l = l.mul_(p).mul_(column(rest))
    if none_p is not None:
        p_l.masked_fill_(none_p, 0.0)
    if p_l.is_cuda or bool((rest == 0.0).any()):
        p_l.masked_fill_(column(rest == 0.0), 0.0)
    phi.mul_(column(w)).add_(p_l)
    return value, p_l.sum(-1)


def _mixture(
    divergence: str,
    parameter: float,
    p: Tensor,  # (rows, V), like all that follow
    q: Tensor,
    l: Tensor,  # overwritten
    a: Tensor,  # scratch
    b: Tensor,  # scratch
    none_p: Tensor | None,  # where p underflows; None: nowhere
    none_q: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A divergence from a mixture of p and q (rows,), and phi (rows, V) in one of the scratch tensors."""
    # Next to an end 1 + u, of what is below, has lost what one side gives to m, or u what m has of it.
    if l.dtype == torch.float32 and _is_end(parameter):
        p, q, l, a, b = (x.double() for x in (p, q, l, a, b))
        value, phi = _mixture(divergence, parameter, p, q, l, a, b, none_p, none_q)
        return value.float(), phi.float()
    # Beyond these limits p or q has underflown, and expm1 is finite within.
    limit = 0.5 - math.log(torch.finfo(l.dtype).tiny)
    l.clamp_(-limit, limit)
    if divergence == "jsd":
        excess = torch.neg(l, out=a).expm1_().mul_(parameter)  # m / p - 1
        minus_x = _log1p(excess, l, -1, parameter, 1.0 - parameter, b)
        value = _total(excess.sub_(minus_x).mul_(p), none_p, q, parameter).mul_(1.0 - parameter)
        excess = torch.expm1(l, out=a).mul_(1.0 - parameter)  # m / q - 1
        minus_y = _log1p(excess, l, 1, 1.0 - parameter, parameter, l)
        value += _total(excess.sub_(minus_y).mul_(q), none_q, p, 1.0 - parameter).mul_(parameter)
        return value, minus_x.mul_(parameter - 1.0)
    w = 1.0 - parameter
    if divergence == "skew_reverse_kl":
        excess = torch.neg(l, out=a).expm1_().mul_(w)  # m / p - 1
        minus_x = _log1p(excess, l, -1, w, parameter, b)
        value = _total(torch.sub(excess, minus_x, out=l).mul_(p), none_p, q, w)
        # expm1(x) = -excess / (1 + excess)
        ratio = torch.exp(minus_x, out=l) if _is_end(w) else torch.add(excess, 1.0, out=l)
        return value, excess.div_(ratio).mul_(parameter).sub_(minus_x)
    if divergence == "skew_forward_kl":
        excess = torch.expm1(l, out=a).mul_(w)  # m / q - 1
        minus_y = _log1p(excess, l, 1, w, parameter, b)
        value = _total(torch.sub(excess, minus_y, out=l).mul_(q), none_q, p, w)
        return value, excess.div_(minus_y.exp_() if _is_end(w) else torch.add(excess, 1.0, out=b)).mul_(w)
    raise ValueError(f"unknown divergence {divergence!r}")


def _is_end(share: float) -> bool:
    return not 0.01 < share < 0.99


def _log1p(excess: Tensor, l: Tensor, sign: int, w: float, rest: float, out: Tensor) -> Tensor:
    """log(1 + excess) for excess = w expm1(sign l); where most of the 1 is lost, of what is left: rest = 1 - w.

    Beyond `out`, which may be l, memory is taken only for w next to its ends.
    """
    left = torch.mul(l, sign).exp_().mul_(w).add_(rest).log_() if _is_end(w) else None
    log = torch.log1p(excess, out=out)
    return log if left is None else torch.where(excess < -0.5, left, log)


def _underflown(x: Tensor) -> Tensor | None:
    """Where a probability is below the smallest normal number and counts as 0; None for nowhere.

    Looking first saves passes on a CPU; on a device looking would synchronise. NaN must not hide the others.
    """
    smallest = torch.finfo(x.dtype).tiny
    return x < smallest if x.is_cuda or not bool(x.amin() >= smallest) else None


def _total(terms: Tensor, nowhere: Tensor | None, other: Tensor, share: float = 1.0) -> Tensor:
    """Sum of a row's terms, with the other side's share of the mixture in place of those that underflow."""
    return (terms if nowhere is None else torch.where(nowhere, share * other, terms)).sum(-1)


def _top_column(z: Tensor, top: Tensor, first_column: int) -> Tensor:
    """Number of the first column that reaches the row's maximum over all ranks, inf if none does."""
    at = z.argmax(-1)
    reached = z.gather(-1, column(at)).squeeze(-1) >= top
    return torch.where(reached, at.to(z.dtype) + first_column, float("inf"))
