"""What one call of a fused loss asks for, as scalars: the part of its arguments that is not a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Wanted(NamedTuple):
    """Which gradients the caller will use."""

    hidden: bool
    weight: bool
    bias: bool


NOTHING = Wanted(False, False, False)


@dataclass(frozen=True)
class Spec:
    """The scalars of one call."""

    scale_s: float
    scale_t: float
    softcap_s: float | None
    softcap_t: float | None
    temperature: float
    vocab_size: int  # valid entries, the same for both sides; of this rank's slice when the head is sharded
    workspace_bytes: int | None
    backend: str  # "torch", "triton" or "native", resolved
    all_statistics: bool
    divergence: str = "reverse_kl"
    parameter: float = 0.0  # beta of jsd, alpha of the skewed ones, k of the truncated one
    tail: str = "none"  # of the truncated one
    group: str = ""  # name of the process group over which the head is sharded; "" for none
