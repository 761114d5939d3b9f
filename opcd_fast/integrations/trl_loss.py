"""Our loss in TRL's own distillation trainers, in the place of theirs; nothing else of them changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import MethodType
from typing import Any

from opcd_fast.integrations.forward import Heads, refuse_settings
from opcd_fast.integrations.trl_objectives import (
    Options,
    check_distillation,
    check_sdft,
    distillation_loss,
    gkd_loss,
    sdft_loss,
    sdft_rollout_logps,
)

TESTED = (1, 16)  # the hooks of TRL are private, and move between minor versions
NORMALIZE = ("trl", "exact")

# Defining module and class -> (what refuses its settings, {method: what stands in for it})
_KINDS: dict[tuple[str, str], tuple[Callable[[Any], None], dict[str, Callable[..., Any]]]] = {
    ("trl.trainer.distillation_trainer", "DistillationTrainer"): (
        check_distillation,
        {"_compute_loss": distillation_loss},
    ),
    ("trl.experimental.gkd.gkd_trainer", "GKDTrainer"): (refuse_settings, {"compute_loss": gkd_loss}),
    ("trl.experimental.sdft.sdft_trainer", "SDFTTrainer"): (
        check_sdft,
        {"compute_loss": sdft_loss, "_compute_rollout_logps": sdft_rollout_logps},
    ),
}
_MISSING = object()


def check_trl() -> None:
    """Raise ImportError when TRL is missing or is another minor version than the one whose hooks are known."""
    wanted = f"{TESTED[0]}.{TESTED[1]}"
    remedy = f"pip install 'trl>={wanted},<{TESTED[0]}.{TESTED[1] + 1}'"
    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise ImportError(f"opcd_fast.integrations.trl needs trl: {remedy}") from error
    if tuple(found.split(".")[:2]) != (str(TESTED[0]), str(TESTED[1])):
        raise ImportError(
            f"trl {found} is installed, and the hooks that opcd_fast.integrations.trl uses are private and known of "
            f"{wanted} only: {remedy}"
        )


class FusedLoss:
    """What `use_fused_loss` returns. `restore()`, or leaving it as a context manager, gives TRL's loss back."""

    def __init__(self, target: Any, methods: dict[str, Any]) -> None:
        self._target = target
        self._before = {name: vars(target).get(name, _MISSING) for name in methods}
        for name, method in methods.items():
            setattr(target, name, method)

    def restore(self) -> None:
        """TRL's own loss again. A second call does nothing."""
        for name, method in self._before.items():
            if method is _MISSING:
                delattr(self._target, name)
            else:
                setattr(self._target, name, method)
        self._before = {}

    def __enter__(self) -> FusedLoss:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.restore()


def use_fused_loss(
    target: Any, *, normalize: str = "trl", workspace_bytes: int | None = None, backend: str = "auto"
) -> FusedLoss:
    """Put the fused loss into a TRL trainer: DistillationTrainer, GKDTrainer or SDFTTrainer.

    Student and teacher run through their bodies only, and the loss is computed from hidden states: no tensor of
    tokens x vocabulary exists. Divergence, temperature, masks and metrics are those of the trainer's own config.

    target: a trainer, or its class (or one of these classes' subclasses) for all trainers made from it.
    normalize: "trl" divides by what TRL divides by, so that losses compare. "exact" divides GKD's loss by the tokens
        that are scored in each micro-batch (TRL divides by the data set's labels, even when other tokens were
        generated) and leaves sequences without a scored token out of SDFT's mean (TRL counts them as 0).
        DistillationTrainer counts right, and both are the same.
    workspace_bytes, backend: as in `fused_linear_divergence`.

    Returns a `FusedLoss`, whose `restore()` puts TRL's loss back.

    Raises ImportError for another TRL than 1.16, TypeError for another trainer, ValueError for settings that a fused
    loss cannot follow; of a class's trainers, these are known when their first loss is computed.
    """
    check_trl()
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize is {normalize!r}; expected 'trl' or 'exact'")
    cls = target if isinstance(target, type) else type(target)
    base = next((b for b in cls.__mro__ if (b.__module__, b.__qualname__) in _KINDS), None)
    if base is None or any(b.__qualname__ == "ServerDistillationTrainer" for b in cls.__mro__):
        raise TypeError(
            f"use_fused_loss: {cls.__name__} is not one of TRL's {', '.join(name for _, name in _KINDS)}; trainers for "
            "different tokenizers (GOLD) or for a teacher on a server have no hidden states to compare"
        )
    check, losses = _KINDS[base.__module__, base.__qualname__]
    for name in losses:
        owner = next(o for o in (target, *cls.__mro__) if name in getattr(o, "__dict__", {}))
        if hasattr(vars(owner)[name], "fused"):
            raise ValueError(f"use_fused_loss: {cls.__name__} has the fused loss already; call its restore() first")
        if owner is not base:
            raise ValueError(
                f"use_fused_loss: {cls.__name__} has its own {name}, which this would replace; pass TRL's "
                f"{base.__name__} itself to change what that calls as super()"
            )
    if cls is not target:
        check(target)
    options = Options(normalize == "exact", workspace_bytes, backend, Heads())
    return FusedLoss(target, {name: _method(target, loss, check, options) for name, loss in losses.items()})


def _method(target: Any, loss: Callable[..., Any], check: Callable[[Any], None], options: Options) -> Any:
    compute = partial(loss, options)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        check(self)  # settings are plain attributes, and may have changed since
        return compute(self, *args, **kwargs)

    method.fused = True  # type: ignore[attr-defined]
    return method if isinstance(target, type) else MethodType(method, target)
