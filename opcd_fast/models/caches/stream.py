"""Keys and values of prefixes for one forward pass, layer by layer, on the device that runs the layer.

What lies there is handed out as it is. From the host's memory to a CUDA device a layer comes over while the one before
is at work, into one of two slots, so that never more than two layers are on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opcd_fast.attention import KeysAndValues

_ALIGNMENT = 256  # of each tensor in a slot: what a fresh allocation has


class SideStream:
    """Copies from pinned memory on a stream of their own. The host waits for neither stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def buffer(self, nbytes: int) -> Tensor:
        found = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        found.record_stream(self.stream)  # should a pass end early, a copy may be under way when it is freed
        return found

    def copy(self, places: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Begin behind all that the computing stream was given so far, which may still read the places."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for place, source in zip(places, sources, strict=True):
                place.copy_(source, non_blocking=True)

    def join(self) -> None:
        """What the computing stream is given from now on comes after all copies that were begun."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


class PrefixStream:
    """layers[layer][prefix]; layers without keys are never asked for.

    What was handed out for a layer is good until another layer is asked for. From the first layer to the last, each
    copy is hidden behind a layer's work; another order is right too.
    """

    def __init__(self, layers: Sequence[Sequence[KeysAndValues]]) -> None:
        self.layers = layers
        self._side: SideStream | None = None
        self._slots: list[Tensor] = []
        self._slot_of: dict[int, int] = {}  # layers that are on the device or on their way

    def layer(self, index: int, device: torch.device) -> Sequence[KeysAndValues]:
        """Keys and values of layer `index`, each prefix's, on `device`."""
        if device.type == "cuda" and self.layers[index][0][0].device.type == "cpu":
            return self._streamed(index, device)
        return [(keys.to(device), values.to(device)) for keys, values in self.layers[index]]

    def _streamed(self, index: int, device: torch.device) -> Sequence[KeysAndValues]:
        if self._side is None:
            self._side = SideStream(device)
            nbytes = max(sum(_aligned(x.nbytes) for pair in layer for x in pair) for layer in self.layers)
            self._slots = [self._side.buffer(nbytes) for _ in range(2)]
        if index not in self._slot_of:
            self._start(index, 0)
        self._side.join()
        slot = self._slot_of[index]
        following = next((i for i in range(index + 1, len(self.layers)) if self.layers[i][0][0].numel()), index)
        if following not in self._slot_of:
            self._start(following, 1 - slot)
        places = self._places(index, slot)
        return list(zip(places[::2], places[1::2], strict=True))

    def _start(self, index: int, slot: int) -> None:
        assert self._side is not None
        self._slot_of = {layer: its for layer, its in self._slot_of.items() if its != slot} | {index: slot}
        self._side.copy(self._places(index, slot), [x for pair in self.layers[index] for x in pair])

    def _places(self, index: int, slot: int) -> list[Tensor]:
        """Where the keys and values of a layer lie in a slot."""
        places, offset = [], 0
        for x in (x for pair in self.layers[index] for x in pair):
            places.append(self._slots[slot][offset : offset + x.nbytes].view(x.dtype).view(x.shape))
            offset += _aligned(x.nbytes)
        return places


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
