"""Counts the bytes of all storages that exist, moment by moment, without needing their data.

Storages, not tensors: views share one, and it lives until the last of them is gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten

Scratch = Callable[[tuple[Any, ...]], int]
"""Bytes that an operator holds beside its results, from its arguments."""


@dataclass
class Peak:
    """The worst moment of a phase: bytes in all, and by what they were made for."""

    nbytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Meter(TorchDispatchMode):
    """While it is entered, inside of a FakeTensorMode, tensors with data stay real and others are fake.

    Numbers of tokens and their places are looked at by Python code, so what is computed from real tensors alone is
    real, and so are new integers. Everything computed from weights is fake.

    scratch: by operator, what it holds inside of itself.
    """

    def __init__(self, scratch: dict[Any, Scratch] | None = None) -> None:
        super().__init__()
        self.peaks: dict[str, Peak] = {}
        self.held = 0
        self._scratch = scratch or {}
        self._label = "other"
        self._phase = "other"
        self._live: dict[int, tuple[int, str]] = {}  # bytes and label by storage
        self._parts: dict[str, int] = {}

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
        inside = self._scratch.get(func)
        if inside is not None:
            self._note(inside(args), "scratch")
        return out

    @contextmanager
    def phase(self, name: str, label: str | None = None) -> Iterator[None]:
        """What happens inside counts as phase `name`; what is made there, as part `label` (the same by default)."""
        before = self._phase, self._label
        self._phase, self._label = name, label or name
        self._note(0, "")
        try:
            yield
        finally:
            self._phase, self._label = before

    def see(self, x: Tensor, label: str | None = None) -> None:
        """Count the storage of `x`; with `label`, as that part from now on."""
        storage = x.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None:
            if label is not None and known[1] != label:
                self._parts[known[1]] -= known[0]
                self._parts[label] = self._parts.get(label, 0) + known[0]
                self._live[key] = known[0], label
            return
        size, name = storage.nbytes(), label or self._label
        self._live[key] = size, name
        self._parts[name] = self._parts.get(name, 0) + size
        self.held += size
        weakref.finalize(storage, self._gone, key)
        self._note(0, "")

    def elsewhere(self, x: Tensor) -> None:
        """`x` lies in another memory: its storage does not count."""
        self.see(x)
        key = x.untyped_storage()._cdata
        size, name = self._live[key]
        self._parts[name] -= size
        self.held -= size
        self._live[key] = 0, name

    def _gone(self, key: int) -> None:
        size, name = self._live.pop(key)
        self._parts[name] -= size
        self.held -= size

    def _note(self, extra: int, name: str) -> None:
        peak = self.peaks.setdefault(self._phase, Peak())
        if self.held + extra > peak.nbytes:
            peak.nbytes = self.held + extra
            peak.parts = {part: size for part, size in self._parts.items() if size}
            if extra:
                peak.parts[name] = extra


def _makes_integers(func: Any, args: Any, kwargs: Any) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not dtype.is_floating_point
    if func.overloadpacket is aten.full:
        return isinstance(args[1], int)
    return func.overloadpacket is aten.arange and all(isinstance(x, int) for x in args)
