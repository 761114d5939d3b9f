"""The divergences, one row each: whatever has to know one reads it here. Needs no PyTorch.

p is the student's distribution, q the teacher's. The formulas stand in divergences.py and topk.py beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

TAILS = ("none", "renormalize", "bucket")
GATES = ("kl", "tv")


def is_number(x: Any) -> bool:
    """Whether x is a real number, no tensor and no bool."""
    return isinstance(x, Real) and not isinstance(x, bool)


@dataclass(frozen=True)
class Parameter:
    """A keyword of `fused_linear_divergence`, and a setting of a run under the same name."""

    name: str
    default: Any
    allowed: Callable[[Any], bool]
    expected: str  # in words

    def check(self, value: Any) -> None:
        """Raise ValueError for what no divergence could mean."""
        if not self.allowed(value):
            raise ValueError(f"{self.name} is {value!r}; it must be {self.expected}")


@dataclass(frozen=True)
class Divergence:
    name: str
    code: int | None  # of the kernels in Triton and C++ (csrc/calls.h); None: plain PyTorch on every backend
    parameters: tuple[str, ...] = ()  # those of PARAMETERS that it has: a number, a word, or one of each
    ends: Mapping[float, str] = field(default_factory=dict)  # values of its number at which it is another divergence
    two_passes: bool = False  # E_p[phi] is known before the terms, so that the gradient needs no pass of its own
    infinite: str = ""  # the side that makes it infinite by forbidding what the other may say
    blind: bool = False  # hardly any gradient for what the student never says, however likely for the teacher


PARAMETERS = {
    parameter.name: parameter
    for parameter in (
        Parameter("beta", 0.5, lambda x: is_number(x) and (x == 0 or 1e-12 <= x <= 1), "0 (forward KL) or 1e-12..1"),
        Parameter("alpha", 0.1, lambda x: is_number(x) and (x == 0 or 1e-12 <= x < 1), "0 or 1e-12..1, 1 excluded"),
        Parameter("k", 256, lambda x: type(x) is int and x > 0, "a positive integer"),
        Parameter("tail", "none", TAILS.__contains__, f"one of {', '.join(map(repr, TAILS))}"),
        Parameter("gate", "kl", GATES.__contains__, f"one of {', '.join(map(repr, GATES))}"),
    )
}
DIVERGENCES = {
    row.name: row
    for row in (
        Divergence("reverse_kl", 0, two_passes=True, infinite="teacher", blind=True),
        Divergence("forward_kl", 1, two_passes=True, infinite="student"),
        Divergence("jsd", 2, ("beta",), {0.0: "forward_kl", 1.0: "reverse_kl"}, blind=True),
        Divergence("skew_reverse_kl", 3, ("alpha",), {0.0: "reverse_kl"}, blind=True),
        Divergence("skew_forward_kl", 4, ("alpha",), {0.0: "forward_kl"}, blind=True),
        Divergence("gated_kl", 5, ("gate",), two_passes=True, infinite="student"),  # a pass more for the gate "tv"
        Divergence("topk_reverse_kl", None, ("k", "tail"), blind=True),
    )
}


def row_of(divergence: str, parameter: float, gate: str = "kl") -> Divergence:
    """The row of a divergence that has a kernel.

    Raises ValueError for what the kernels do not know: a name, a gate, or a number (at its ends a divergence is another
    one).
    """
    row = DIVERGENCES.get(divergence)
    if row is None or row.code is None:
        known = ", ".join(name for name, other in DIVERGENCES.items() if other.code is not None)
        raise ValueError(f"divergence is {divergence!r}; expected one of {known}")
    if row.ends and not 0.0 < parameter < 1.0:
        raise ValueError(f"parameter is {parameter}; {divergence} needs one between 0 and 1, both excluded")
    if "gate" in row.parameters:
        PARAMETERS["gate"].check(gate)
    return row
