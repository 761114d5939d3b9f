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


def slices(group: str, columns: int, device: torch.device) -> tuple[int, int]:
    """(vocabulary entries on the ranks before this one, most entries on any rank); synchronises with a device once.

    Chunks are cut for the largest slice: ranks that cut their own would not meet in the same collectives.
    """
    import torch.distributed as dist

    sizes = [int(size) for size in gather(group)(torch.full((1, 1), float(columns), device=device)).view(-1).tolist()]
    return sum(sizes[: dist.get_rank(_resolve(group))]), max(sizes)


def _resolve(group: str) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group)  # type: ignore[arg-type]


def whole(weight: Tensor | None, name: str) -> Tensor | None:
    """The full tensor of a parameter that FSDP2 has sharded; a plain tensor as it is.

    The gradient that flows back is averaged over the ranks and sharded again, which is what FSDP2 does with the
    gradients of a module's own forward.

    Raises ValueError for a parameter that DeepSpeed ZeRO-3 has partitioned: only its own context gathers those.
    """
    if weight is None:
        return None
    if hasattr(weight, "ds_shape") and weight.numel() == 0:
        raise ValueError(
            f"{name} is partitioned by ZeRO-3 and empty on this rank; compute the loss inside "
            "deepspeed.zero.GatheredParameters([head.weight]) or inside the module's forward"
        )
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
