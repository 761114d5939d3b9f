"""Sampling token by token with keys and values in one buffer: what `generate` does, without what it adds per token.

Prompts are read as packed rows, each different one once, and what all of them begin with once. What all answers share
(a context, a system prompt, one prompt with many answers) is held once, too, where that pays: each token's queries of
all rows are one product with it (`attention.step_attention`). The rest lies in a buffer that is written in place; a
query head is folded into its key head, so that keys are never repeated; and rows that are finished leave the batch. A
device is never waited for but every few tokens, to see which rows are finished.

Models with recurrent layers go on from copies of their own cache instead (`models.own_cache`), behind what all prompts
begin with, which is read once there, too.

Token ids in, token ids out. The random number of answer i at token t depends on the seed, i and t alone, so the
answers do not depend on how the prompts were split into batches (up to rounding).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from opcd_fast.attention import PackedCall, PrefixGroup, Visible, on_device, sdpa_without_cudnn, step_attention
from opcd_fast.attention import row_of as packed_row_of
from opcd_fast.data import common_prefix_length
from opcd_fast.models import OwnCache, refuses_own_cache, refuses_packing, seam
from opcd_fast.models.caches import BufferedCache, Slots
from opcd_fast.rollout.protocol import cut_at_stop
from opcd_fast.rollout.sampling import BYTES_PER_LOGIT, draw
from opcd_fast.runtime import KeptSteps

MIN_SHARED_PREFIX = 8  # tokens; below this one extra forward costs more than it saves
HOLD_ONCE = 2**20  # keys' and values' numbers in a layer that copies would add; below, two kernels cost more than one
LOOK_EVERY = 16  # tokens, on a device
BUCKET = 256  # slots that are attended more at a time where shapes must not change
ROWS, PREFIX = 16, 32  # of what else has a shape there: rows in the batch, tokens that are held once


def refuses_decoding(model: Any) -> str | None:
    """Why this loop cannot run `model`, in words; None when it can (`rollout.check` looks all the same)."""
    return None if refuses_own_cache(model) is None else refuses_holding_once(model)


def refuses_holding_once(model: Any) -> str | None:
    """Why what all answers share cannot be held once for all rows; None when it can."""
    return refuses_packing(seam.body_of(model), training=False)


@torch.no_grad()
def decode(
    model: Any, prompts: Sequence[Sequence[int]], uniform: Tensor, *, stop_token_ids: Sequence[int],
    temperature: float, top_p: float, vocab_size: int | None = None, static: bool | None = None,
    kept: KeptSteps | None = None,
) -> list[tuple[list[int], list[float]]]:  # fmt: skip
    """Token ids and log-probabilities of one answer per prompt, ending with a stop token or after T tokens.

    Args:
        model: a causal LM in eval mode that `refuses_decoding` does not refuse.
        uniform: (B, T) float64 in [0, 1), the random number of each answer's tokens; T is the limit.
        temperature: 0 takes the most probable token; its log-probability is then at temperature 1.
        vocab_size: ids from here on are never drawn.
        static: tensors keep their shapes for BUCKET tokens; None: on CUDA, where such steps are captured as graphs.
        kept: of earlier calls, with whose steps this one goes on where they fit; they stay in memory in between.
    """
    device = next(model.parameters()).device
    limit = uniform.shape[1]
    different = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: row for row, prompt in enumerate(different)}
    prompt_of = [place[tuple(prompt)] for prompt in prompts]
    held_once = refuses_holding_once(model) is None
    static = held_once and (device.type == "cuda" if static is None else static)
    run: BatchRun | OwnCache
    attention: AbstractContextManager[None]
    if held_once:
        run = BatchRun(model, prompt_of, different, limit, static=static)
        attention, slots = seam.using_attention(seam.body_of(model), run.attend)(), run.cache.slots
    else:
        run, attention, slots = OwnCache(model, prompt_of, different, _in_common(different)), nullcontext(), Slots()
    captures = static and (device.type == "cuda" or kept is not None)
    reads = what_steps_read(model) if captures else None
    kept = KeptSteps(0) if kept is None or reads is None else kept
    key = run.layout, tuple(stop_token_ids), temperature, top_p, vocab_size
    steps = kept.take(reads, key)
    if static:
        slots.places = steps.places
    drawn = _Drawn(slots, uniform.to(device), stop_token_ids, temperature, top_p, vocab_size)
    every = LOOK_EVERY if static else tokens_between_looks(device)

    def one_more() -> None:
        drawn.add(run.next(drawn.newest))

    with attention, sdpa_without_cudnn():
        drawn.add(run.read_prompts())
        for count in range(1, limit):
            if count % every == 0:
                going = (~drawn.over).nonzero().squeeze(1)  # waits for the device
                if not len(going):
                    break
                stay = run.rows_that_stay(len(going))
                if stay < len(drawn.rows):
                    going = going if stay == len(going) else drawn.over.byte().argsort(stable=True)[:stay].sort().values
                    drawn.keep(going)
                    run.keep(going)
            run.extend()
            if captures:
                steps((len(drawn.rows), slots.shown), one_more)
            else:
                one_more()
    # What a row drew after its stop token, while it waited to leave, is dropped.
    cut = [cut_at_stop(row, stop_token_ids)[0] for row in drawn.tokens.tolist()]
    logits = len(prompts) * seam.config_of(seam.body_of(model)).vocab_size
    kept.keep(key, steps, logits * BYTES_PER_LOGIT + sum(x.nbytes for x in steps.places.values()))
    return [(list(ids), row[: len(ids)]) for ids, row in zip(cut, drawn.values.tolist())]


def _in_common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all begin with, 0 where they are too few to read them apart."""
    shared = len(prompts[0]) if len(prompts) == 1 else common_prefix_length(prompts)
    return shared if shared >= MIN_SHARED_PREFIX else 0


