"""Random calls of the loss as plain values, the tensors that they stand for, and how many cases a test draws."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

from opcd_fast.kernels.csrc import native
from opcd_fast.loss import LMHead

TIMES = int(os.environ.get("OPCD_FUZZ", "0"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VIEWS = ("plain", "transposed", "strided", "inside", "expanded")
BACKENDS = ("torch", *(["native"] if native.available() else []))


def examples(count: int) -> settings:
    return settings(max_examples=count * max(1, TIMES))


def seen_as(view: str, x: torch.Tensor) -> torch.Tensor:
    """The numbers of a matrix (n, m) as another layout in memory; "expanded": those of its first row, n times."""
    n, m = x.shape
    if view == "transposed":
        return x.T.contiguous().T
    if view == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1).view(n, 2 * m)[:, ::2]
    if view == "inside":
        return torch.nn.functional.pad(x, (3, 2, 1, 1), value=torch.nan)[1 : n + 1, 3 : m + 3]
    return x[:1].expand(n, m) if view == "expanded" and n else x


@dataclass(frozen=True)
class Side:
    width: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    view: str
    weight_view: str
    bias: str  # "none", "some", "forbids"
    scale: float
    softcap: float | None
    padding: int


@dataclass(frozen=True)
class Case:
    seed: int
    leading: tuple[int, ...]
    vocabulary: int
    size: float  # of the hidden states
    spread: float | None  # between the models; None: nothing in common
    student: Side
    teacher: Side
    options: dict[str, Any]
    weights: str  # "none", "bool", "float"
    upstream: float
    trained: tuple[bool, bool, bool]  # hidden states, weight, bias

    def tensors(self) -> tuple[torch.Tensor, LMHead, torch.Tensor, LMHead, torch.Tensor | None]:
        """h_s (..., D_s), student's head, h_t (..., D_t), teacher's head, token weights (...,) or None. Rows of weight
        0 and rows of a head beyond its vocabulary hold NaN."""
        g = torch.Generator().manual_seed(self.seed)
        n = int(torch.tensor(self.leading).prod()) if self.leading else 1
        weights = None
        if self.weights != "none":
            weights = torch.rand(n, generator=g).mul(3) * (torch.rand(n, generator=g) > 0.3)
            weights = (weights != 0 if self.weights == "bool" else weights).reshape(self.leading)
        widest = max(self.student.width, self.teacher.width)
        shared = torch.randn(n, widest, generator=g), torch.randn(self.vocabulary, widest, generator=g)
        made = []
        for number, side in enumerate((self.student, self.teacher)):
            h, w = (x[:, : side.width].clone() for x in shared)
            if number and self.spread is None:
                h, w = (torch.randn(x.shape, generator=g) for x in (h, w))
            elif number:
                h += self.spread * torch.randn(h.shape, generator=g)
            h, w = h * self.size, w / side.width**0.5
            w = torch.cat([w, torch.full((side.padding, side.width), torch.nan)])
            h, w = h.to(side.dtype), w.to(side.weight_dtype)
            if weights is not None and side.view != "expanded":
                h[(weights == 0).flatten()] = torch.nan
            bias = None
            if side.bias != "none":
                bias = torch.randn(len(w), generator=g)
                if side.bias == "forbids":
                    bias[1:][torch.rand(len(w) - 1, generator=g) < 0.1] = -torch.inf
            head = LMHead(
                seen_as(side.weight_view, w), bias, side.scale, side.softcap,
                self.vocabulary if side.padding or self.seed % 2 else None,
            )  # fmt: skip
            view = seen_as(side.view, h)
            made += [view.unflatten(0, self.leading) if self.leading else view[0], head]
        return (*made, weights)  # type: ignore[return-value]


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


@st.composite
def sides(draw: Any) -> Side:
    dtype, bias = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["none", "none", "some", "forbids"]))
    scales = [1.0, 1.0, 0.25] + [-2.0] * (bias != "forbids")  # -2 would make inf of -inf
    return Side(
        draw(st.integers(1, 9)), dtype, draw(st.sampled_from([dtype, dtype, torch.float32])),
        draw(st.sampled_from(VIEWS)), draw(st.sampled_from(VIEWS[:4])),
        bias, draw(st.sampled_from(scales)),
        draw(st.sampled_from([None, None, 5.0, 30.0])), draw(st.sampled_from([0, 0, 3])),
    )  # fmt: skip


PARAMETERS = {
    "jsd": {"beta": st.one_of(floats(1e-12, 1.0), st.sampled_from([0.0, 1.0, 1e-8, 1 - 2**-53]))},
    "skew_reverse_kl": {"alpha": st.one_of(floats(1e-12, 1 - 2**-53), st.sampled_from([0.0, 1e-8]))},
    "skew_forward_kl": {"alpha": st.one_of(floats(1e-12, 1 - 2**-53), st.sampled_from([0.0, 1e-8]))},
    "gated_kl": {"gate": st.sampled_from(["kl", "tv"])},
    "topk_reverse_kl": {"k": st.integers(1, 80), "tail": st.sampled_from(["none", "renormalize", "bucket"])},
}


@st.composite
def cases(draw: Any, backends: tuple[str, ...] = BACKENDS) -> Case:
    name = draw(st.sampled_from(["reverse_kl", "forward_kl", *PARAMETERS]))
    options = {
        "divergence": name, **{key: draw(value) for key, value in PARAMETERS.get(name, {}).items()},
        "temperature": draw(st.sampled_from([1.0, 1.0, 0.3, 7.0])), "backend": draw(st.sampled_from(backends)),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "workspace_bytes": draw(st.sampled_from([None, 1, 5000])),
    }  # fmt: skip
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["denominator"] = draw(st.sampled_from([3.0, 7, torch.tensor(5)]))
    return Case(
        draw(st.integers(0, 2**31)), draw(st.sampled_from([(), (0,), (1,), (2,), (7,), (2, 3), (3, 0), (2, 1, 2)])),
        draw(st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025]))),
        draw(st.sampled_from([1e-3, 1.0, 1.0, 8.0])), draw(st.sampled_from([None, 0.0, 1e-4, 1e-2, 0.3, 2.0])),
        draw(sides()), draw(sides()), options, draw(st.sampled_from(["none", "bool", "float"])),
        draw(st.sampled_from([1.0, 1.0, -0.37])), draw(st.tuples(*[st.booleans()] * 3)),
    )  # fmt: skip
