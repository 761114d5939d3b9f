"""The shapes, the inputs and the exact answer for benchmarks of the loss.

Inputs are random but shaped like a language model's: a few tokens of every row stand far above the rest. The
teacher's hidden states are the student's moved in a random direction, just far enough for the mean KL that is
asked for: the distance between the two models decides how hard the gradient is, and context distillation
ends at small ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MEAN_KL = 1e-3  # of the inputs, in the cases that are timed
ACCURACY_KLS = (1.0, 1e-1, 1e-2, 1e-3, 3e-5)
ORACLE_ROWS = 64
_VOCABULARY_TILE = 16384  # rows of the head that are float64 at one time
_MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    head: str
    N: int
    V: int
    D: int
    dtype: torch.dtype
    frozen: bool
    group: str = "main"
    workspace_bytes: int | None = None  # for ours; None: its default
    mean_kl: float = MEAN_KL

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        parts = [self.head, f"n{self.N}", self.dtype_name, "frozen" if self.frozen else "full"]
        if self.workspace_bytes is not None:
            parts.append(f"{self.workspace_bytes // _MIB}mib")
        return "-".join(parts) + ("" if self.timed else f"-accuracy, KL {self.mean_kl:g}")

    @property
    def timed(self) -> bool:
        return self.group != "accuracy"


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors of one case. A frozen head is one tensor for both models, as with LoRA; a trained one starts
    beside a copy that the teacher keeps."""

    h_s: Tensor  # (N, D), requires grad
    w_s: Tensor  # (V, D), requires grad unless frozen
    h_t: Tensor  # (N, D)
    w_t: Tensor  # (V, D)
    ids: Tensor  # (N,), a token drawn from the student's distribution at each position

    def wanted(self) -> tuple[Tensor, ...]:
        return (self.h_s, self.w_s) if self.w_s.requires_grad else (self.h_s,)


def cases(device: torch.device, dry: bool) -> list[Case]:
    """The table's cases, what matters most first: a run that is stopped leaves the best part."""
    chosen = _dry_cases() if dry else _gpu_cases() if device.type == "cuda" else _cpu_cases()
    return [
        replace(case, mean_kl=mean_kl) for case in chosen for mean_kl in ((MEAN_KL,) if case.timed else ACCURACY_KLS)
    ]


def _dry_cases() -> list[Case]:
    shapes = [("tiny", 96, 4_100, 64, dtype) for dtype in (torch.float32, torch.bfloat16)]
    chosen = [Case(*shape, frozen) for shape in shapes for frozen in (False, True)]
    chosen += [Case(*shapes[-1], frozen, "accuracy") for frozen in (False, True)]
    # Too little for all rows at once, so that chunks are cut.
    return [*chosen, Case(*shapes[0], False, "workspace", workspace_bytes=8 * _MIB)]


def _gpu_cases() -> list[Case]:
    """Heads of Qwen3-8B and Qwen3-0.6B."""
    heads, bf16 = [("qwen3-8b", 16_384, 151_936, 4096), ("qwen3-0.6b", 16_384, 151_936, 1024)], torch.bfloat16
    full, frozen = ([Case(*head, bf16, frozen) for head in heads] for frozen in (False, True))
    accuracy = [Case("qwen3-0.6b", 256, 151_936, 1024, bf16, frozen, "accuracy") for frozen in (False, True)]
    return [*full, *accuracy, *frozen]


