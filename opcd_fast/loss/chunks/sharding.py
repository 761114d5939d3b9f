"""Heads that do not lie whole on one rank: slices of the vocabulary, and parameters that are gathered first.

A vocabulary-parallel head (Megatron's column-parallel lm-head) stays where it is: each rank computes the logits of
its slice, the row statistics of all slices are merged, and the hidden states' gradient is summed. A head sharded by
FSDP2 (a DTensor) is gathered, once per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opcd_fast.loss.chunks.rows import refuse_capture
from opcd_fast.loss.chunks.spec import Spec, Wanted


def gather(group: str) -> Callable[[Tensor], Tensor]:
    """A function (planes, n) -> (world, planes, n) that stacks every rank's tensor in rank order."""
    import torch.distributed as dist

    process_group = _resolve(group)
    world = dist.get_world_size(process_group)
    # torch 2.13 renamed it
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def gathered(planes: Tensor) -> Tensor:
        out = planes.new_empty(world, *planes.shape)
        all_gather(out.view(-1), planes.contiguous().view(-1), group=process_group)
        return out

    return gathered


def sum_(tensor: Tensor, group: str) -> Tensor:
    """Add up every rank's tensor, in place."""
    import torch.distributed as dist

    dist.all_reduce(tensor, group=_resolve(group))
    return tensor


def slices(
    spec: Spec, wanted: Wanted, rows: int, device: torch.device, multiprocessors: int, largest: float
) -> tuple[int, int, int, float]:
    """(vocabulary entries on the ranks before this one, most entries on any rank, multiprocessors of the first rank,
    the `largest` of any rank); synchronises with a device once.

    Chunks are cut for the largest slice and the first rank's device: ranks that cut their own would not meet in the
    same collectives. For the same reason all ranks must want the same gradients of the same rows in the same workspace.

    Raises ValueError, on every rank, when they do not.
    """
    import torch.distributed as dist

    refuse_capture(device, "a loss over a sharded head")
    mine = [spec.vocab_size, rows, spec.workspace_bytes or 0, *map(int, wanted), largest, multiprocessors]
    # float64 holds every integer that occurs here
    ranks = gather(spec.group)(torch.tensor(mine, dtype=torch.float64, device=device).unsqueeze(1)).squeeze(2).tolist()
    for name, place in (("rows of non-zero weight", 1), ("workspace_bytes", 2), ("hidden states that require grad", 3),
                        ("head weights that require grad", 4), ("head biases that require grad", 5)):  # fmt: skip
        if len({rank[place] for rank in ranks}) > 1:
            raise ValueError(
                f"the ranks of a sharded head differ in {name}: {[int(rank[place]) for rank in ranks]}; they must "
                "agree, because all of them compute the same loss"
            )
    sizes = [int(rank[0]) for rank in ranks]
    before = sum(sizes[: dist.get_rank(_resolve(spec.group))])
    return before, max(sizes), int(ranks[0][-1]), max(rank[6] for rank in ranks)


def raise_together(error: ValueError | None, group: str, device: torch.device) -> None:
    """Raise the error that this rank has found, or that another one has, on every rank."""
    found = gather(group)(torch.tensor([[float(error is not None)]], device=device))
    if error is not None:
        raise error
    if bool(found.any()):
        ranks = found.view(-1).nonzero().view(-1).tolist()
        raise ValueError(f"the inputs on rank(s) {ranks} of the sharded head are not usable; see the error there")


def _resolve(group: str) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group)  # type: ignore[arg-type]


def whole(weight: Tensor | None) -> Tensor | None:
    """The full tensor of a parameter that FSDP2 has sharded; a plain tensor as it is.

    The gradient that flows back is averaged over the ranks and sharded again, which is what FSDP2 does with the
    gradients of a module's own forward.
    """
    if weight is None:
        return None
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    mesh = weight.device_mesh
    full = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad and torch.is_grad_enabled():
        ranks = mesh.size()
        full.register_hook(lambda gradient: gradient / ranks)
    return full
