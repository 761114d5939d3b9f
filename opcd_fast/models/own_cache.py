"""Rows that go on from their prompts on copies of the model's own cache: for recurrent layers, whose states no packed
row keeps apart.

What all prompts begin with is read once, and its keys, values and states are copied for each prompt. Prompts that go on
for equally many tokens are read together: padding would enter a state. Only then are the rows put side by side, keys
padded on the left, which a mask takes out of attention.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from opcd_fast.attention import on_device
from opcd_fast.models import seam
from opcd_fast.models.architectures import refuses_pad
from opcd_fast.models.caches import is_recurrent


def refuses_own_cache(model: nn.Module) -> str | None:
    """Why rows cannot go on from copies of this model's cache, in words; None when they can."""
    body = seam.body_of(model)
    if not is_recurrent(body):
        return "it has no recurrent layers"
    if seam.prompt_learner(model) is not None:
        return "its adapter is a trained prefix"
    return refuses_pad(body)


class OwnCache:
    """The rows of one batch, a token longer with every `next`.

    model: a causal LM that `refuses_own_cache` does not refuse. prompts: token ids, none empty, of which the first
    `shared` are the same in all. prompt_of: (B,) the prompt of each row.
    """

    def __init__(
        self, model: nn.Module, prompt_of: Sequence[int], prompts: Sequence[Sequence[int]], shared: int
    ) -> None:
        if shared and any(len(prompt) == shared + 1 for prompt in prompts):
            shared -= 2  # one token alone after a state takes another way through some layers, see `rollout.check`
        self.model, self._prompt_of, self._prompts, self._shared = model, prompt_of, prompts, shared
        self._device = next(model.parameters()).device
        self.cache: Any = DynamicCache(config=seam.config_of(seam.body_of(model)))
        self.width = max(map(len, prompts))  # tokens of a row, with those that it is padded by
        self.layout = len(prompt_of), self.width

    def read_prompts(self) -> Tensor:
        """(B, V) logits after the prompts."""
        last = None
        if self._shared:
            last = self._forward(self.cache, self._tensor([self._prompts[0][: self._shared]]), 0)
        by_length: dict[int, list[int]] = {}
        for which, prompt in enumerate(self._prompts):
            by_length.setdefault(len(prompt), []).append(which)
        caches, logits = [], []
        for length, members in by_length.items():
            cache = copy.deepcopy(self.cache)
            cache.reorder_cache(self._tensor([0] * len(members)))
            if length > self._shared:
                rest = self._tensor([self._prompts[which][self._shared :] for which in members])
                logits.append(self._forward(cache, rest, self._shared))
            else:
                assert last is not None, "an empty prompt"
                logits.append(last.expand(len(members), -1))
            caches.append((cache, self.width - length))
        self.cache = _side_by_side(caches)
        order = [which for members in by_length.values() for which in members]
        place = {which: row for row, which in enumerate(order)}
        rows = self._tensor([place[which] for which in self._prompt_of])
        self.padding = self._tensor([self.width - len(self._prompts[which]) for which in order])
        self._ragged = len(by_length) > 1
        self.keep(rows)
        return torch.cat(logits)[rows]

    def extend(self) -> None:
        """Room for one more token: before every `next`."""
        self.width += 1

    def rows_that_stay(self, going: int) -> int:
        return going

    def keep(self, rows: Tensor) -> None:
        """Only these rows stay, in this order."""
        self.cache.reorder_cache(rows)
        self.padding = self.padding[rows]

    def next(self, tokens: Tensor) -> Tensor:
        """(B, V) logits after one more token each, (B,)."""
        mask = None
        if self._ragged:
            mask = (torch.arange(self.width, device=self._device) >= self.padding[:, None]).long()
        return self._forward(self.cache, tokens[:, None], self.width - 1 - self.padding[:, None], mask)

    def _forward(self, cache: Any, ids: Tensor, start: int | Tensor, mask: Tensor | None = None) -> Tensor:
        positions = start + torch.arange(ids.shape[1], device=self._device).expand_as(ids)
        given = {} if mask is None else {"attention_mask": mask}
        return self.model(
            input_ids=ids, position_ids=positions, **seam.cache_argument(self.model, cache), **given, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip

    def _tensor(self, values: Any) -> Tensor:
        return on_device(torch.tensor(values), self._device)


def _side_by_side(caches: Sequence[tuple[Any, int]]) -> Any:
    """One cache with the rows of all, in this order; keys and values padded on the left by so many tokens."""
    whole, _ = caches[0]
    for index, layer in enumerate(whole.layers):
        layers = [(cache.layers[index], padding) for cache, padding in caches]
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                padded = [nn.functional.pad(getattr(one, name), (0, 0, padding, 0)) for one, padding in layers]
                setattr(layer, name, torch.cat(padded))
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name, {})
            for place, state in states.items():
                if state is not None:
                    states[place] = torch.cat([getattr(one, name)[place] for one, _ in layers])
    return whole