def what_steps_read(model: Any) -> Any:
    """Compares equal as long as a recorded step reads the weights of `model` where they lie, through the same adapters.

    None where other tensors lie behind the parameters (packed or sharded weights)."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    if any(type(x) not in (Tensor, nn.Parameter) for x in tensors):
        return None
    lie = [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors]
    return id(model), seam.adapter_state(model), lie


class _Drawn:
    """What was drawn so far, on the device; nothing in `add` depends on the host."""

    def __init__(self, slots: Slots, uniform: Tensor, stops: Sequence[int], *sampling: Any) -> None:
        self._slots, self._sampling, device = slots, sampling, uniform.device
        rows = torch.arange(len(uniform), device=device)
        self.uniform = slots.stay("uniform", uniform)
        self._stops = slots.stay("stops", on_device(torch.tensor(list(stops)), device))
        self.tokens = slots.stay("tokens", torch.zeros(uniform.shape, dtype=torch.int64, device=device))  # (B, T)
        self.values = slots.stay("values", torch.zeros(uniform.shape, device=device))
        self.rows = slots.stay("rows", rows)  # the answers in the batch
        self.count = slots.stay("count", torch.zeros(1, dtype=torch.int64, device=device))
        self.newest = slots.stay("newest", torch.zeros_like(rows))
        self.over = slots.stay("over", torch.zeros_like(rows, dtype=torch.bool))

    def add(self, logits: Tensor) -> None:
        tokens, logprobs = draw(logits, self.uniform.index_select(1, self.count).squeeze(1), *self._sampling)
        self.tokens[self.rows, self.count], self.values[self.rows, self.count] = tokens, logprobs
        self.newest.copy_(tokens)
        self.over |= (tokens[:, None] == self._stops).any(1)
        self.count += 1

    def keep(self, rows: Tensor) -> None:
        self.rows, self.uniform, self.newest, self.over = (
            self._slots.kept(x, rows) for x in (self.rows, self.uniform, self.newest, self.over)
        )


def tokens_between_looks(device: torch.device) -> int:
    """How many tokens are drawn before the host looks which rows are finished.

    A look waits for all work that was given to a device, so that it then idles until more comes. On a CPU it costs
    nothing, and a row that stays costs its share of every token.
    """
    return 1 if device.type == "cpu" else LOOK_EVERY


class BatchRun:
    """The cache of one batch, and what each row's next token sees of it.

    P tokens are held once for all rows. Behind them each row has tokens of its own, padded on the left, so that the
    newest of all rows lie in the same slot.
    """

    def __init__(self, model: Any, prompt_of: Sequence[int], prompts: Sequence[Sequence[int]], limit: int,
                 *, static: bool = False) -> None:  # fmt: skip
        prefix = seam.trained_prefix(model)
        # PEFT would put its prefix into a cache of its own at every call.
        self.model: Any = model if seam.prompt_learner(model) is None else seam.causal_lm(model)
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.cache = BufferedCache(seam.num_layers(seam.body_of(model)))
        self._as_argument = seam.cache_argument(self.model, self.cache)
        self.prompts, self.prompt_of, self.limit, self.static = prompts, prompt_of, limit, static
        self.past = 0  # virtual tokens in front of every row
        if prefix is not None:
            self.past = prefix[0][0].shape[2]
            self.cache.set_prefix([(key.detach(), value.detach()) for key, value in prefix])
        self._width = numbers_per_token(model)
        self._reading: PackedCall | None = None
        self._seen: dict[Any, tuple[int, int, Visible]] = {}
        self._shared = shared = self._shared_by_prompts()
        self._head = head = self.past + shared
        self.held = head if self._worth_holding(head) else 0  # P
        self._own = [len(prompt) - shared + head - self.held for prompt in prompts]
        width = max(self._own)
        if static:
            width += (1 - width) % LOOK_EVERY  # so that buckets end where the host looks
        self.end = width
        capacity = _rounded(width + limit) if static else width + limit
        self.cache.slots.rows, self.cache.slots.capacity = len(prompt_of), capacity
        self.layout = len(prompt_of), capacity, limit, self.held  # all that a step's numbers on the host depend on

    def read_prompts(self) -> Tensor:
        """(B, V) logits after the prompts; the cache holds a row for each answer afterwards."""
        slots, width, own = self.cache.slots, self.end, self._own
        row_of = on_device(torch.tensor(self.prompt_of), self.device)
        logits = None
        if self._shared:
            slots.keeps_read = bool(self.held and not self.past)
            logits = self._read([self.prompts[0][: self._shared]], self.past)
            slots.keeps_read = False
            self.cache.take_prefix()
        rests = [list(prompt[self._shared :]) for prompt in self.prompts]
        if self.static:
            slots.at = slots.stay("at", torch.tensor([width], device=self.device))
        if any(rests):
            logits = self._read(rests, self._head)
            places = on_device(self._places(rests, self._head - self.held, width), self.device)
            self.cache.spread(places[row_of], copies_prefix=not self.held)
        assert logits is not None, "no prompts"
        self._most_padding = width - min(own)
        # (B,) slots before a row's first
        self.padding = on_device(torch.tensor([width - own[prompt] for prompt in self.prompt_of]), self.device)
        self.padding = slots.stay("padding", self.padding)
        self.bias: Tensor | None = None
        if self._most_padding and not self.static:
            slot = torch.arange(slots.capacity, device=self.device)
            self.bias = self._additive(slot >= self.padding[:, None])
        return logits[row_of]

    def extend(self) -> None:
        """Room for one more token: before every `next`, on the host."""
        slots = self.cache.slots
        slots.end, self.end = self.end, self.end + 1
        slots.shown = _rounded(self.end)

    def rows_that_stay(self, going: int) -> int:
        """How many rows the next steps have, `going` of which are not finished. Rows leave where shapes do not matter,
        or change anyway; then some that are finished stay, so that there are not many shapes."""
        if not self.static:
            return going
        return -(-going // ROWS) * ROWS if self.end % BUCKET == 0 else len(self.padding)

    def next(self, tokens: Tensor) -> Tensor:
        """(B, V) logits after one more token each, (B,)."""
        slots = self.cache.slots
        self._seen.clear()
        positions = self.held + (slots.end if slots.at is None else slots.at) - self.padding
        logits = self._forward(tokens[:, None], positions[:, None], 1)
        if slots.at is not None:
            slots.at += 1
        return logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        self.cache.slots.end = self.end
        self.cache.keep(rows)
        self.padding = self.cache.slots.kept(self.padding, rows)
        if self.bias is not None:
            self.bias = self.bias[rows]

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **options: Any) -> Any:
        """transformers' attention function, for prompts that are read and for new tokens (B, H, 1, d)."""
        if self._reading is not None:
            return self._reading.attend(module, query, key, value, *mask, **options)
        if options.get("position_bias") is not None:
            raise NotImplementedError("the decoding loop has no position_bias; use engine='generate'")
        scaling = options.get("scaling")
        group = query.shape[1] // key.shape[1]
        first, first_of_prefix, visible = self._visible(options.get("sliding_window"), group)
        prefix = None
        for keys, values in self.cache.prefixes(module, key):  # none or one
            if first_of_prefix < self.held:
                prefix = keys[:, :, first_of_prefix:], values[:, :, first_of_prefix:]
        out = step_attention(
            query, key[:, :, first:], value[:, :, first:], query.shape[-1] ** -0.5 if scaling is None else scaling,
            prefix, visible, softcap=options.get("softcap"), sink=options.get("s_aux"),
        )  # fmt: skip
        return out, None

    def _visible(self, *layer: Any) -> tuple[int, int, Visible]:
        """The first slot and the first key of the prefix that some row sees, and what each row sees from there on; once
        for all layers with the same window and the same number of query heads to a key head."""
        if layer not in self._seen:
            self._seen[layer] = self._seen_behind(*layer)
        return self._seen[layer]

    def _seen_behind(self, window: int | None, group: int) -> tuple[int, int, Visible]:
        slots = self.cache.slots
        if slots.at is not None:
            slot = torch.arange(slots.shown, device=self.device)
            oldest = self.padding if window is None else torch.maximum(self.padding, slots.at + 1 - window)
            bias: Tensor | None = self._additive((slot <= slots.at) & (slot >= oldest[:, None]))
            if window is None or not self.held:
                return 0, 0, Visible(bias)
            earliest = max(0, self.held - window + 1)
            return 0, earliest, Visible(bias, *self._seen_of_prefix(earliest, slots.at, window, group))
        first = 0 if window is None else max(0, slots.end + 1 - window)
        bias = None
        if self.bias is not None and first < self._most_padding:
            bias = self.bias[:, first : slots.end + 1]
        if window is None or not self.held:
            return first, 0, Visible(bias)
        fewest = slots.end - self._most_padding  # tokens of its own, before the new one, of the row that has fewest
        earliest = max(0, self.held + fewest - window + 1)
        if self.bias is None or earliest >= self.held:
            return first, earliest, Visible(bias)
        return first, earliest, Visible(bias, *self._seen_of_prefix(earliest, slots.end, window, group))

    def _seen_of_prefix(self, earliest: int, newest: int | Tensor, window: int, group: int) -> tuple[Tensor, Tensor]:
        """What is added to scores of the prefix's keys from `earliest` on, and which rows see one of them."""
        last_hidden = self.held + newest - self.padding - window  # (B,)
        place = torch.arange(earliest, self.held, device=self.device)
        has_prefix = last_hidden < self.held - 1
        seen = (place > last_hidden[:, None]) | ~has_prefix[:, None]
        return self._additive(seen.repeat_interleave(group, 0)), has_prefix

    # --------------------------------------------------------------------------------------- prompts

    def _shared_by_prompts(self) -> int:
        """Tokens of the prompts that are read once for all of them."""
        if len(self.prompts) == 1 and not self._worth_holding(self.past + len(self.prompts[0])):
            return 0
        if not self.static:
            return _in_common(self.prompts)
        shared = common_prefix_length(self.prompts)
        shared -= (self.past + shared) % PREFIX
        return shared if shared >= MIN_SHARED_PREFIX else 0

    def _worth_holding(self, tokens: int) -> bool:
        return (len(self.prompt_of) - 1) * tokens * self._width >= HOLD_ONCE

    def _places(self, rests: Sequence[Sequence[int]], copied: int, width: int) -> Tensor:
        """(prompts, width) places among `copied` tokens of the prefix and the packed `rests`, of what slots hold."""
        slot, before, places = torch.arange(width), 0, []
        for rest in rests:
            place = slot - (width - copied - len(rest))  # in the row, from its first token on
            places.append(torch.where(place < copied, place.clamp(min=0), place + before))
            before += len(rest)
        return torch.stack(places)

    def _read(self, sequences: Sequence[Sequence[int]], prefix: int) -> Tensor:
        """(sequences, V) logits after each, behind `prefix` tokens that the cache holds."""
        lengths = [len(ids) for ids in sequences]
        groups = [PrefixGroup(0, len(lengths), 0, sum(lengths), prefix)] if prefix else []
        row = packed_row_of(lengths, self.device, groups)
        self.cache.slots.reads = True
        self._reading = PackedCall(row, self.cache.prefixes if prefix else None)
        ids = torch.tensor([[token for sequence in sequences for token in sequence]])
        last = row.cu_seqlens[1:].long() - 1
        try:
            return self._forward(on_device(ids, self.device), row.position_of_token[None], last)[0]
        finally:
            self._reading, self.cache.slots.reads = None, False

    def _forward(self, ids: Tensor, positions: Tensor, keep: Any) -> Tensor:
        return self.model(
            input_ids=ids, position_ids=positions, **self._as_argument, use_cache=True, logits_to_keep=keep
        ).logits

    def _additive(self, seen: Tensor) -> Tensor:
        # Rows begin at multiples of 8 elements: else kernels refuse them, or copy them in every layer at every token.
        rows, count = seen.shape
        bias = torch.zeros(rows, -(-count // 8) * 8, dtype=self.dtype, device=self.device)[:, :count]
        return bias.masked_fill_(~seen, -torch.inf)


def _rounded(tokens: int) -> int:
    return -(-tokens // BUCKET) * BUCKET


def numbers_per_token(model: Any) -> int:
    """Numbers of keys and values that a token of one sequence holds in one layer; the largest where layers differ."""
    config = seam.config_of(seam.body_of(model))
    heads = seam.setting(config, "num_attention_heads")
    key_heads = seam.setting(config, "num_key_value_heads") or heads
    width = seam.setting(config, "head_dim") or _largest(seam.setting(config, "hidden_size")) // _largest(heads)
    return 2 * _largest(key_heads) * _largest(width)


def _largest(value: Any) -> int:
    return max(value) if isinstance(value, list) else int(value)
