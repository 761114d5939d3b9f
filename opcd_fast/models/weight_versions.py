"""Which weights a result was computed from: tells whether they are still the same, without reading them.

Torch counts changes in place. What it does not count shows in where the numbers lie: weights that were loaded by
assignment, an adapter that was added later, a model cast to another type and back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import StorageWeakRef

HOME = "_opcd_home"
"""Attribute of a parameter that is now here, now there: the tensor that it is a copy of, which stays where it is."""

Versions = dict[int, tuple[Any, ...]]
"""Of each parameter, by its id: the memory it lies in, and how often it was changed in place."""


def versions_of(parameters: Iterable[Tensor]) -> Versions:
    """Compares equal as long as all `parameters` are the same tensors and hold what they held.

    Not seen: writes through `.data` into memory that stays in use. Nor what fused optimizers write, but for
    `count_optimizer_steps`.
    """
    return {id(p): _version_of(getattr(p, HOME, p)) for p in parameters}


def _version_of(p: Tensor) -> tuple[Any, int]:
    return _memory(p), 0 if p.is_inference() else p._version


def _memory(p: Tensor) -> Any:
    try:
        # Weak, or old weights would stay; and not an address, which comes again once they are gone.
        return StorageWeakRef(p.untyped_storage())
    except (RuntimeError, NotImplementedError):  # subclasses that have no memory of their own
        return None


@functools.cache
def count_optimizer_steps() -> None:
    """From now on, every step of any optimizer counts as a change of its parameters.

    Fused ones, and those with kernels of their own, write without telling torch. The hook is put in once per process.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(_count)


def _count(optimizer: Any, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            increment_version(parameter)
