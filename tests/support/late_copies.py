"""In place of a stream of copies, on one device: a copy is there when the computing stream waits for it."""

import torch


class LateCopies:
    """As `caches.stream.SideStream`. What is read before `join` is garbage, as it may be on a device."""

    opened: list["LateCopies"] = []

    def __init__(self, device):
        self.opened.append(self)
        self.log, self.pending = [], []

    def buffer(self, nbytes):
        self.log.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, places, sources):
        self.log.append("copy")
        for place, source in zip(places, sources, strict=True):
            assert source.numel()
            place.fill_(1e4)
            self.pending.append((place, source))

    def join(self):
        self.log.append("join")
        for place, source in self.pending:
            place.copy_(source)
        self.pending = []
