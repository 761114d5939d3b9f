"""The prefixes of one teacher: built when they are needed, shared where contexts begin alike, bounded in memory.

A context that is not in memory is read, after the longest beginning that it shares with others
(`teacher.prefix.nested`), which is read once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from opcd_fast.models import seam
from opcd_fast.teacher.prefix.chunked_prefill import refuses_chunks
from opcd_fast.teacher.prefix.nested import Beginning, shared_beginnings
from opcd_fast.teacher.prefix.shared import SharedPrefix

Place = tuple[int, int]  # a prefix is known by the first context that begins with it, and its length


class PrefixMemory:
    """Prefixes of `contexts`, each (P,) int64 on the CPU, of `model` as it is when one is asked for.

    max_bytes: when the prefixes in memory hold more bytes of keys and values, those used longest ago are dropped; None
    for no bound. device: where keys and values are kept, None for the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        contexts: Sequence[Tensor],
        max_bytes: int | None,
        *,
        device: torch.device | None = None,
    ) -> None:
        self._model, self._contexts = model, contexts
        self._max_bytes, self._device = max_bytes, device
        self._held: OrderedDict[Place, SharedPrefix] = OrderedDict()  # the last one was used last
        self.tokens_read = self.built = self.evicted = 0

    def __len__(self) -> int:
        """Contexts whose prefix is in memory."""
        return sum(place in self._held for place in self._places)

    def __getitem__(self, index: int) -> SharedPrefix:
        return self._held[self._places[index]]

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self._held.values())

    def get(self, wanted: Iterable[int], *, extendable: bool, keep_kv: bool = True) -> dict[int, SharedPrefix]:
        """Prefixes of the contexts `wanted`, under the weights and adapters of this moment.

        extendable: contexts may be read in chunks, and after a beginning they share, if the model allows that.
        """
        indices = sorted(set(wanted))
        extendable = extendable and keep_kv and refuses_chunks(seam.body_of(self._model)) is None
        missing = [index for index in indices if self._places[index] not in self._held]
        needed = {self._places[index] for index in indices}
        for index in missing:
            needed.update(self._chain(index))
        for index in missing:
            self._add(index, needed, extendable, keep_kv)
        if missing:
            self._drop_used_up_beginnings()
        for index in indices:
            self._held.move_to_end(self._places[index])
        return {index: self[index] for index in indices}

    def trim(self) -> None:
        """Drop the prefixes used longest ago until the bound holds; for the end of a call."""
        self._evict(set())

    def forget(self) -> None:
        """Drop all prefixes."""
        self._held.clear()

    def explain(self) -> list[str]:
        """What is held and how it came about, in words."""
        if not self._held:
            return ["prefix KV: not built yet"]
        beginnings = len(self._held.keys() - set(self._places))
        shared = f" and {beginnings} shared beginnings" if beginnings else ""
        bound = "" if self._max_bytes is None else f" of at most {self._max_bytes / 2**20:.1f} MiB"
        return [
            f"prefix KV: {self.nbytes / 2**20:.1f} MiB{bound} ({len(self)} of {len(self._contexts)} contexts built"
            f"{shared}), read by a batch of any size",
            f"prefixes read by the model: {self.built} ({self.tokens_read} tokens); evicted: {self.evicted}",
            *self._explain_storage(),
        ]

    def _explain_storage(self) -> list[str]:
        if self._device is None:
            return []
        places: Counter[str] = Counter()
        for prefix in self._held.values():
            places.update(prefix.nbytes_by_device)
        bytes_at = ", ".join(f"{count / 2**20:.1f} MiB on {place}" for place, count in sorted(places.items()))
        return [f"kept on {self._device}: {bytes_at}; layers kept elsewhere than the model come over one by one"]

    # --- one prefix -----------------------------------------------------------------------------------------

    def _add(self, index: int, needed: set[Place], extendable: bool, keep_kv: bool) -> None:
        """Put the prefix of context `index` into memory, and the shared beginnings it is read after."""
        chain = self._chain(index) if extendable else [self._places[index]]
        known = max((place for place, part in enumerate(chain) if part in self._held), default=-1)
        after = None if known < 0 else self._held[chain[known]]
        for place in chain[known + 1 :]:
            self._held[place] = after = self._build(place, after, extendable, keep_kv)
        self._evict(needed)

    def _build(self, place: Place, after: SharedPrefix | None, extendable: bool, keep_kv: bool) -> SharedPrefix:
        self.built += 1
        self.tokens_read += place[1] - (0 if after is None else len(after))
        return SharedPrefix.build(
            self._model, self._contexts[place[0]][: place[1]], keep_kv=keep_kv,
            chunk_tokens=None if extendable else 0, after=after, device=self._device,
        )  # fmt: skip

    # --- places ---------------------------------------------------------------------------------------------

    @cached_property
    def _beginnings(self) -> list[list[Beginning]]:
        return shared_beginnings(self._contexts)

    @cached_property
    def _places(self) -> list[Place]:
        """Of each context; contexts with the same tokens have the same place."""
        places = [(index, context.numel()) for index, context in enumerate(self._contexts)]
        for index, beginnings in enumerate(self._beginnings):
            if beginnings and beginnings[-1].length == places[index][1]:
                places[index] = beginnings[-1].place
        return places

    def _chain(self, index: int) -> list[Place]:
        """The shared beginnings of context `index`, the shortest first, and itself."""
        return list(dict.fromkeys([*(beginning.place for beginning in self._beginnings[index]), self._places[index]]))

    # --- dropping -------------------------------------------------------------------------------------------

    def _evict(self, needed: set[Place]) -> None:
        if self._max_bytes is None:
            return
        total = self.nbytes
        for place in list(self._held):
            if total <= self._max_bytes:
                return
            if place not in needed:
                total -= self._held.pop(place).nbytes
                self.evicted += 1

    def _drop_used_up_beginnings(self) -> None:
        """A beginning whose contexts are all in memory would only take space."""
        unused = self._held.keys() - set(self._places)
        for index in {place[0] for place in unused}:
            for beginning in self._beginnings[index]:
                if beginning.place in unused and all(self._places[i] in self._held for i in beginning.members):
                    self._held.pop(beginning.place, None)
