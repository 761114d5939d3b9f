"""Which kernel turns two rows of logits into statistics and a gradient, for a divergence, a backend and a device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opcd_fast.kernels.csrc import native
from opcd_fast.kernels.reference import DIVERGENCES, Logits, differences, divergences, topk
from opcd_fast.loss.chunks import sharding
from opcd_fast.loss.chunks.spec import Spec


def scratch_planes(spec: Spec) -> tuple[int, int]:
    """(block, V) buffers that a row operation needs beside the logits: as its scratch, and what it allocates itself."""
    if DIVERGENCES[spec.divergence].code is None:
        # About eight (block, k) tensors beside two of the whole width.
        k = min(int(spec.parameter), spec.vocab_size)
        return topk.scratch_planes(spec.softcap_s), 2 + -(-8 * k // spec.vocab_size)
    if spec.backend == "triton":
        return 0, 0
    if spec.projection == "difference":  # in float64
        return 2 * divergences.scratch_planes(None), 8
    if spec.backend == "native" and not spec.group:
        return 0, 0
    return divergences.scratch_planes(spec.softcap_s), 4 if spec.divergence == "gated_kl" else 3


def divergence_rows(
    spec: Spec,
    student: Logits,
    teacher: Logits,
    row_weights: Tensor,
    statistics: Tensor,
    gradient: Tensor | None,
    scratch: Tensor | None,
    first_column: int = 0,  # of this rank's slice of the vocabulary
) -> None:
    """Arguments as in `kernels.reference`, of `divergence_rows` or, for differences, `difference_rows`."""
    arguments = (student, teacher, row_weights, statistics, gradient)
    options: dict[str, Any] = {"all_statistics": spec.all_statistics, "scratch": scratch}
    if DIVERGENCES[spec.divergence].code is None:
        topk.topk_reverse_kl_rows(*arguments, k=int(spec.parameter), tail=spec.option, **options)
        return
    options |= {"divergence": spec.divergence, "parameter": spec.parameter}
    if spec.divergence == "gated_kl":
        options["gate"] = spec.option
    if spec.group:
        options |= {"gather": sharding.gather(spec.group), "first_column": first_column}
    if spec.backend == "triton":
        from opcd_fast.kernels import triton

        triton.divergence_rows(*arguments, difference=spec.projection == "difference", **options)
    elif spec.projection == "difference":
        differences.difference_rows(*arguments, **options)
    elif spec.backend == "native" and not spec.group:
        native.divergence_rows(*arguments, **options)
    else:
        divergences.divergence_rows(*arguments, **options)
