"""The prefixes of one teacher: built when they are needed, shared where contexts begin alike, bounded in memory.

Looked for in this order: in memory; in the store on disk; else the context is read, after the longest beginning that
it shares with others (`nested_contexts`), which is read once.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from opcd_fast import fingerprint
from opcd_fast import transformers_seam as seam
from opcd_fast.architectures import moving_rope
from opcd_fast.chunked_prefill import refuses_chunks
from opcd_fast.nested_contexts import Beginning, shared_beginnings
from opcd_fast.prefix import SharedPrefix
from opcd_fast.prefix_store import PrefixStore, identity_of

logger = logging.getLogger("opcd_fast")

Place = tuple[int, int]  # a prefix is known by the first context that begins with it, and its length


class PrefixMemory:
    """Prefixes of `contexts`, each (P,) int64 on the CPU, of `model` with its adapters as `adapter` says.

    max_bytes: when the prefixes in memory hold more bytes of keys and values, those used longest ago are dropped; None
    for no bound. store: where prefixes are kept between runs, or None. device, dtype: where and in which type keys and
    values are kept, None for the model's; shared beginnings stay in the model's type as long as they are needed.
    """

    def __init__(
        self,
        model: nn.Module,
        contexts: Sequence[Tensor],
        adapter: str,
        store: PrefixStore | None,
        max_bytes: int | None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._device, self._dtype = device, dtype
        self._model, self._contexts, self._adapter = model, contexts, adapter
        self._store, self._max_bytes = store, max_bytes
        self._store_unused = "no store" if store is None else ""  # why; empty while it is used
        self._weights: str | None = None  # fingerprint of the weights that the prefixes in memory come from
        self._identity: str | None = None
        self._held: OrderedDict[Place, SharedPrefix] = OrderedDict()  # the last one was used last
        self.tokens_read = self.built = self.loaded = self.evicted = 0

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
        if missing and keep_kv:
            self._look_at_weights()
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

    def forget(self, *, weights_moved: bool) -> None:
        """Drop all prefixes. After `weights_moved` the store is neither read nor written any more."""
        self._held.clear()
        self._weights = self._identity = None
        if weights_moved:
            self.leave_store("the teacher's weights change")

    def leave_store(self, reason: str) -> None:
        """Stop reading and writing the store; says why once."""
        if not self._store_unused:
            self._store_unused = reason
            logger.warning("prefix store: not used, because %s", reason)

    def explain(self) -> list[str]:
        """What is held and how it came about, in words."""
        if not self._held:
            return ["prefix KV: not built yet", *self.explain_store()]
        beginnings = len(self._held.keys() - set(self._places))
        shared = f" and {beginnings} shared beginnings" if beginnings else ""
        bound = "" if self._max_bytes is None else f" of at most {self._max_bytes / 2**20:.1f} MiB"
        return [
            f"prefix KV: {self.nbytes / 2**20:.1f} MiB{bound} ({len(self)} of {len(self._contexts)} contexts built"
            f"{shared}), read by a batch of any size",
            f"prefixes read by the model: {self.built} ({self.tokens_read} tokens); from the store: {self.loaded}; "
            f"evicted: {self.evicted}",
            *self._explain_storage(),
            *self.explain_store(),
        ]

    def _explain_storage(self) -> list[str]:
        lines = []
        if self._device is not None:
            places: Counter[str] = Counter()
            for prefix in self._held.values():
                places.update(prefix.nbytes_by_device)
            bytes_at = ", ".join(f"{count / 2**20:.1f} MiB on {place}" for place, count in sorted(places.items()))
            lines.append(
                f"kept on {self._device}: {bytes_at}; layers kept elsewhere than the model come over one ahead"
            )
        if self._dtype is not None:
            kind = str(self._dtype).removeprefix("torch.")
            lines.append(f"kept as {kind}, keys scaled by channel and values by head: each number is up to 2^-4 off")
        return lines

    def explain_store(self, unused: str = "") -> list[str]:
        """One line when there is a store. unused: why it is not used, for a reason that is not known here."""
        if self._store is None:
            return []
        unused = self._store_unused or unused
        return [f"store: {self._store.folder}" + (unused and f", not used: {unused}")]

    # --- one prefix -----------------------------------------------------------------------------------------

    def _add(self, index: int, needed: set[Place], extendable: bool, keep_kv: bool) -> None:
        """Put the prefix of context `index` into memory, and the shared beginnings it is read after."""
        *beginnings, place = self._chain(index)
        if self._find(place, keep_kv) is None:
            after: SharedPrefix | None = None
            if not extendable:
                beginnings = []
            known = len(beginnings)
            while known and after is None:  # the longest that is there already, and exact
                known -= 1
                found = self._find(beginnings[known], keep_kv)
                after = None if found is None or found.quantised else found
            for beginning in beginnings[known if after is None else known + 1 :]:
                after = self._build(beginning, after, extendable, keep_kv)
                if beginning not in self._held:
                    self._keep(beginning, after, keep_kv)
            self._keep(place, self._build(place, after, extendable, keep_kv), keep_kv)
        self._evict(needed)

    def _keep(self, place: Place, prefix: SharedPrefix, keep_kv: bool) -> None:
        if place in self._places and self._dtype is not None:
            prefix = prefix.stored(dtype=self._dtype, device=self._device)
        self._held[place] = prefix
        if self._uses_store(place, keep_kv):
            assert self._store is not None and self._identity is not None
            self._store.write(self._identity, prefix)

    def _find(self, place: Place, keep_kv: bool) -> SharedPrefix | None:
        """From memory, or from the store, which keeps whole contexts only."""
        if place in self._held or not self._uses_store(place, keep_kv):
            return self._held.get(place)
        assert self._store is not None and self._identity is not None
        prefix = self._store.read(self._identity, self._tokens(place), self._model, self._device)
        if prefix is not None:
            self.loaded += 1
            prefix = prefix if self._device is None else prefix.stored(device=self._device)  # pinned, if of use
            self._held[place] = prefix
        return prefix

    def _build(self, place: Place, after: SharedPrefix | None, extendable: bool, keep_kv: bool) -> SharedPrefix:
        self.built += 1
        self.tokens_read += place[1] - (0 if after is None else len(after))
        options: dict[str, Any] = {} if after is None else {"after": after}
        if not extendable:
            options["chunk_tokens"] = 0
        return SharedPrefix.build(self._model, self._tokens(place), keep_kv=keep_kv, device=self._device, **options)

    def _uses_store(self, place: Place, keep_kv: bool) -> bool:
        usable = keep_kv and self._identity is not None and not self._store_unused
        return usable and place in self._places

    def _look_at_weights(self) -> None:
        """Compute what the store's keys hold, anew: torch does not count every change of a weight."""
        if self._store is None or self._store_unused:
            return
        if moving_rope(seam.body_of(self._model)):
            self.leave_store("the model's RoPE changes with the length of the input")  # and with it a buffer
            return
        try:
            weights = fingerprint.of_teacher(self._model, self._adapter)
        except fingerprint.NoFingerprintError as error:
            self.leave_store(str(error))
            return
        if self._weights not in (None, weights):
            self.forget(weights_moved=True)
        self._weights, self._identity = weights, identity_of(self._model, weights, self._dtype)

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

    def _tokens(self, place: Place) -> Tensor:
        return self._contexts[place[0]][: place[1]]

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
