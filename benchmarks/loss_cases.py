"""The shapes, the inputs and the exact answer for benchmarks of the loss.

Inputs are random but shaped like a language model's: a few tokens of every row stand far above the rest. The
teacher's hidden states are the student's moved in a random direction, just far enough for the mean KL that is
asked for: the distance between the two models decides how hard the gradient is, and context distillation
ends at small ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

KLS = (1e-3,)  # mean KLs at which gradients are compared with the oracle, in the cases that are timed
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

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        parts = [self.head, f"n{self.N}", self.dtype_name, "frozen" if self.frozen else "full"]
        if self.group == "accuracy":
            parts.append("accuracy")
        if self.workspace_bytes is not None:
            parts.append(f"{self.workspace_bytes // _MIB}mib")
        return "-".join(parts)

    @property
    def timed(self) -> bool:
        return self.group != "accuracy"

    @property
    def kls(self) -> tuple[float, ...]:
        return KLS if self.timed else ACCURACY_KLS


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
    """The table's cases, what matters most first: a run that is stopped leaves the best part."""
    if quick:
        return _quick_cases(device)
    return _gpu_cases() if device.type == "cuda" else _cpu_cases()


def _quick_cases(device: torch.device) -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    if device.type == "cuda":
        shapes = [("quick", 512, 8_192, 256, bf16), ("quick-odd", 512, 8_197, 256, bf16)]
    else:
        shapes = [("quick", 96, 4_100, 64, fp32), ("quick", 96, 4_100, 64, bf16)]
    chosen = [Case(*shape, frozen) for shape in shapes for frozen in (False, True)]
    chosen.append(Case(*shapes[-1], False, "accuracy"))
    # Too little for all rows at once, so that chunks are cut.
    chosen.append(Case(*shapes[0], False, "workspace", workspace_bytes=8 * _MIB))
    return chosen


def _gpu_cases() -> list[Case]:
    """Heads of Qwen3-0.6B, Qwen3-8B and Gemma-2-2B, then one of N, V, D and the workspace at a time."""
    gib = 1 << 30
    small, large = ("qwen3-0.6b", 151_936, 1024), ("qwen3-8b", 151_936, 4096)
    middle, few, many = ("d2304", 151_936, 2304), ("v49152-d2304", 49_152, 2304), ("gemma-2-2b", 256_000, 2304)
    wanted: list[tuple[str, int, tuple[str, int, int], bool, int | None]]
    wanted = [("main", 16_384, head, False, None) for head in (large, small)]
    wanted.append(("accuracy", 256, small, False, None))
    wanted += [("main", 16_384, head, True, None) for head in (large, small)]
    wanted += [("N", 4_096, head, False, None) for head in (small, large)]
    wanted.append(("D", 16_384, middle, False, None))
    wanted += [("N", 65_536, head, False, None) for head in (small, large)]
    wanted += [("V", 16_384, head, False, None) for head in (few, many)]
    wanted += [("workspace", 16_384, head, False, size) for head in (small, large) for size in (gib // 2, gib, 5 * gib)]
    return [
        Case(name, n, v, d, torch.bfloat16, frozen, group, workspace)
        for group, n, (name, v, d), frozen, workspace in wanted
    ]


def _cpu_cases() -> list[Case]:
    """The head of SmolLM2-135M, then one of N, V, D and the workspace at a time around a smaller one."""
    bf16, fp32 = torch.bfloat16, torch.float32
    smollm, v, d = "smollm2-135m", 49_152, 576
    chosen = [Case(smollm, 512, v, d, dtype, False) for dtype in (fp32, bf16)]
    chosen.append(Case(smollm, 32, v, d, bf16, False, "accuracy"))  # few rows: the oracle takes the time
    sizes = {"N": (64, 256, 1024), "D": (128, 2048), "V": (4096, 65_536)}
    chosen += _around({"N": 256, "V": 16_384, "D": 512}, sizes, workspaces=(16, 32, 64))
    chosen += [Case(smollm, 512, v, d, dtype, True) for dtype in (fp32, bf16)]
    chosen.append(Case("v16384-d512", 32, 16_384, 512, fp32, False, "accuracy"))
    return chosen


def small_cases() -> list[Case]:
    """For pytest-benchmark on a CPU, which follows our own code from commit to commit."""
    dtypes = (torch.float32, torch.bfloat16)
    chosen = [Case("small", 128, 8192, 256, dtype, frozen) for dtype in dtypes for frozen in (False, True)]
    sizes = {"N": (32, 512), "D": (64, 1024), "V": (2048, 32_768)}
    return chosen + _around({"N": 128, "V": 8192, "D": 256}, sizes, workspaces=(8, 16))


def _around(base: dict[str, int], sizes: Mapping[str, tuple[int, ...]], workspaces: tuple[int, ...]) -> list[Case]:
    """One size at a time other than in `base`; workspaces in MiB. float32, trained heads."""
    chosen = []
    for group, values in sizes.items():
        for value in values:
            shape = {**base, group: value}
            head = f"v{shape['V']}-d{shape['D']}"
            chosen.append(Case(head, shape["N"], shape["V"], shape["D"], torch.float32, False, group))
    head = f"v{base['V']}-d{base['D']}"
    n, v, d = base["N"], base["V"], base["D"]
    return chosen + [Case(head, n, v, d, torch.float32, False, "workspace", size * _MIB) for size in workspaces]


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


def oracle_rows(h: Tensor, most: int = ORACLE_ROWS) -> Tensor:
    """Indices of at most that many rows spread over all N, the last one included: tails go wrong first."""
    count = min(h.shape[0], most)
    return torch.linspace(0, h.shape[0] - 1, count, device=h.device).round().long()


@torch.no_grad()
def oracle(
    h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, *, gradient: bool = True, weight: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Per-row KL (n,), d(sum KL)/dh_s (n, D) and, if asked for, d(sum KL)/dw_s (V, D).

    In float64 from the given inputs, whatever their dtype; dL/dw_s is that of these rows alone.
    """
    log_p = torch.log_softmax(_logits(h_s, w_s), -1)
    ratio = log_p - torch.log_softmax(_logits(h_t, w_t), -1)
    p = log_p.exp_()
    kl = (p * ratio).sum(-1)
    if not gradient:
        return kl, None, None
    g = p.mul_(ratio.sub_(kl.unsqueeze(-1)))
    dh = torch.zeros(h_s.shape, dtype=torch.float64, device=h_s.device)
    for columns, tile in zip(g.split(_VOCABULARY_TILE, dim=1), _tiles(w_s), strict=True):
        dh.addmm_(columns, tile)
    return kl, dh, g.t() @ h_s.double() if weight else None


def _logits(h: Tensor, weight: Tensor) -> Tensor:
    z = torch.empty(h.shape[0], weight.shape[0], dtype=torch.float64, device=h.device)
    for columns, tile in zip(z.split(_VOCABULARY_TILE, dim=1), _tiles(weight), strict=True):
        torch.mm(h.double(), tile.t(), out=columns)
    return z


def _tiles(weight: Tensor) -> Iterable[Tensor]:
    return (rows.double() for rows in weight.split(_VOCABULARY_TILE))
