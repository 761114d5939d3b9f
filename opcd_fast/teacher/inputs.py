"""What a teacher is given, checked: contexts, and which of them each sequence continues."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from opcd_fast.runtime import token_ids


def as_contexts(contexts: Any, vocabulary: int | None) -> list[Tensor]:
    """One context or a list of them, as int64 tensors on the CPU. Raises ValueError."""
    if isinstance(contexts, Iterable) and not isinstance(contexts, Tensor | str | Mapping):
        contexts = list(contexts)  # which may be an iterator
        if not all(isinstance(item, Integral) for item in contexts):
            return [as_ids(f"contexts[{i}]", ids, vocabulary) for i, ids in enumerate(contexts)]
    return [as_ids("contexts", contexts, vocabulary)]


def as_ids(name: str, ids: Any, vocabulary: int | None) -> Tensor:
    """(T,) int64 on the CPU. Raises ValueError for all but integers below `vocabulary`."""
    return torch.tensor(token_ids(name, ids, vocabulary), dtype=torch.int64)


def check_range(name: str, ids: Tensor, vocabulary: int | None) -> None:
    """Raises ValueError for ids that the host can see and the vocabulary does not have."""
    if vocabulary is None or type(ids) is not Tensor or ids.device.type != "cpu" or not ids.numel():
        return
    least, most = (int(x) for x in ids.aminmax())
    if not 0 <= least <= most < vocabulary:
        raise ValueError(f"{name}: token ids must lie in [0, {vocabulary}), got {least}…{most}")


def check_tensors(**given: Any) -> None:
    """Raises ValueError for one that is something else; None is left to the caller."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got a {type(value).__name__}")


def context_of_sequence(context_index: Any, batch: int, contexts: int) -> list[int]:
    """`context_index` as a list of `batch` integers below `contexts`. Raises ValueError."""
    if context_index is None:
        if contexts > 1:
            raise ValueError(f"context_index: needed to choose among {contexts} contexts, shape ({batch},)")
        return [0] * batch
    try:
        index = [*map(operator.index, context_index.tolist() if isinstance(context_index, Tensor) else context_index)]
    except TypeError:
        index = []
    if len(index) != batch or not all(0 <= i < contexts for i in index):
        raise ValueError(f"context_index: expected {batch} integers from 0 to {contexts - 1}, got {context_index}")
    return index


def check_contexts_fit(contexts: Sequence[Tensor], limit: int | None) -> None:
    """Raises ValueError when a context leaves no room for a sequence in `limit` tokens."""
    longest = max(context.numel() for context in contexts)
    if limit is not None and longest >= limit:
        raise ValueError(
            f"contexts: {longest} tokens leave no room in the model's max_position_embeddings {limit}: "
            f"shorten the context by at least {longest - limit + 1}"
        )


def check_sequences_fit(lengths: Sequence[int], context_lengths: Sequence[int], limit: int | None) -> None:
    """Raises ValueError when a sequence with its context has more than `limit` tokens. Nothing is ever cut."""
    for sequence, (tokens, context) in enumerate(zip(lengths, context_lengths, strict=True)):
        if limit is not None and context + tokens > limit:
            raise ValueError(
                f"input_ids: sequence {sequence} has {tokens} tokens after a context of {context}; "
                f"together {context + tokens - limit} more than the model's max_position_embeddings of {limit}"
            )


def check_select(select: Tensor | None, tokens: int) -> None:
    """Raises ValueError unless `select` is None or (M,) integers from 0 to tokens - 1."""
    if select is None:
        return
    if select.ndim != 1 or select.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"select: expected integer positions of shape (M,), got {select.dtype} {tuple(select.shape)}")
    if select.numel():
        least, most = torch.stack(select.aminmax()).tolist()  # both at once: on a device, asking waits for it
        if not 0 <= least <= most < tokens:
            raise ValueError(f"select: positions must lie in [0, {tokens}), got {least}…{most}")


def check_bytes(name: str, value: int | None) -> None:
    """Raises ValueError unless `value` is None or a whole number >= 1."""
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{name}: expected an integer >= 1, or None, got {value!r}")


def as_device(place: str | torch.device | None) -> torch.device | None:
    """Raises ValueError for what names no device."""
    try:
        return None if place is None else torch.device(place)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"prefix_device: expected 'cpu', another device, or None, got {place!r}") from error
