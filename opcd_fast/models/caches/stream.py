"""Keys and values of prefixes for one forward pass, layer by layer, on the device that runs the layer.

A prefix that lies there is handed out as it is. One that lies elsewhere, in the host's memory, comes over while the
layer before is at work: a layer is asked for, the copy of the next one is started, and then the layer is used. Two
slots on the device take turns, so that never more than two layers are there, however far the host runs ahead of the
device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

KeysAndValues = tuple[Tensor, Tensor]
"""Of one layer of one prefix: (1, H_kv, kept, d_k) and (1, H_kv, kept, d_v); (1, 0, 0, 0) where it has none."""

_ALIGNMENT = 256  # of each tensor in a slot: what a fresh allocation has


class Transfer(Protocol):
    """Copies tensors to a device. Slots are numbered; a slot holds what was copied into it last."""

    def start(self, slot: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Begin to copy `tensors` into `slot`, and return where they will be. They may not be read yet."""

    def wait(self, slot: int) -> None:
        """From here on the slot may be read."""

    def release(self, slot: int) -> None:
        """From here on the slot is not read any more."""


class BlockingTransfer:
    """Plain copies, for devices other than CUDA's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self, slot: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [x.to(self.device) for x in tensors]

    def wait(self, slot: int) -> None:
        pass

    def release(self, slot: int) -> None:
        pass


class CudaTransfer:
    """Copies on a stream of their own, from pinned memory, into two buffers of `slot_bytes`.

    The two streams meet in events alone: the copying one waits until a slot was read, the computing one until it was
    filled. The host waits for neither.
    """

    def __init__(self, device: torch.device, slot_bytes: int) -> None:
        self.stream = torch.cuda.Stream(device)
        self.buffers = [torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self.filled = [torch.cuda.Event() for _ in self.buffers]
        self.read = [torch.cuda.Event() for _ in self.buffers]
        for slot, buffer in enumerate(self.buffers):
            # Should a pass end early, a copy may still be under way when the buffer is freed.
            buffer.record_stream(self.stream)
            self.release(slot)  # whoever had this memory before may still be at it, on the computing stream

    def start(self, slot: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        places, offset = [], 0
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.read[slot])
            for x in tensors:
                end = offset + x.numel() * x.element_size()
                place = self.buffers[slot][offset:end].view(x.dtype).view(x.shape)
                place.copy_(x, non_blocking=True)
                places.append(place)
                offset = _aligned(end)
            self.filled[slot].record(self.stream)
        return places

    def wait(self, slot: int) -> None:
        torch.cuda.current_stream(self.buffers[slot].device).wait_event(self.filled[slot])

    def release(self, slot: int) -> None:
        self.read[slot].record(torch.cuda.current_stream(self.buffers[slot].device))


def open_transfer(source: torch.device, device: torch.device, slot_bytes: int) -> Transfer | None:
    """What brings tensors from `source` to `device`; None when they are there already."""
    if source == device:
        return None
    return CudaTransfer(device, slot_bytes) if device.type == "cuda" else BlockingTransfer(device)


class PrefixStream:
    """layers[layer][prefix], all prefixes in one place; layers without keys are never asked for.

    One forward pass uses it, from the first layer to the last. Another order works too, but then copies come late.
    """

    def __init__(self, layers: Sequence[Sequence[KeysAndValues]]) -> None:
        self.layers = layers
        self._transfer: Transfer | None = None
        self._opened = False
        self._placed: dict[int, tuple[int, list[KeysAndValues]]] = {}  # layer: its slot, and where it is or will be

    @contextmanager
    def layer(self, index: int, like: Tensor) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Keys and values of layer `index`, each prefix's, on the device and in the type of `like`.

        They are good inside the block only.
        """
        if not self._opened:
            source = self.layers[index][0][0].device
            self._transfer = open_transfer(source, like.device, max(map(_slot_bytes, self.layers)))
            self._opened = True
        if self._transfer is None:
            yield _cast(self.layers[index], like.dtype)
            return
        self._start(index)
        slot, placed = self._placed.pop(index)
        following = self._next(index)
        if following is not None:
            self._start(following, 1 - slot)
        self._transfer.wait(slot)
        yield _cast(placed, like.dtype)
        self._transfer.release(slot)

    def _start(self, index: int, slot: int = 0) -> None:
        if index in self._placed:
            return
        assert self._transfer is not None
        self._placed.clear()  # a copy that was started for a layer which did not come next
        places = self._transfer.start(slot, [x for pair in self.layers[index] for x in pair])
        self._placed[index] = slot, list(zip(places[::2], places[1::2], strict=True))

    def _next(self, index: int) -> int | None:
        """The next layer that has keys."""
        later = range(index + 1, len(self.layers))
        return next((i for i in later if self.layers[i][0][0].numel()), None)


def _cast(pairs: Sequence[KeysAndValues], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return [keys.to(dtype) for keys, _ in pairs], [values.to(dtype) for _, values in pairs]


def _slot_bytes(pairs: Sequence[KeysAndValues]) -> int:
    return sum(_aligned(x.numel() * x.element_size()) for pair in pairs for x in pair)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
