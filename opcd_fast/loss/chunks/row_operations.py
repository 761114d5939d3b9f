"""Which kernel turns two rows of logits into statistics and a gradient, for a divergence, a backend and a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from opcd_fast.kernels.csrc import native
from opcd_fast.kernels.reference import divergences as divergence_rows
from opcd_fast.kernels.reference import reverse_kl as reference
from opcd_fast.kernels.reference import topk as topk_rows
from opcd_fast.loss.chunks import sharding
from opcd_fast.loss.chunks.spec import Spec

# Below this many rows one program per row leaves multiprocessors idle, so each row is split over several.
FEW_ROWS = 128


class RowOperation(NamedTuple):
    """run has the signature of `reference.reverse_kl_rows`. It needs (block, V) buffers beside the logits: `planes` of
    them as its argument `scratch`, and `temporaries` that it allocates itself."""

    run: Callable[..., None]
    planes: int = 0
    temporaries: int = 0


def row_operation(spec: Spec, rows: int, first_column: int = 0) -> RowOperation:
    """The operation for logit chunks of at most `rows` rows. first_column: of this rank's slice of the vocabulary."""
    options: dict[str, Any] = {
        "scale_s": spec.scale_s,
        "scale_t": spec.scale_t,
        "softcap_s": spec.softcap_s,
        "softcap_t": spec.softcap_t,
        "temperature": spec.temperature,
        "all_statistics": spec.all_statistics,
    }
    if spec.divergence == "topk_reverse_kl":
        planes, k = topk_rows.scratch_planes(spec.softcap_s), int(spec.parameter)
        # About eight (block, k) tensors beside two of the whole width.
        temporaries = 2 + -(-8 * min(k, spec.vocab_size) // spec.vocab_size)
        return RowOperation(
            partial(topk_rows.topk_reverse_kl_rows, k=k, tail=spec.tail, **options), planes, temporaries
        )
    if spec.divergence == "reverse_kl" and not spec.group:
        if spec.backend == "torch":
            return RowOperation(partial(reference.reverse_kl_rows, **options), reference.scratch_planes(spec.softcap_s))
        if spec.backend == "triton" and rows > FEW_ROWS:
            from opcd_fast.kernels.triton import reverse_kl_rows

            return RowOperation(partial(reverse_kl_rows, **options))
    shared: dict[str, Any] = {"divergence": spec.divergence, "parameter": spec.parameter, **options}
    if spec.group:
        shared["gather"] = sharding.gather(spec.group)
        shared["first_column"] = first_column
    if spec.backend == "triton":
        from opcd_fast.kernels.triton import divergences as triton_divergence_rows

        return RowOperation(partial(triton_divergence_rows.divergence_rows, **shared))
    if spec.backend == "native" and not spec.group:
        return RowOperation(partial(native.divergence_rows, **shared))
    return RowOperation(
        partial(divergence_rows.divergence_rows, **shared), divergence_rows.scratch_planes(spec.softcap_s), 3
    )
