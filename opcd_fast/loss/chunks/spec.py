"""What one call of a fused loss asks for, as scalars: the part of its arguments that is not a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from opcd_fast.kernels.reference import Logits


class Wanted(NamedTuple):
    """Which gradients the caller will use."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, trained: bool, *tensors: Tensor | None) -> Wanted:
        return cls(*(trained and tensor is not None and tensor.requires_grad for tensor in tensors))


NOTHING = Wanted(False, False, False)


@dataclass(frozen=True)
class Spec:
    """The scalars of one call."""

    vocab_size: int  # valid entries, the same for both sides; of this rank's slice when the head is sharded
    workspace_bytes: int | None = None
    backend: str = "auto"  # "torch", "triton" or "native" once it is resolved
    all_statistics: bool = False
    scale_s: float = 1.0
    scale_t: float = 1.0
    softcap_s: float | None = None
    softcap_t: float | None = None
    temperature: float = 1.0
    divergence: str = "reverse_kl"
    parameter: float = 0.0  # the number and
    option: str = ""  # the word among its parameters
    group: str = ""  # name of the process group over which the head is sharded; "" for none
    projection: str = "separate"  # or "difference", or "auto" until it is resolved
    keep: bool = True  # the workspace, for the next call; a compiled call may lie in a graph's own memory

    def student(self, z: Tensor, bias: Tensor | None) -> Logits:
        return Logits(z, bias, self.scale_s, self.softcap_s, self.temperature)

    def teacher(self, z: Tensor, bias: Tensor | None) -> Logits:
        return Logits(z, bias, self.scale_t, self.softcap_t, self.temperature)

    def packed(self) -> tuple[Any, ...]:
        """As an operator's arguments, whose schema knows no records and no lists of words."""
        numbers = [self.scale_s, self.scale_t, self.softcap_s or 0.0, self.softcap_t or 0.0, self.temperature]
        words = (self.backend, self.divergence, self.option, self.group, self.projection, "keep" if self.keep else "")
        return self.vocab_size, self.workspace_bytes, self.all_statistics, [*numbers, self.parameter], "\n".join(words)

    @classmethod
    def unpacked(
        cls, vocab_size: int, workspace_bytes: int | None, all_statistics: bool, numbers: Sequence[float], words: str
    ) -> Spec:
        """What `packed` has packed."""
        scale_s, scale_t, softcap_s, softcap_t, temperature, parameter = numbers
        backend, divergence, option, group, projection, keep = words.split("\n")
        return cls(
            vocab_size, workspace_bytes, backend, all_statistics, scale_s, scale_t, softcap_s or None,
            softcap_t or None, temperature, divergence, parameter, option, group, projection, keep == "keep",
        )  # fmt: skip
