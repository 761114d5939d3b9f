"""A context, read once: its keys and values at batch size 1, and the hidden state that ends it."""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opcd_fast.attention import KeysAndValues
from opcd_fast.models import seam
from opcd_fast.models.caches import states_of
from opcd_fast.teacher.prefix import chunked_prefill


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """The KV cache of one context of P tokens: read by every sequence of a batch, never copied per row.

    Keys and values may lie elsewhere than the model (`kept_on`).
    """

    token_ids: Tensor  # (P,) int64, on the CPU
    keys: tuple[Tensor, ...]  # one (1, H_kv, kept, d) per layer; kept = P, or min(P, W - 1) with a window of W
    values: tuple[Tensor, ...]
    last_hidden_state: Tensor | None  # (D,): what predicts the first token after the context; None when P = 0
    body: weakref.ref[nn.Module]  # that read it, under its weights of then
    # What recurrent layers carry on, one for each layer, each (1, ...); () for models without such layers.
    states: tuple[dict[str, Tensor], ...] = ()

    @classmethod
    def build(
        cls,
        model: nn.Module,
        token_ids: Tensor,
        *,
        keep_kv: bool = True,
        chunk_tokens: int | None = None,
        after: SharedPrefix | None = None,
        device: torch.device | str | None = None,
    ) -> SharedPrefix:
        """Run `token_ids` (P,) through the body of `model` once, without gradients, in the mode it is in.

        keep_kv=False keeps only the last hidden state (for architectures whose cache is not used). P = 0
        gives a prefix without keys. The caller turns dropout, checkpointing and adapters off
        (`ContextTeacher` does).

        chunk_tokens: tokens that go through the model at once, None for `chunked_prefill.chunk_tokens`; 0 for all of
        them with the model's own attention. A model that `chunked_prefill.refuses_chunks` reads all at once, whatever
        is asked for. after: the same model's prefix of the first tokens of `token_ids`, which are then not
        run again; its keys and values are copied. Raises ValueError when it is not that.

        device: where keys and values are kept, None for the model's. Read in chunks, they grow there, and the model's
        device holds one layer of them at a time; read at once, they are all on the model's device first.
        """
        if chunk_tokens is not None and chunk_tokens < 0:
            raise ValueError(f"chunk_tokens: expected a number of tokens, 0 or None, got {chunk_tokens}")
        body = seam.body_of(model)
        ids = token_ids.detach().to("cpu", torch.int64)
        read_by = weakref.ref(body)
        if after is not None:
            _check_start(after, ids, keep_kv and chunk_tokens != 0, body, chunked_prefill.refuses_chunks(body))
            if len(after) == ids.numel():
                return after
        if ids.numel() == 0:
            return cls(ids, (), (), None, read_by)
        row = ids.unsqueeze(0).to(next(body.parameters()).device)
        with torch.no_grad():
            if not keep_kv:
                return cls(ids, (), (), seam.run_body(body, row)[0, -1].clone(), read_by)
            states: tuple[dict[str, Tensor], ...] = ()
            if chunk_tokens != 0 and chunked_prefill.refuses_chunks(body) is None:
                chunk = chunk_tokens or chunked_prefill.chunk_tokens(body)
                start = [] if after is None else list(zip(after.keys, after.values, strict=True))
                past = 0 if after is None else len(after)
                layers, last = chunked_prefill.grow(body, ids, chunk, start, past, device)
            else:
                layers, filled, hidden = seam.fill_cache(body, row)
                states, last = tuple(states_of(layer) for layer in filled), hidden[0, -1].clone()
        keys, values = tuple(k for k, _ in layers), tuple(v for _, v in layers)
        prefix = cls(ids, keys, values, last, read_by, states if any(states) else ())
        return prefix if device is None else prefix.kept_on(device)

    def kept_on(self, device: torch.device | str) -> SharedPrefix:
        """With keys and values on `device`; on the CPU of a machine with CUDA they are pinned.

        States of recurrent layers and the last hidden state stay where they are.
        """
        place = torch.device(device)
        keys, values = (tuple(_placed(x, place) for x in pair) for pair in (self.keys, self.values))
        return dataclasses.replace(self, keys=keys, values=values)

    def layer(self, index: int) -> KeysAndValues:
        """Keys and values of layer `index`, where they are kept."""
        return self.keys[index], self.values[index]

    def __len__(self) -> int:
        """P, tokens of the context."""
        return self.token_ids.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and states, wherever they lie. They do not depend on any batch."""
        return sum(self.nbytes_by_device.values())

    @property
    def nbytes_by_device(self) -> dict[str, int]:
        """`nbytes`, apart for each device."""
        states = (x for layer in self.states for x in layer.values())
        found: dict[str, int] = {}
        for x in (*self.keys, *self.values, *states):
            found[str(x.device)] = found.get(str(x.device), 0) + x.numel() * x.element_size()
        return found


def _check_start(after: SharedPrefix, ids: Tensor, extendable: bool, body: nn.Module, refused: str | None) -> None:
    if not extendable or refused is not None:
        raise ValueError(f"after: a prefix cannot be extended here, because {refused or 'all keys are made anew'}")
    if len(after) > ids.numel() or not torch.equal(after.token_ids, ids[: len(after)]):
        raise ValueError(f"after: its {len(after)} tokens are not the first of token_ids ({ids.numel()})")
    if after.body() is not body or bool(len(after)) != bool(after.keys):
        raise ValueError("after: has no keys of this model")


def _placed(x: Tensor, device: torch.device) -> Tensor:
    """On `device`; pinned where that lets a CUDA device fetch it while it computes."""
    x = x.to(device)
    pin = x.device.type == "cpu" and x.numel() and torch.cuda.is_available() and not x.is_pinned()
    return x.pin_memory() if pin else x
