"""The teacher that sees the context: it reads it once and scores any number of sequences after it.

    teacher = ContextTeacher(model, context_ids)
    hidden = teacher.hidden_states_packed(input_ids, cu_seqlens)      # (N, D), what teacher.head reads

Four paths give the same numbers. `merge` computes the context's keys and values once, at batch size 1, and
runs all sequences as one packed row whose attention is merged with the attention over the context. `pad` reads the
same keys and values with the model's own attention, in a padded batch; `mask` does so in a packed row under an explicit
mask, at the price of attention between all sequences on dense kernels. `concat` runs context and sequence together:
the oracle, and the last resort.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opcd_fast import transformers_seam as seam
from opcd_fast.architectures import (
    kernels_of,
    refuses_mask,
    refuses_merge,
    refuses_pad,
    refuses_stock_attention,
    rope_switch,
)
from opcd_fast.attention import PackedRow, packed_row
from opcd_fast.mask_path import mask_forward
from opcd_fast.prefix import SharedPrefix
from opcd_fast.prefix_memory import PrefixMemory
from opcd_fast.prefix_store import PrefixStore
from opcd_fast.teacher_paths import concat_forward, merge_forward, pad_forward
from opcd_fast.verification import verify

if TYPE_CHECKING:
    from opcd_fast.heads import LMHead

logger = logging.getLogger("opcd_fast")


class ContextTeacher:
    """Hidden states of sequences that continue a context, without gradients.

    model: a transformers causal LM, or PEFT around one; it may be the student itself.
    contexts: token ids of one context (1-D tensor or list of ints, possibly empty), or a list of such.
    path: "auto" (the first of merge, pad and mask that is exact for this model, checked at first use, else concat),
        "merge", "pad", "mask" or "concat".
    adapter: "disabled" runs a PEFT model without its adapters, "active" as they are.
    store: a folder where contexts' caches are kept for later runs, see `PrefixStore`; made if need be. Left alone as
        soon as the teacher's weights are seen to change, while they are being trained, and on path "concat".
    max_prefix_bytes: bound for the keys and values of contexts in memory; those used longest ago are dropped and
        rebuilt when needed. A call keeps all contexts it reads until it returns.
    autocast: makes a context manager under which the model runs, for a model whose weights are fp32 masters.

    While it runs, dropout and gradient checkpointing of `model` are off; afterwards every flag is as before.
    A context's cache is built when a sequence first continues it, and kept. All are forgotten when a parameter they
    were computed from was changed in place, the model's dtype or device changed or, with adapter="active", the
    adapters' state changed. Changes that torch does not count (through `.data`, or by a fused optimizer's step) need
    `invalidate()`.

    Raises ValueError for malformed arguments, for a path that cannot be exact for this model, and
    for a model whose attention, as it is set, leaves out a part of it.
    """

    def __init__(
        self,
        model: nn.Module,
        contexts: Any,
        *,
        path: str = "auto",
        adapter: str = "disabled",
        store: str | os.PathLike[str] | None = None,
        max_prefix_bytes: int | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if path not in ("auto", "merge", "pad", "mask", "concat"):
            raise ValueError(f"path: expected 'auto', 'merge', 'pad', 'mask' or 'concat', got {path!r}")
        if adapter not in ("disabled", "active"):
            raise ValueError(f"adapter: expected 'disabled' or 'active', got {adapter!r}")
        self.model = model
        self._body = seam.body_of(model)
        if adapter == "active":
            seam.refuse_virtual_tokens(model)
        self._adapter = adapter
        self.autocast = autocast
        self._contexts = _as_contexts(contexts, seam.embedding_rows(self._body))
        self._head: LMHead | None = None  # looking at the model anew for every batch would cost tens of milliseconds
        if max_prefix_bytes is not None and (type(max_prefix_bytes) is not int or max_prefix_bytes < 1):
            raise ValueError(f"max_prefix_bytes: expected an integer >= 1, or None, got {max_prefix_bytes!r}")
        self._prefixes = PrefixMemory(
            model, self._contexts, adapter, None if store is None else PrefixStore(store), max_prefix_bytes
        )
        self._built_with: tuple[Any, ...] = ()
        self._watched = seam.base_parameters(model) if adapter == "disabled" else list(model.parameters())

        wrong = refuses_stock_attention(self._body)
        if wrong is not None:
            raise ValueError(f"model: {wrong}")
        self._refused = {
            "merge": refuses_merge(self._body),
            "pad": refuses_pad(self._body),
            "mask": refuses_mask(self._body),
        }
        self._rope_switch = rope_switch(self._body)
        self._told_of_switch = False
        self._alone: bool | None = None  # whether concat runs one sequence at a time; None until it was checked
        self._path: str | None = None  # None until the first use has checked it
        self._reason = ""
        if path == "concat":
            self._path, self._reason = "concat", "asked for"
        elif path != "auto":
            reason = self._refused[path]
            if reason is not None:
                raise ValueError(f"path={path!r}: {reason}; use path='concat'")
            self._path, self._reason = path, "asked for; not checked against concat"
        longest = max(context.numel() for context in self._contexts)
        limit = seam.longest_input(self._body)
        if limit is not None and longest >= limit:
            raise ValueError(
                f"contexts: {longest} tokens leave no room in the model's max_position_embeddings {limit}: "
                f"shorten the context by at least {longest - limit + 1}"
            )

    @property
    def path(self) -> str:
        """The path in use: "merge", "pad", "mask" or "concat". With path="auto", asking runs the check of first use."""
        if self._path is None:
            self._path, self._reason = self._choose()
            if self._path != "merge":
                logger.warning("teacher: path %r, because %s", self._path, self._reason)
        return self._path

    def _choose(self) -> tuple[str, str]:
        """The first path that agrees with concat on a tiny model of this kind, and why not those before it."""
        against = []
        for path, refused in self._refused.items():
            if refused is not None:
                against.append(f"not {path}: {refused}")
                continue
            measured, passed = verify(self._body, path)
            if passed:
                return path, "; ".join([*against, f"{path} matches concat on a tiny model of this kind ({measured})"])
            against.append(f"not {path}: it failed its check against concat ({measured})")
        return "concat", "; ".join(against)

    @property
    def head(self) -> LMHead:
        """The model's lm-head, for the loss."""
        from opcd_fast.heads import LMHead

        model: Any = seam.causal_lm(self.model)
        if self._head is None or self._head.weight is not model.get_output_embeddings().weight:
            self._head = LMHead.from_model(model)
        return self._head

    @property
    def prefixes(self) -> list[SharedPrefix]:
        """All contexts as the model read them, in the order given; built if need be. No KV on "concat"."""
        every = range(len(self._contexts))
        with self._scoring():
            built = self._prefixes_of(every)
        return [built[index] for index in every]

    def read(self, context_index: Iterable[int]) -> None:
        """Read these contexts now, where they have not been read. Where weights are sharded, all ranks must."""
        if self.path != "concat":
            with self._scoring():
                self._prefixes_of(context_index)

    @property
    def same_passes_everywhere(self) -> bool:
        """Whether a call runs the model once, whatever its sequences and contexts, once the contexts have been read."""
        return self.path in ("merge", "mask") and self._rope_switch is None

    def explain(self) -> str:
        """Which path runs, why, and what the contexts occupy."""
        path = self.path
        sizes = ", ".join(str(context.numel()) for context in self._contexts)
        lines = [
            f"path: {path} ({self._reason})",
            f"contexts: {len(self._contexts)} of {sizes} tokens; adapter: {self._adapter}",
        ]
        if path == "concat":
            one = ", one at a time: a padded batch failed its check" if self._alone else ""
            lines.append(f"the context is read again for every sequence{one}")
            lines.extend(self._prefixes.explain_store(unused="path 'concat' keeps no keys"))
        else:
            lines.extend(self._prefixes.explain())
        if path == "merge":
            lines.append(kernels_of(self._body))
        if path == "pad":
            lines.append("a batch of sequences copies it for one layer at a time")
        if path == "mask":
            lines.append("every token pays for all keys of a call, of other sequences too, but with flex_attention")
        if path != "concat" and self._rope_switch is not None:
            lines.append(f"calls that cross {self._rope_switch} tokens, where longrope moves positions, run on concat")
        return "\n".join(lines)

    def invalidate(self) -> None:
        """Forget what was computed from the weights; the next use reads the contexts again, and no store."""
        self._prefixes.forget(weights_moved=True)

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, context_index: Any = None
    ) -> Tensor:
        """(B, T) token ids, padded on the right -> (B, T, D); zeros at padded positions.

        attention_mask: (B, T), 1 for tokens and 0 for padding, or None when there is no padding.
        context_index: see `hidden_states_packed`. Raises ValueError for a mask that is not right-padded.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids: expected shape (B, T), got {tuple(input_ids.shape)}")
        batch, longest = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: shape {tuple(mask.shape)} differs from input_ids' {tuple(input_ids.shape)}"
            )
        mask = mask.to(input_ids.device, torch.bool)
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError(
                "attention_mask: a token follows padding; pad on the right (tokenizer.padding_side='right'), "
                "because padding between the context and its continuation shifts windows and positions"
            )
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32)
        cu_seqlens[1:] = mask.sum(1).cumsum(0)
        packed = self.hidden_states_packed(input_ids[mask], cu_seqlens, context_index=context_index)
        out = packed.new_zeros(batch, longest, packed.shape[-1])
        out[mask] = packed
        return out

    def hidden_states_packed(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        *,
        context_index: Any = None,
        select: Tensor | None = None,
    ) -> Tensor:
        """(N,) token ids of B sequences back to back, each continuing its context -> (N, D), model's dtype.

        cu_seqlens: (B + 1,) integers from 0 to N. context_index: (B,) which context each sequence continues;
        may be left out when there is one. select: (M,) positions in the row, >= 0; then (M, D) comes back.
        The hidden state that predicts a sequence's FIRST token belongs to the context:
        `prefixes[i].last_hidden_state`.

        Raises ValueError for malformed arguments and for context + sequence longer than the model's
        max_position_embeddings (nothing is ever truncated); RuntimeError when a layer did not read its
        context.
        """
        if input_ids.ndim != 1 or input_ids.is_floating_point():
            raise ValueError(f"input_ids: expected packed token ids of shape (N,), got {tuple(input_ids.shape)}")
        device = next(self._body.parameters()).device
        row = packed_row(cu_seqlens, input_ids.numel(), device)
        index = self._context_of_sequence(context_index, len(row.lengths))
        self._check_length(row, index)
        if select is not None and (select.ndim != 1 or select.dtype not in (torch.int32, torch.int64)):
            raise ValueError(
                f"select: expected integer positions of shape (M,), got {select.dtype} {tuple(select.shape)}"
            )

        path = "concat" if self._crosses_rope_switch(row, index) else self.path
        ids = input_ids.to(device)
        with self._scoring():
            if path == "merge":
                hidden = merge_forward(self._body, self._prefixes_of(index), ids, row, index)
            elif path == "pad":
                hidden = pad_forward(self._body, self._prefixes_of(index), ids, row, index)
            elif path == "mask":
                hidden = mask_forward(self._body, self._prefixes_of(index), ids, row, index)
            else:
                hidden = concat_forward(self._body, self._contexts, ids, row, index, alone=self._runs_alone())
        return hidden if select is None else hidden.index_select(0, select.to(device))

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.autocast())
            stack.enter_context(seam.scoring_mode(self._body))
            if self._adapter == "disabled":
                stack.enter_context(seam.without_adapters(self.model))
            stack.callback(self._prefixes.trim)
            yield

    def _prefixes_of(self, wanted: Iterable[int]) -> dict[int, SharedPrefix]:
        """Prefixes by context, of those `wanted`; built by the present weights."""
        state = self._state()
        if state != self._built_with:
            moved = bool(self._built_with) and state[0] != self._built_with[0]
            self._prefixes.forget(weights_moved=moved)
            self._built_with = state
        if self.model.training and any(p.requires_grad for p in self._watched):
            self._prefixes.leave_store("the teacher's weights are being trained")
        # Only what this call reads: one sequence among a thousand contexts must not wait for a thousand forwards.
        return self._prefixes.get(wanted, extendable=self.path == "merge", keep_kv=self.path != "concat")

    def _state(self) -> tuple[Any, ...]:
        """What the prefixes were computed from; changes with every in-place update that torch counts."""
        first = self._watched[0]
        versions = sum(p._version for p in self._watched if not p.is_inference())
        adapters = seam.adapter_state(self.model) if self._adapter == "active" else ()
        return versions, first.dtype, first.device, adapters

    def _context_of_sequence(self, context_index: Any, batch: int) -> list[int]:
        if context_index is None:
            if len(self._contexts) > 1:
                raise ValueError(
                    f"context_index: needed to choose among {len(self._contexts)} contexts, shape ({batch},)"
                )
            return [0] * batch
        index = context_index.tolist() if isinstance(context_index, Tensor) else list(context_index)
        if len(index) != batch or not all(isinstance(i, int) and 0 <= i < len(self._contexts) for i in index):
            raise ValueError(
                f"context_index: expected {batch} integers from 0 to {len(self._contexts) - 1}, got {index}"
            )
        return index

    def _runs_alone(self) -> bool:
        """Whether this model's padded batches are not to be trusted: then concat runs one sequence at a time."""
        if self._alone is None:
            measured, passed = verify(self._body, "concat")
            self._alone = not passed
            if self._alone:
                logger.warning(
                    "teacher: one sequence at a time, as a padded batch failed its check (%s)", measured
                )
        return self._alone

    def _crosses_rope_switch(self, row: PackedRow, index: list[int]) -> bool:
        """Whether contexts and sequences of this call lie on both sides of the length where longrope switches."""
        if self._rope_switch is None or self.path == "concat":
            return False
        contexts = [self._contexts[which].numel() for which in index]
        ends = [context + tokens for context, tokens in zip(contexts, row.lengths, strict=True) if tokens]
        sides = {length > self._rope_switch for length in (*contexts, *ends) if length}
        if len(sides) > 1 and not self._told_of_switch:
            self._told_of_switch = True
            logger.warning(
                "teacher: path 'concat' for calls that cross %d tokens, where longrope moves all positions",
                self._rope_switch,
            )
        return len(sides) > 1

    def _check_length(self, row: PackedRow, index: list[int]) -> None:
        limit = seam.longest_input(self._body)
        if limit is None:
            return
        for sequence, (tokens, which) in enumerate(zip(row.lengths, index, strict=True)):
            context = self._contexts[which].numel()
            if context + tokens > limit:
                raise ValueError(
                    f"input_ids: sequence {sequence} has {tokens} tokens after a context of {context}; "
                    f"together {context + tokens - limit} more than the model's max_position_embeddings "
                    f"of {limit}"
                )


def _as_contexts(contexts: Any, vocabulary: int | None) -> list[Tensor]:
    """One context or a list of them, as int64 tensors on the CPU."""
    one = isinstance(contexts, Tensor) or all(isinstance(item, int) for item in contexts)
    result = []
    for context in [contexts] if one else contexts:
        ids = context if isinstance(context, Tensor) else torch.tensor(list(context), dtype=torch.int64)
        if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"contexts: expected 1-D integer token ids (or a list of them), got {ids.dtype} of shape "
                f"{tuple(ids.shape)}"
            )
        ids = ids.detach().to("cpu", torch.int64).clone()
        if ids.numel() and vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(
                f"contexts: token ids must lie in [0, {vocabulary}), got {int(ids.min())}…{int(ids.max())}"
            )
        result.append(ids)
    return result
