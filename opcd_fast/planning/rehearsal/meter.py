"""Counts the bytes of all storages that exist, moment by moment, without needing their data.

Storages, not tensors: views share one, and it lives until the last of them is gone. torch's own MemTracker counts them
too, but by module; it knows no phases, no memory elsewhere, and nothing that an operator holds inside of itself.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten


@dataclass
class Peak:
    """The worst moment of a phase: bytes in all, and by what they were made for."""

    nbytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Meter(TorchDispatchMode):
    """While it is entered, inside of a FakeTensorMode, tensors with data stay real and others are fake.

    Numbers of tokens and their places are looked at by Python code, so what is computed from real tensors alone is
    real, and so are new integers. Everything computed from weights is fake.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, Peak] = {}
        self.held = 0
        self._phase = self._label = "other"
        self._live: dict[int, tuple[int, str]] = {}  # bytes and label by storage
        self._parts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        fake = any(isinstance(x, FakeTensor) for x in tensors)
        if fake and func is aten._local_scalar_dense.default:
            # The one number a step reads off a tensor on its way is the gradient of the loss, which is 1.
            return 1.0
        if not fake and (tensors or _makes_integers(func, args, kwargs)):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self.see(x)
        return out

    @contextmanager
    def phase(self, name: str, label: str | None = None, scratch: int = 0) -> Iterator[None]:
        """What happens inside counts as phase `name`; what is made there, as part `label` (the same by default).
        scratch: bytes that are held inside of its last operation and by no tensor."""
        before = self._phase, self._label
        self._phase, self._label = name, label or name
        self._note()
        try:
            yield
            self._note(scratch)
        finally:
            self._phase, self._label = before

    def see(self, x: Tensor, label: str | None = None) -> None:
        """Count the storage of `x`; with `label`, as that part from now on."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            self._count(key, storage.nbytes(), label or self._label)
            weakref.finalize(storage, self._forget, key)
            self._note()
        elif label is not None:
            self._count(key, self._live[key][0], label)

    def elsewhere(self, x: Tensor) -> None:
        """`x` lies in another memory: its storage does not count."""
        self.see(x)
        key = x.untyped_storage()._cdata
        self._count(key, 0, self._live[key][1])

    def _count(self, key: int, size: int, label: str) -> None:
        self._forget(key)
        self._live[key] = size, label
        self._parts[label] += size
        self.held += size

    def _forget(self, key: int) -> None:
        size, label = self._live.pop(key, (0, "other"))
        self._parts[label] -= size
        self.held -= size

    def _note(self, scratch: int = 0) -> None:
        peak = self.peaks.setdefault(self._phase, Peak())
        if self.held + scratch > peak.nbytes:
            parts = {**self._parts, "scratch": scratch}
            peak.nbytes, peak.parts = self.held + scratch, {part: size for part, size in parts.items() if size}


def _makes_integers(func: Any, args: Any, kwargs: Any) -> bool:
    dtype, kind = kwargs.get("dtype"), func.overloadpacket
    if dtype is not None:
        return not dtype.is_floating_point
    if kind is aten.full:
        return isinstance(args[1], int)
    return kind is aten.randint or (kind is aten.arange and all(isinstance(x, int) for x in args))
