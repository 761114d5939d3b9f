"""The shapes, the inputs and the exact answer for benchmarks of the loss.

Inputs are random but shaped like a language model's: a few tokens of every row stand far above the rest. The
teacher's hidden states are the student's moved in a random direction, just far enough for the mean KL that is
asked for: the distance between the two models decides how hard the gradient is, and context distillation
ends at small ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

KLS = (1e-2, 1e-4)  # mean KLs at which gradients are compared with the oracle
ORACLE_ROWS = 64
_VOCABULARY_TILE = 16384  # rows of the head that are float64 at one time


@dataclass(frozen=True)
class Case:
    head: str
    N: int
    V: int
    D: int
    dtype: torch.dtype
    frozen: bool

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"{self.head}-n{self.N}-{self.dtype_name}-{'frozen' if self.frozen else 'full'}"


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors of one case. A frozen head is one tensor for both models, as with LoRA; a trained one starts
    beside a copy that the teacher keeps."""

    h_s: Tensor  # (N, D), requires grad
    w_s: Tensor  # (V, D), requires grad unless frozen
    h_t: Tensor  # (N, D)
    w_t: Tensor  # (V, D)

    def wanted(self) -> tuple[Tensor, ...]:
        return (self.h_s, self.w_s) if self.w_s.requires_grad else (self.h_s,)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The table's cases: on a GPU two real heads, cheap and small first so that a killed run leaves most."""
    bf16, fp32 = torch.bfloat16, torch.float32
    if device.type == "cuda" and not quick:
        shapes = [
            (head, n, 151_936, d, bf16) for n in (4096, 16384) for head, d in (("qwen3-0.6b", 1024), ("qwen3-8b", 4096))
        ]
    elif device.type == "cuda":
        shapes = [("quick", 512, 8_192, 256, bf16), ("quick-odd", 512, 8_197, 256, bf16)]
    elif not quick:
        # Fewer rows in bf16, whose products are slow on most CPUs.
        shapes = [("smollm2-135m", 256, 49_152, 576, fp32), ("smollm2-135m", 64, 49_152, 576, bf16)]
    else:
        shapes = [("quick", 96, 4_100, 64, fp32), ("quick", 96, 4_100, 64, bf16)]
    return [Case(*shape, frozen) for shape in shapes for frozen in (False, True)]


def random_weight(v: int, d: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """(V, D) with rows of length about 2: logits of unit hidden states have standard deviation 2."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(v, d, dtype=dtype, device=device)
    for rows in weight.split(_VOCABULARY_TILE):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=device) * (2.0 / d**0.5))
    return weight


def make_inputs(case: Case, device: torch.device, mean_kl: float, seed: int = 0) -> Inputs:
    weight = random_weight(case.V, case.D, case.dtype, device, seed)
    teacher_weight = weight if case.frozen else weight.clone()
    generator = torch.Generator(device).manual_seed(seed + 1)
    h = torch.randn(case.N, case.D, generator=generator, device=device)
    for _ in range(4):
        # A boosted token's logit grows by twice its strength: 8 to 18 above a background of deviation 2.
        token = torch.randint(case.V, (case.N,), generator=generator, device=device)
        strength = 4 + 5 * torch.rand(case.N, 1, generator=generator, device=device)
        h += strength * torch.nn.functional.normalize(weight[token].float(), dim=-1)
    h_s = h.to(case.dtype)
    direction = torch.randn(case.N, case.D, generator=generator, device=device)
    h_t = _move_to_kl(h_s, direction, weight, mean_kl)
    return Inputs(h_s.requires_grad_(), weight.requires_grad_(not case.frozen), h_t, teacher_weight)


def _move_to_kl(h_s: Tensor, direction: Tensor, weight: Tensor, mean_kl: float) -> Tensor:
    """h_s + step * direction, rounded to h_s's dtype, with step such that the mean KL is within 5 %."""
    rows = oracle_rows(h_s)
    step, h_t = (1.25 * mean_kl) ** 0.5, h_s  # right at once for most shapes
    for _ in range(8):
        h_t = (h_s.float() + step * direction).to(h_s.dtype)
        found = float(oracle(h_s[rows], weight, h_t[rows], weight, gradient=False)[0].mean())
        if abs(found / mean_kl - 1) < 0.05:
            break
        step *= (mean_kl / max(found, 1e-12)) ** 0.5  # KL is quadratic in the step while it is small
    return h_t


def oracle_rows(h: Tensor) -> Tensor:
    """Indices of at most ORACLE_ROWS rows spread over all N, the last one included: tails go wrong first."""
    count = min(h.shape[0], ORACLE_ROWS)
    return torch.linspace(0, h.shape[0] - 1, count, device=h.device).round().long()


@torch.no_grad()
def oracle(
    h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, *, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Per-row KL (n,) and d(sum KL)/dh_s (n, D) in float64 from the given inputs, whatever their dtype."""
    log_p = torch.log_softmax(_logits(h_s, w_s), -1)
    ratio = log_p - torch.log_softmax(_logits(h_t, w_t), -1)
    p = log_p.exp_()
    kl = (p * ratio).sum(-1)
    if not gradient:
        return kl, None
    g = p.mul_(ratio.sub_(kl.unsqueeze(-1)))
    dh = torch.zeros(h_s.shape, dtype=torch.float64, device=h_s.device)
    for columns, tile in zip(g.split(_VOCABULARY_TILE, dim=1), _tiles(w_s), strict=True):
        dh.addmm_(columns, tile)
    return kl, dh


def _logits(h: Tensor, weight: Tensor) -> Tensor:
    z = torch.empty(h.shape[0], weight.shape[0], dtype=torch.float64, device=h.device)
    for columns, tile in zip(z.split(_VOCABULARY_TILE, dim=1), _tiles(weight), strict=True):
        torch.mm(h.double(), tile.t(), out=columns)
    return z


def _tiles(weight: Tensor) -> Iterable[Tensor]:
    return (rows.double() for rows in weight.split(_VOCABULARY_TILE))
