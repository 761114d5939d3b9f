"""Are these the same weights? A checksum of every parameter and buffer, read where it lies.

    before = checksum(weights_of(model))
    ...
    same = checksum(weights_of(model)) == before

Nothing that remembers less than the values is safe: fused optimizers, compiled ones, collectives and writes through
`.data` leave torch's counts of changes as they were.

A tensor's raw bits are taken as 32-bit words x_i, and 4,096 of them at a time, a row, become one number:

    row = sum_i w_i x_i mod 2^64            w_i: odd 64-bit numbers, drawn once, the same in every process

(multilinear hashing; Carter and Wegman 1979). All rows of all tensors, in order, are summed in the same way with
weights of their own, 4,096 at a time, until one number is left. Integers add up exactly, so the order in which a device
adds does not matter, and the CPU and a GPU get the same number.

What can go unseen: no change of a single word, because an odd w_i times a difference below 2^32 is not 0 mod 2^64. The
differences of several words (exchanged elements or rows, other signs, another constant) are multiplied by w_i of their
own, and cancel with a probability of 2^-64 when one of them is odd, and of about 2^-26 at worst, when all of them are
the highest bits of words. Who knows the w_i can make weights that collide: this is no cryptographic hash. Names,
shapes, types and layout in memory are compared as they are.

Cost: every byte is read once, and one number for each device comes to the host at the end, the only time that it
waits. A tensor takes two operations for each block of 2^17 words (2^22 on a GPU) and two for what is left of a row; the
scratch is one block of 64-bit integers (1 MiB, 32 MiB on a GPU).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opcd_fast.models import seam

Weights = Iterable[tuple[str, Tensor]]
Checksum = tuple[Any, ...]
"""Compares equal as long as all tensors have the same names, shapes, types, order and bits."""

_ROW = 4096  # words; the weights of a row stay in a core's first cache


def weights_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers by name, also buffers that are not saved (RoPE's frequencies); tied ones once.

    Without frequencies that the model itself sets in every call, to what the call's length asks for.
    """
    buffers = [(name, x) for name, x in model.named_buffers() if not _is_set_by_calls(model, name)]
    return [*model.named_parameters(), *buffers]


def _is_set_by_calls(model: nn.Module, buffer: str) -> bool:
    if not buffer.endswith("inv_freq") or "original" in buffer:
        return False
    kinds = getattr(model.get_submodule(buffer.rpartition(".")[0]), "rope_type", None)
    return not {"dynamic", "longrope"}.isdisjoint(kinds.values() if isinstance(kinds, dict) else [kinds])


def base_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Those that a forward pass without adapters reads."""
    added = _ids_of_adapters(model)
    return [(name, x) for name, x in weights_of(model) if id(x) not in added]


def adapter_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Those of adapters, active or not; empty for a model without."""
    added = _ids_of_adapters(model)
    return [(name, x) for name, x in weights_of(model) if id(x) in added]


def _ids_of_adapters(model: nn.Module) -> set[int]:
    learner = seam.prompt_learner(model)
    added = set() if learner is None else {id(x) for _, x in weights_of(learner.prompt_encoder)}
    for module in seam.adapter_modules(model):
        kept = ("base_layer.", "original_module.")
        # Adapters may nest (an embedding in `modules_to_save` holding a LoRA layer): any kept part keeps it.
        added.update(id(x) for name, x in weights_of(module) if not any(part in name for part in kept))
    return added


def is_sharded(weights: Weights) -> bool:
    """Whether ranks hold parts of a tensor, so that a change may lie in another rank's part."""
    return any(hasattr(x, "device_mesh") for _, x in weights)


