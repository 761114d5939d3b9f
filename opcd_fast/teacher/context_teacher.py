"""The teacher that sees the context: it reads it once and scores any number of sequences after it.

    teacher = ContextTeacher(model, context_ids)
    hidden = teacher.hidden_states_packed(input_ids, cu_seqlens)      # (N, D), what teacher.head reads

Three paths give the same numbers. `merge` computes the context's keys and values once, at batch size 1, and
runs all sequences as one packed row whose attention is merged with the attention over the context. `pad` reads the
same keys and values, and the states of recurrent layers, with the model's own attention, in a padded batch. `concat`
runs context and sequence together: the oracle, and the last resort.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opcd_fast.attention import PackedRow, on_device, packed_row
from opcd_fast.models import (
    Checksum,
    base_weights,
    checksum,
    keep_plain_layout,
    kernels_of,
    refuses_stock_attention,
    seam,
    weights_of,
)
from opcd_fast.teacher import inputs
from opcd_fast.teacher.budget import default_batch_bytes
from opcd_fast.teacher.parts import run_in_parts, split
from opcd_fast.teacher.paths import PathChoice, concat_forward, merge_forward, pad_forward
from opcd_fast.teacher.prefix import PrefixMemory, SharedPrefix

if TYPE_CHECKING:
    from opcd_fast.loss import LMHead

logger = logging.getLogger("opcd_fast")


class ContextTeacher:
    """Hidden states of sequences that continue a context, without gradients.

    model: a transformers causal LM, or PEFT around one; it may be the student itself.
    contexts: token ids of one context (1-D tensor or list of ints, possibly empty), or a list of such.
    path: "auto" (merge, else pad, whichever is exact for this model by a check at first use; else concat, with a
        warning), "merge", "pad" or "concat". A path asked for by name goes through the same check, and is an error if
        it fails.
    adapter: "disabled" runs a PEFT model without its adapters, "active" as they are.
    max_prefix_bytes: bound for the keys and values of contexts in memory; those used longest ago are dropped and
        rebuilt when needed. A call keeps the contexts it reads until it returns, or one part of it does.
    autocast: makes a context manager under which the model runs, for a model whose weights are fp32 masters.
    max_batch_bytes: bound for what one forward pass holds besides weights and contexts, as `teacher.budget` counts it;
        a call that needs more runs in parts, whole sequences each. None for a quarter of the weights, at least 1 GiB.
        A sequence that needs more by itself runs alone, which is logged once.
    prefix_device: where keys and values of contexts are kept, None for where the model is. From there they come layer
        by layer during the forward, each when it is reached. States of recurrent layers stay with the model.
    frozen_weights: True promises that the weights this teacher reads do not change, or that `invalidate()` is called
        when they did; they are then not looked at.

    While it runs, dropout and gradient checkpointing of `model` are off; afterwards every flag is as before.
    A context's cache is built when a sequence first continues it, and kept. All are forgotten when a weight they were
    computed from has another value, the model's dtype or device changed or, with adapter="active", the adapters' state
    or strength changed. Every call tells by a checksum of all parameters and buffers that it reads, which costs one
    pass over them (`opcd_fast.models.weights`); frozen_weights=True saves it. Where weights are sharded, calls are
    collective. A change of dtype, device or attention implementation also has the path checked anew.

    Raises ValueError for malformed arguments, for a path that cannot be exact for this model, for prefix_device with
    path="concat", which keeps no keys, and for a model whose attention, as it is set, leaves out a part of it.
    """

    def __init__(
        self,
        model: nn.Module,
        contexts: Any,
        *,
        path: str = "auto",
        adapter: str = "disabled",
        max_prefix_bytes: int | None = None,
        max_batch_bytes: int | None = None,
        prefix_device: str | torch.device | None = None,
        frozen_weights: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if adapter not in ("disabled", "active"):
            raise ValueError(f"adapter: expected 'disabled' or 'active', got {adapter!r}")
        self.model = model
        keep_plain_layout(model)
        self._body = seam.body_of(model)
        if adapter == "active":
            seam.refuse_virtual_tokens(model)
        self._adapter = adapter
        self.autocast = autocast
        self._contexts = inputs.as_contexts(contexts, seam.embedding_rows(self._body))
        self._head: LMHead | None = None  # looking at the model anew for every batch would cost tens of milliseconds
        inputs.check_bytes("max_prefix_bytes", max_prefix_bytes)
        inputs.check_bytes("max_batch_bytes", max_batch_bytes)
        self._max_batch_bytes = max_batch_bytes or default_batch_bytes(self._body)
        self._told_of_bound = False
        self._kept_on = inputs.as_device(prefix_device)
        self._prefixes = PrefixMemory(model, self._contexts, max_prefix_bytes, device=self._kept_on)
        self.frozen_weights = frozen_weights
        self._built_with: tuple[Any, ...] = ()

        self._asked = path
        self._checked: tuple[PathChoice, tuple[Any, ...]] | None = None
        _ = self._choice
        if path == "concat" and self._kept_on is not None:
            raise ValueError("prefix_device: path='concat' keeps no keys; leave it None, or take another path")
        inputs.check_contexts_fit(self._contexts, seam.longest_input(self._body))

    @property
    def _choice(self) -> PathChoice:
        """Made anew when the model was moved, cast, or given another attention implementation: other kernels run."""
        first = next(self._body.parameters())
        runs_as = first.dtype, first.device, seam.config_of(self._body)._attn_implementation
        if self._checked is None or self._checked[1] != runs_as:
            wrong = refuses_stock_attention(self._body)
            if wrong is not None:
                raise ValueError(f"model: {wrong}")
            self._checked = PathChoice(self._body, self._asked, self._kept_on), runs_as
        return self._checked[0]

    @property
    def path(self) -> str:
        """The path in use: "merge", "pad" or "concat". Asking runs the check of first use.

        Raises ValueError when a path that was asked for by name fails that check.
        """
        return self._choice.path

    @property
    def head(self) -> LMHead:
        """The model's lm-head, for the loss."""
        from opcd_fast.loss import LMHead

        model: Any = seam.causal_lm(self.model)
        if self._head is None or self._head.weight is not model.get_output_embeddings().weight:
            self._head = LMHead.from_model(model)
        return self._head

    @property
    def prefixes(self) -> list[SharedPrefix]:
        """All contexts as the model read them, in the order given; built if need be. No KV on "concat"."""
        every = range(len(self._contexts))
        self._forget_if_changed()
        with self._scoring():
            built = self._prefixes_of(every)
        return [built[index] for index in every]

    def read(self, context_index: Iterable[int]) -> None:
        """Read these contexts now, where they have not been read. Where weights are sharded, all ranks must."""
        if self.path != "concat":
            self._forget_if_changed()
            with self._scoring():
                self._prefixes_of(context_index)

    def run_once_a_call(self) -> bool:
        """From now on a call runs the model once, whatever its sequences, when their contexts have been read.

        For weights that are sharded over ranks, which meet in every pass: `max_batch_bytes` no longer holds. Returns
        False for a model whose path runs it once per context or sequence.
        """
        self._max_batch_bytes = sys.maxsize
        return self.path == "merge" and self._choice.rope_switch is None

    def explain(self) -> str:
        """Which path runs, why, and what the contexts occupy."""
        first, *more = self._choice.explain()
        sizes = ", ".join(str(context.numel()) for context in self._contexts)
        lines = [
            first,
            f"contexts: {len(self._contexts)} of {sizes} tokens; adapter: {self._adapter}",
        ]
        if self.path != "concat":
            lines.extend(self._prefixes.explain())
        elif self._kept_on is not None:
            lines.append("prefix_device: not used, because path 'concat' keeps no keys")
        if self.path == "merge":
            lines.append(kernels_of(self._body))
        lines.extend(more)
        return "\n".join(lines)

    def invalidate(self) -> None:
        """Forget what was computed from the weights; the next use reads the contexts again."""
        self._prefixes.forget()

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, context_index: Any = None
    ) -> Tensor:
        """(B, T) token ids, padded on the right -> (B, T, D); zeros at padded positions.

        attention_mask: (B, T), 1 for tokens and 0 for padding, or None when there is no padding.
        context_index: see `hidden_states_packed`. Raises ValueError for a mask that is not right-padded.
        """
        inputs.check_tensors(input_ids=input_ids, attention_mask=attention_mask)
        if input_ids.ndim != 2 or not input_ids.numel():
            raise ValueError(f"input_ids: expected shape (B, T), got {tuple(input_ids.shape)}")
        batch, longest = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: shape {tuple(mask.shape)} differs from input_ids' {tuple(input_ids.shape)}"
            )
        mask = mask.to("cpu", torch.bool)  # which sequences there are is decided on the host
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError(
                "attention_mask: a token follows padding; pad on the right (tokenizer.padding_side='right'), "
                "because padding between the context and its continuation shifts windows and positions"
            )
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32)
        cu_seqlens[1:] = mask.sum(1).cumsum(0)
        place = mask.flatten().nonzero().squeeze(1)
        ids = input_ids.flatten().index_select(0, on_device(place, input_ids.device))
        packed = self.hidden_states_packed(ids, cu_seqlens, context_index=context_index)
        out = packed.new_zeros(batch * longest, packed.shape[-1])
        return out.index_copy_(0, on_device(place, packed.device), packed).view(batch, longest, -1)

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
        may be left out when there is one. select: (M,) positions in the row, >= 0; then (M, D) comes back. These three
        are read on the host: given there, the call does not wait for the device.
        The hidden state that predicts a sequence's FIRST token belongs to the context:
        `prefixes[i].last_hidden_state`.

        Raises ValueError for malformed arguments and for context + sequence longer than the model's
        max_position_embeddings (nothing is ever truncated); RuntimeError when a layer did not read its
        context.
        """
        inputs.check_tensors(input_ids=input_ids, cu_seqlens=cu_seqlens, select=select)
        if input_ids.ndim != 1 or input_ids.is_floating_point():
            raise ValueError(f"input_ids: expected packed token ids of shape (N,), got {tuple(input_ids.shape)}")
        inputs.check_range("input_ids", input_ids, seam.embedding_rows(self._body))
        device = next(self._body.parameters()).device
        row = packed_row(cu_seqlens, input_ids.numel(), device)
        index = inputs.context_of_sequence(context_index, len(row.lengths), len(self._contexts))
        context_lengths = [self._contexts[which].numel() for which in index]
        inputs.check_sequences_fit(row.lengths, context_lengths, seam.longest_input(self._body))
        inputs.check_select(select, input_ids.numel())

        path = self._choice.for_call(row.lengths, context_lengths)
        ids = on_device(input_ids, device)
        parts = self._parts(path, row, index, context_lengths)
        if path != "concat":
            self._forget_if_changed()
        with self._scoring():
            if len(parts) > 1:
                return run_in_parts(partial(self._run, path), ids, row, index, parts, select)
            hidden = self._run(path, ids, row, index)
        return hidden if select is None else hidden.index_select(0, on_device(select, device))

    def _run(self, path: str, ids: Tensor, row: PackedRow, index: Sequence[int]) -> Tensor:
        if path == "merge":
            return merge_forward(self._body, self._prefixes_of(index), ids, row, index)
        if path == "pad":
            return pad_forward(self._body, self._prefixes_of(index), ids, row, index)
        return concat_forward(self._body, self._contexts, ids, row, index, alone=self._choice.runs_alone())

    def _parts(
        self, path: str, row: PackedRow, index: Sequence[int], context_lengths: Sequence[int]
    ) -> list[list[int]]:
        """Sequences of each part of a call; a sequence that is too large by itself is told of, once."""
        bound = self._max_batch_bytes
        parts, most = split(self._body, path, row.lengths, index, context_lengths, bound, self._fetched())
        if most > bound and not self._told_of_bound:
            self._told_of_bound = True
            logger.warning(
                "teacher: a sequence needs about %.1f MiB by itself, more than max_batch_bytes=%d; it runs alone",
                most / 2**20,
                bound,
            )
        return parts

    def _fetched(self) -> bool:
        """Whether layers of the prefixes come from elsewhere, one at a time."""
        return self._kept_on not in (None, next(self._body.parameters()).device)

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
        """Prefixes by context, of those `wanted`."""
        # Only what this call reads: one sequence among a thousand contexts must not wait for a thousand forwards.
        return self._prefixes.get(wanted, extendable=self.path == "merge", keep_kv=self.path != "concat")

    def _forget_if_changed(self) -> None:
        """Drop prefixes that were computed from other weights than the present ones; once in a call."""
        first = next(self._body.parameters())
        adapters = seam.adapter_state(self.model) if self._adapter == "active" else ()
        now = first.dtype, first.device, adapters, self._checksum()
        if now != self._built_with:
            self._prefixes.forget()
            self._built_with = now

    def _checksum(self) -> Checksum | None:
        if self.frozen_weights:
            return None
        # Looked up anew: adapters come and go, and loading may put in other tensors.
        read = base_weights(self.model) if self._adapter == "disabled" else weights_of(self.model)
        return checksum(read)