def _cpu_cases() -> list[Case]:
    """The head of SmolLM2-135M, then one of N, V, D and the workspace at a time around a smaller one."""
    bf16, fp32 = torch.bfloat16, torch.float32
    smollm, v, d = "smollm2-135m", 49_152, 576
    chosen = [Case(smollm, 512, v, d, dtype, False) for dtype in (fp32, bf16)]
    chosen.append(Case(smollm, 32, v, d, bf16, False, "accuracy"))  # few rows: the oracle takes the time
    base = {"N": 256, "V": 16_384, "D": 512}
    for group, sizes in {"N": (64, 256, 1024), "D": (128, 2048), "V": (4096, 65_536)}.items():
        for size in sizes:
            shape = {**base, group: size}
            chosen.append(Case(f"v{shape['V']}-d{shape['D']}", **shape, dtype=fp32, frozen=False, group=group))
    chosen += [Case("v16384-d512", **base, dtype=fp32, frozen=False, group="workspace", workspace_bytes=size * _MIB)
               for size in (16, 32, 64)]  # fmt: skip
    chosen += [Case(smollm, 512, v, d, dtype, True) for dtype in (fp32, bf16)]
    chosen.append(Case("v16384-d512", 32, 16_384, 512, fp32, False, "accuracy"))
    return chosen


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    # Rows of length about 2: logits of unit hidden states have standard deviation 2.
    weight = torch.empty(case.V, case.D, dtype=case.dtype, device=device)
    for rows in weight.split(_VOCABULARY_TILE):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=device) * (2.0 / case.D**0.5))
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
    h_t = _move_to_kl(h_s, direction, weight, case.mean_kl)
    ids = _drawn(h_s, weight, generator)
    return Inputs(h_s.requires_grad_(), weight.requires_grad_(not case.frozen), h_t, teacher_weight, ids)


def _drawn(h: Tensor, weight: Tensor, generator: torch.Generator, rows: int = 512) -> Tensor:
    """(N,) tokens of the softmax in float32, as answers have them."""
    wide = weight.float()
    chances = (torch.softmax(some.float() @ wide.t(), -1) for some in h.split(rows))
    return torch.cat([some.multinomial(1, generator=generator).squeeze(1) for some in chances])


def _move_to_kl(h_s: Tensor, direction: Tensor, weight: Tensor, mean_kl: float) -> Tensor:
    """h_s + step * direction, rounded to h_s's dtype, with step such that the mean KL is within 5 %."""
    rows = oracle_rows(h_s)
    step, h_t = (1.25 * mean_kl) ** 0.5, h_s  # right at once for most random shapes
    for _ in range(8):
        h_t = (h_s.float() + step * direction).to(h_s.dtype)
        found = float(oracle(h_s[rows], weight, h_t[rows], weight, gradient=False)[0].mean())
        if abs(found / mean_kl - 1) < 0.05:
            break
        step *= (mean_kl / max(found, 1e-12)) ** 0.5  # KL is quadratic in the step while it is small
    return h_t


def oracle_rows(h: Tensor, most: int = ORACLE_ROWS) -> Tensor:
    """Indices of at most that many rows spread over all N, the last one included: tails go wrong first."""
    count = min(h.shape[0], most)
    return torch.linspace(0, h.shape[0] - 1, count, device=h.device).round().long()


@torch.no_grad()
def oracle(
    h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, *, gradient: bool = True, weight: bool = False,
    logits: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Per-row KL (n,), d(sum KL)/dh_s (n, D) and, if asked for, d(sum KL)/dw_s (V, D).

    In float64 from the given inputs, whatever their dtype; dL/dw_s is that of these rows alone. logits: a dtype that
    the logits are rounded to.
    """
    log_p = torch.log_softmax(_logits(h_s, w_s, logits), -1)
    ratio = log_p - torch.log_softmax(_logits(h_t, w_t, logits), -1)
    p = log_p.exp_()
    kl = (p * ratio).sum(-1)
    if not gradient:
        return kl, None, None
    g = p.mul_(ratio.sub_(kl.unsqueeze(-1)))
    dh = torch.zeros(h_s.shape, dtype=torch.float64, device=h_s.device)
    for columns, tile in zip(g.split(_VOCABULARY_TILE, dim=1), _tiles(w_s), strict=True):
        dh.addmm_(columns, tile)
    return kl, dh, g.t() @ h_s.double() if weight else None


def _logits(h: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    z = torch.empty(h.shape[0], weight.shape[0], dtype=torch.float64, device=h.device)
    for columns, tile in zip(z.split(_VOCABULARY_TILE, dim=1), _tiles(weight), strict=True):
        torch.mm(h.double(), tile.t(), out=columns)
    return z.to(dtype).double()


def _tiles(weight: Tensor) -> Iterable[Tensor]:
    return (rows.double() for rows in weight.split(_VOCABULARY_TILE))
