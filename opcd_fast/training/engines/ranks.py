"""Several processes that make one step together, and what they must agree on.

Every rank holds the same settings and prompts. A step's answers are sent to all ranks, which are then as well informed
as a single process, and each scores a share of them; what is written to disk is written by rank 0. Everything here
works on the CPU over gloo, whatever moves gradients, and does nothing where there is one process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from opcd_fast.data import Sample, count_tokens, prompt_runs
from opcd_fast.errors import InputError

T = TypeVar("T")


class OtherRankError(InputError):
    """Another rank failed and says why; raised on this one so that it ends too. Not to be shown twice."""


@dataclass(frozen=True)
class Round:
    """One micro-batch of this rank. `empty`: it has none left, and runs a filler, which must count for nothing, because
    others do."""

    samples: list[Sample]
    empty: bool = False


class Ranks:
    """This process among those that torch.distributed knows, or (`alone`) the only one whatever it knows.

    All methods but those that only choose a part are collective: every rank calls them in the same order.
    """

    def __init__(self, alone: bool = False) -> None:
        distributed = not alone and torch.distributed.is_available() and torch.distributed.is_initialized()
        self.world = torch.distributed.get_world_size() if distributed else 1
        self.rank = torch.distributed.get_rank() if distributed else 0

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    @cached_property
    def _group(self) -> Any:
        """Objects and CPU tensors travel over gloo, also where gradients travel over NCCL."""
        if torch.distributed.get_backend() == "gloo":
            return torch.distributed.group.WORLD
        return torch.distributed.new_group(backend="gloo")

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Small things: they are pickled."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def gather_lists(self, values: Sequence[T]) -> list[T]:
        """All ranks' items, one after the other; their tensors on the CPU where they come from several ranks."""
        mine = list(values)
        if self.world > 1:  # a pickled CUDA tensor would come out on the GPU of the rank that sent it
            mine = [map_tensors(item, Tensor.cpu) for item in mine]
        return [item for part in self.gather(mine) for item in part]

    def first(self, value: T | None) -> T | None:
        """The value of the first rank that has one; None where none has."""
        return next((found for found in self.gather(value) if found is not None), None)

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value on every rank. Tensors inside of dicts, lists and dataclasses travel one by one."""
        if self.world == 1:
            return value  # type: ignore[return-value]
        tensors: list[Tensor] = []

        def put(tensor: Tensor) -> _Slot:
            tensors.append(tensor.detach().cpu().contiguous())
            return _Slot(len(tensors) - 1)

        outline = map_tensors(value, put) if self.main else None
        skeleton: list[Any] = [outline, [(t.shape, t.dtype) for t in tensors]]
        torch.distributed.broadcast_object_list(skeleton, src=0, group=self._group)
        if not self.main:
            tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in skeleton[1]]
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0, group=self._group)
        if self.main:
            return value  # type: ignore[return-value]
        return map_leaves(skeleton[0], lambda leaf: tensors[leaf.index] if isinstance(leaf, _Slot) else leaf)

    def together(self, work: Callable[[], T]) -> T:
        """`work()` on every rank; where it fails on some, all raise: those their own error, the others that one.

        Collective calls inside of `work` must be ones that a failing rank has made too, or will not be waited for.
        """
        if self.world == 1:
            return work()
        value, error = None, None
        try:
            value = work()
        except Exception as caught:
            error = caught
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        failed = [rank for rank, message in enumerate(told) if message is not None]
        if not failed:
            return value  # type: ignore[return-value]
        if self.rank == failed[0]:
            assert error is not None
            raise error
        raise OtherRankError(f"rank {failed[0]} failed: {told[failed[0]]}") from error

    def on_main(self, work: Callable[[], T]) -> T:
        """`work()` on rank 0 alone; its value, or its error, on every rank."""
        if self.world == 1:
            return work()
        return self.broadcast(self.together(lambda: work() if self.main else None))

    def check_alike(self, facts: Mapping[str, Any]) -> None:
        """Raise InputError, on every rank, where `facts` differ between ranks."""
        told = self.gather(dict(facts))
        for name in told[0]:
            found = [one.get(name) for one in told]
            if any(value != found[0] for value in found):
                raise InputError(f"{name} differs between ranks ({found!r:.300}); start all of them with the same")

    def stream(self, purpose: str) -> str:
        """Name of a random stream that differs between ranks; rank 0 has that of a single process."""
        return f"{purpose}/{self.rank}" if self.rank else purpose

    def share(self, items: Sequence[T], costs: Sequence[int]) -> list[T]:
        """This rank's part of `items`, in order. The same items and costs on every rank; no communication.

        The most expensive item goes to the rank that has least so far (Graham's longest-processing-time rule).
        """
        loads = [0] * self.world
        mine = []
        for index in sorted(range(len(items)), key=lambda i: (-costs[i], i)):
            rank = loads.index(min(loads))
            loads[rank] += costs[index]
            if rank == self.rank:
                mine.append(index)
        return [items[index] for index in sorted(mine)]

    def share_samples(self, samples: Sequence[Sample]) -> list[Sample]:
        """This rank's part of a step's samples; neighbours with one prompt stay together."""
        if self.world == 1:
            return list(samples)
        runs = prompt_runs(samples)
        return [sample for run in self.share(runs, [count_tokens(run) for run in runs]) for sample in run]

    def part(self, count: int) -> range:
        """This rank's part of `count` neighbours, as equal as can be."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def rounds(self, groups: Iterator[list[Sample]], samples: Sequence[Sample]) -> Iterator[Round]:
        """This rank's micro-batches, and fillers until every rank is done: all must meet in the same collectives.

        samples: all of the step's, of which the first is cut down to a filler.
        """
        mine = list(groups)
        count = max(self.gather(len(mine)))
        known = samples[0].logprobs
        filler = [replace(samples[0], response=samples[0].response[:1], logprobs=None if known is None else known[:1])]
        for index in range(count):
            empty = index >= len(mine)
            yield Round(filler if empty else mine[index], empty)


@dataclass(frozen=True)
class _Slot:
    index: int


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with `change` applied to every tensor inside of its dicts, lists, tuples and dataclasses."""
    return map_leaves(value, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map_leaves(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, _Slot)):
        changed = {f.name: map_leaves(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return type(value)(**changed)
    return change(value)
