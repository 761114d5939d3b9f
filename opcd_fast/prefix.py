"""A context, read once: its keys and values at batch size 1, and the hidden state that ends it."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opcd_fast import chunked_prefill
from opcd_fast import transformers_seam as seam
from opcd_fast.expanded_cache import states_of
from opcd_fast.stored_layer import StoredLayer, storage_type

_FORMAT = "opcd-fast-prefix"
_PLAIN, _QUANTISED = "1", "2"  # versions of the format; what reads the first alone must not take eight bits for keys


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """The KV cache of one context of P tokens: read by every sequence of a batch, never copied per row.

    It may lie elsewhere than the model, and in eight bits (`stored`); `layer` gives one layer as it is kept.
    """

    token_ids: Tensor  # (P,) int64, on the CPU
    keys: tuple[Tensor, ...]  # one (1, H_kv, kept, d) per layer; kept = P, or min(P, W - 1) with a window of W
    values: tuple[Tensor, ...]
    last_hidden_state: Tensor | None  # (D,): what predicts the first token after the context; None when P = 0
    metadata: dict[str, str] = field(default_factory=dict)  # what it was built with, see `describe`
    # What recurrent layers carry on, one for each layer, each (1, ...); () for models without such layers.
    states: tuple[dict[str, Tensor], ...] = ()
    # Of keys and values in eight bits, see `StoredLayer`; () when they are in the model's type.
    key_scales: tuple[Tensor, ...] = ()
    value_scales: tuple[Tensor, ...] = ()

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
        run again; its keys and values are copied. Raises ValueError when it is not that, or in eight bits.

        device: where keys and values are kept, None for the model's. Read in chunks, they grow there, and the model's
        device holds one layer of them at a time; read at once, they are all on the model's device first.
        """
        if chunk_tokens is not None and chunk_tokens < 0:
            raise ValueError(f"chunk_tokens: expected a number of tokens, 0 or None, got {chunk_tokens}")
        body = seam.body_of(model)
        ids = token_ids.detach().to("cpu", torch.int64)
        metadata = describe(body)
        if after is not None:
            _check_start(after, ids, keep_kv and chunk_tokens != 0, metadata, chunked_prefill.refuses_chunks(body))
            if len(after) == ids.numel():
                return after
        if ids.numel() == 0:
            return cls(ids, (), (), None, metadata)
        row = ids.unsqueeze(0).to(next(body.parameters()).device)
        with torch.no_grad():
            if not keep_kv:
                return cls(ids, (), (), seam.run_body(body, row)[0, -1].clone(), metadata)
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
        prefix = cls(ids, keys, values, last, metadata, states if any(states) else ())
        return prefix if device is None else prefix.stored(device=device)

    def stored(
        self, *, device: torch.device | str | None = None, dtype: str | torch.dtype | None = None
    ) -> SharedPrefix:
        """With keys and values on `device` and in `dtype`, "float8_e4m3fn"; None: as they are.

        On the CPU of a machine with CUDA they are pinned. States of recurrent layers and the last hidden state stay as
        and where they are. A prefix in eight bits cannot be turned back.
        """
        kind = storage_type(dtype)
        layers = [self.layer(index) for index in range(len(self.keys))]
        if kind is not None:
            layers = [layer.quantise(kind) for layer in layers]
        if device is not None:
            layers = [layer.with_tensors([_placed(x, torch.device(device)) for x in layer.tensors]) for layer in layers]
        scaled = [layer for layer in layers if layer.key_scale is not None]
        return dataclasses.replace(
            self,
            keys=tuple(layer.keys for layer in layers),
            values=tuple(layer.values for layer in layers),
            key_scales=tuple(layer.key_scale for layer in scaled if layer.key_scale is not None),
            value_scales=tuple(layer.value_scale for layer in scaled if layer.value_scale is not None),
        )

    def layer(self, index: int) -> StoredLayer:
        """Keys and values of layer `index`, where and as they are kept."""
        if not self.key_scales:
            return StoredLayer(self.keys[index], self.values[index])
        return StoredLayer(self.keys[index], self.values[index], self.key_scales[index], self.value_scales[index])

    @property
    def quantised(self) -> bool:
        """Whether keys and values are in eight bits."""
        return bool(self.key_scales)

    def __len__(self) -> int:
        """P, tokens of the context."""
        return self.token_ids.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values, scales and states, wherever they lie. They do not depend on any batch."""
        return sum(self.nbytes_by_device.values())

    @property
    def nbytes_by_device(self) -> dict[str, int]:
        """`nbytes`, apart for each device."""
        states = (x for layer in self.states for x in layer.values())
        found: dict[str, int] = {}
        for x in (*self.keys, *self.values, *self.key_scales, *self.value_scales, *states):
            found[str(x.device)] = found.get(str(x.device), 0) + x.numel() * x.element_size()
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Everything it holds, by the names it has in a file."""
        tensors = {"token_ids": self.token_ids}
        if self.last_hidden_state is not None:
            tensors["last_hidden_state"] = self.last_hidden_state
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            tensors[f"keys.{index}"], tensors[f"values.{index}"] = key, value
        for index, (key, value) in enumerate(zip(self.key_scales, self.value_scales, strict=True)):
            tensors[f"key_scales.{index}"], tensors[f"value_scales.{index}"] = key, value
        for index, state in enumerate(self.states):
            tensors.update({f"states.{index}.{name}": x for name, x in state.items()})
        return tensors

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write token ids, keys, values and metadata as one safetensors file, atomically."""
        from safetensors.torch import save_file

        header = {
            **self.metadata,
            "format": _FORMAT,
            "format_version": _QUANTISED if self.quantised else _PLAIN,
            "layers": str(len(self.keys)),
        }
        target = Path(path)
        partial = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        try:
            save_file({name: x.contiguous() for name, x in self.tensors().items()}, partial, metadata=header)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        device: torch.device | str | None = None,
    ) -> SharedPrefix:
        """Read what `save` wrote, in the type it was kept in.

        device: where keys and values go (default: the model's, else the CPU); the rest goes to the model's, if given.

        With `model`, the file must come from a model of the same architecture, shapes, RoPE and dtype;
        whether the weights are the same is not recorded. Raises ValueError for a file that is not a prefix,
        is damaged, or does not fit `model`; FileNotFoundError when there is none.
        """
        from safetensors import SafetensorError, safe_open

        body = None if model is None else seam.body_of(model)
        home = device or "cpu" if body is None else next(body.parameters()).device
        device = device or home
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: no prefix file at {os.fspath(path)!r}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                header = dict(file.metadata() or {})
                version = header.get("format_version")
                if header.get("format") != _FORMAT or version not in (_PLAIN, _QUANTISED):
                    raise ValueError(f"path: {os.fspath(path)!r} is not a prefix that this version wrote")
                names = set(file.keys())

                def read(name: str) -> Tensor:
                    # On the CPU these are views of the mapped file: what happens to it later must not matter.
                    return file.get_tensor(name).clone()

                layers = range(int(header.pop("layers")))
                keys = tuple(read(f"keys.{i}") for i in layers)
                values = tuple(read(f"values.{i}") for i in layers)
                scaled = layers if version == _QUANTISED else range(0)
                scales = [tuple(read(f"{name}_scales.{i}") for i in scaled) for name in ("key", "value")]
                found = [{n: f"states.{i}.{n}" for n in _names(names, f"states.{i}.")} for i in layers]
                states = tuple({n: read(name).to(home) for n, name in layer.items()} for layer in found)
                ids = read("token_ids").cpu()
                last = read("last_hidden_state").to(home) if "last_hidden_state" in names else None
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"path: {os.fspath(path)!r} is not a readable prefix file ({error})") from error
        metadata = {name: value for name, value in header.items() if name not in ("format", "format_version")}
        prefix = cls(ids, keys, values, last, metadata, states if any(states) else (), *scales)
        if body is not None:
            expected = describe(body)
            wrong = [name for name in expected if metadata.get(name) != expected[name]]
            if wrong:
                raise ValueError(
                    f"path: {os.fspath(path)!r} was built with another model: "
                    + "; ".join(f"{name} is {metadata.get(name)}, the model has {expected[name]}" for name in wrong)
                )
        return prefix


def _check_start(
    after: SharedPrefix, ids: Tensor, extendable: bool, metadata: dict[str, str], refused: str | None
) -> None:
    if not extendable or refused is not None:
        raise ValueError(f"after: a prefix cannot be extended here, because {refused or 'all keys are made anew'}")
    if after.quantised:
        raise ValueError("after: it is in eight bits, whose rounding all later tokens would inherit")
    if len(after) > ids.numel() or not torch.equal(after.token_ids, ids[: len(after)]):
        raise ValueError(f"after: its {len(after)} tokens are not the first of token_ids ({ids.numel()})")
    wrong = [name for name in metadata if after.metadata.get(name) != metadata[name]]
    if wrong or bool(len(after)) != bool(after.keys):
        raise ValueError(f"after: has no keys of this model (differs in {wrong or 'having keys at all'})")


def _placed(x: Tensor, device: torch.device) -> Tensor:
    """On `device`; pinned where that lets a CUDA device fetch it while it computes."""
    x = x.to(device)
    pin = x.device.type == "cpu" and x.numel() and torch.cuda.is_available() and not x.is_pinned()
    return x.pin_memory() if pin else x


def _names(names: set[str], start: str) -> list[str]:
    return sorted(name[len(start) :] for name in names if name.startswith(start))


def describe(body: nn.Module) -> dict[str, str]:
    """What a KV cache of `body` depends on besides its weights, as strings."""
    config = body.config
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    heads = [seam.setting(config, name) for name in (*names, "sliding_window")]
    rope = seam.setting(config, "rope_parameters")
    return {
        "model": type(body).__name__,
        "shape": json.dumps(heads),
        "rope": json.dumps(rope, sort_keys=True, default=str),
        "dtype": str(next(body.parameters()).dtype),
    }


def cache_of(prefixes: Sequence[SharedPrefix]) -> tuple[Any, list[list[int] | None] | None]:
    """The read-only cache that puts `prefixes` in front of a packed row, in this order.

    Also how many keys it holds of each prefix in each layer, [layer][prefix]: 0 for an empty prefix, None for a layer
    that reads another's keys. (None, None) when all prefixes are empty.
    """
    full = [prefix for prefix in prefixes if len(prefix)]
    if not full:
        return None, None
    layers = []
    counts: list[list[int] | None] = []
    for i, key in enumerate(full[0].keys):
        layers.append([p.layer(i) for p in full])
        counts.append([p.keys[i].shape[-2] if len(p) else 0 for p in prefixes] if key.numel() else None)
    return seam.frozen_cache(layers), counts