@torch.no_grad()
def checksum(weights: Weights) -> Checksum:
    """Tells whether `weights` are still what they were: any types, on any devices, trained or not.

    Of a sharded tensor (DTensor) the part of this rank is read, and the numbers of all ranks of its mesh are added, so
    that all see a change of any: with such tensors the call is collective. Packed weights of bitsandbytes are read with
    their scales. Of tensors without data (meta, fake) name, shape and type count alone. Where tensors lie does not.
    """
    layout: list[tuple[Any, ...]] = []
    words: dict[torch.device, list[Tensor]] = {}
    meshes: dict[Any, None] = {}
    for name, x in weights:
        if hasattr(x, "device_mesh"):
            meshes[x.device_mesh] = None
        has_data = x.device.type != "meta" and type(x).__name__ != "FakeTensor"
        for part, plain in _parts(x):
            order = sorted(range(plain.ndim), key=plain.stride, reverse=True)  # as it lies in memory
            layout.append((name, part, tuple(plain.shape), plain.dtype, tuple(order)))
            if plain.numel() and has_data:
                words.setdefault(plain.device, []).append(plain.permute(order).contiguous().view(-1).view(torch.uint8))
    sums = [_sum_of(tensors) for tensors in words.values()]
    for mesh in meshes:
        _add_over(mesh, sums)
    return (tuple(layout), tuple(int(x) for x in sums))


def _parts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that `x` is made of, with what each is called."""
    if is_traceable_wrapper_subclass(x):  # DTensor, torchao's
        held = ((name, getattr(x, name)) for name in x.__tensor_flatten__()[0])
        for name, inside in held:
            if isinstance(inside, Tensor):  # a mesh is listed too
                yield from ((f"{name}.{inner}", part) for inner, part in _parts(inside))
        return
    state: Any = getattr(x, "quant_state", None)  # of bitsandbytes: scales, which may be packed in turn
    yield "", x.detach() if state is None else x.detach().as_subclass(Tensor)
    while state is not None:
        for name in ("absmax", "code", "offset"):
            part = getattr(state, name, None)
            if isinstance(part, Tensor):
                yield name, part
        state = getattr(state, "state2", None)


def _sum_of(tensors: list[Tensor]) -> Tensor:
    """The bytes of `tensors`, each (n,) uint8, all on one device -> () int64."""
    device = tensors[0].device
    row_weights = _row_weights(0, device)
    block = 32 if device.type == "cpu" else 1024  # rows: what stays in a cache
    largest = max(-(-x.numel() // 4) for x in tensors)
    scratch = torch.empty(min(block * _ROW, largest), dtype=torch.int64, device=device)
    rows = torch.empty(sum(-(-x.numel() // (4 * _ROW)) for x in tensors), dtype=torch.int64, device=device)
    done = 0
    for x in tensors:
        words = _words(x)
        whole = words.numel() // _ROW
        for first in range(0, whole, block):
            some = words[first * _ROW : min(first + block, whole) * _ROW].view(-1, _ROW)
            _weighted(some, row_weights, scratch, rows[done : done + len(some)])
            done += len(some)
        rest = words[whole * _ROW :].view(1, -1)
        if rest.numel():
            _weighted(rest, row_weights[: rest.numel()], scratch, rows[done : done + 1])
            done += 1
    level = 1
    while rows.numel() > 1:
        rows = torch.nn.functional.pad(rows, (0, -rows.numel() % _ROW)).view(-1, _ROW)
        rows = (rows * _row_weights(level, device)).sum(1)
        level += 1
    return rows[0]


def _words(x: Tensor) -> Tensor:
    """Bytes (n,) -> (ceil(n / 4),) int32, the same memory unless that ends or begins between words."""
    if x.numel() % 4 or x.storage_offset() % 4:
        x = torch.nn.functional.pad(x, (0, -x.numel() % 4))
    return x.view(torch.int32)


def _weighted(words: Tensor, weights: Tensor, scratch: Tensor, out: Tensor) -> None:
    """words (rows, n) int32, weights (n,) int64 -> out (rows,) int64; scratch (at least rows n,) int64."""
    scratch = scratch[: words.numel()].view(words.shape)
    if words.device.type == "cpu":  # one pass over the scratch, where integers have a matrix-vector product
        torch.mv(scratch.copy_(words), weights, out=out)
    else:
        torch.sum(torch.mul(words, weights, out=scratch), 1, out=out)


@functools.cache
def _row_weights(level: int, device: torch.device) -> Tensor:
    """(4096,) odd int64."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(level)
        drawn = torch.randint(-(2**63), 2**63 - 1, (_ROW,), dtype=torch.int64, generator=generator, device="cpu")
        return (drawn | 1).to(device)


def _add_over(mesh: Any, sums: list[Tensor]) -> None:
    import torch.distributed as dist

    for group in mesh.get_all_groups():
        for x in sums:
            if x.device.type == mesh.device_type:
                dist.all_reduce(x, group=group)
