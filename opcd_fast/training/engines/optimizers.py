"""The optimizers of a run, named as in transformers' TrainingArguments (`optim`).

| name | state, bytes for each trained number |
|---|---|
| adamw_torch | 8: two averages in float32 |
| adamw_8bit | 2.03: both averages in 8 bits, with a float32 scale for every 256 numbers (Dettmers et al.,
    arXiv 2110.02861; bitsandbytes). Tensors of fewer than 4,096 numbers keep 8 |
| paged_adamw_8bit | the same, in memory that CUDA moves to the host when the GPU is full (QLoRA, arXiv 2305.14314) |
| adafactor | about 0: of a matrix the mean squares of rows and columns (Shazeer and Stern, arXiv 1804.04235), no
    first moment; at the rate given, as in transformers' trainer, without scaling by the weights' size |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from opcd_fast.errors import InputError
from opcd_fast.models import require_bitsandbytes
from opcd_fast.training.settings import OPCDConfig


def make_optimizer(
    config: OPCDConfig, parameters: Iterable[Tensor], device: torch.device, *, adapter: bool, prefix: bool = False
) -> torch.optim.Optimizer:
    """What `config.optimizer` names, for `parameters` on `device`.

    adapter: whether these are an adapter's, prefix: a trained prefix, which decide on the default rate.
    Raises InputError: bitsandbytes is not installed, or cannot do this on `device`.
    """
    rate, decay = config.learning_rate_for(adapter=adapter, prefix=prefix), config.weight_decay
    if config.optimizer == "adamw_torch":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=device.type == "cuda")
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters, lr=rate, weight_decay=decay, scale_parameter=False, relative_step=False, warmup_init=False
        )
    setting = f"optimizer={config.optimizer!r}"
    paged = config.optimizer.startswith("paged_")
    bnb = require_bitsandbytes(setting)
    if paged and device.type != "cuda":
        raise InputError(f"{setting}: pages move between a GPU and the host, the run is on {device}; use 'adamw_8bit'")
    kind = bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit
    _refuse_without_kernel(kind, device, setting)
    return kind(parameters, lr=rate, weight_decay=decay)


def schedule_of(config: OPCDConfig) -> Callable[[int], float]:
    """What the learning rate is multiplied by at a step, counted from 0: transformers' schedule, without a state."""
    from transformers import get_scheduler

    kind = config.lr_scheduler_type
    if kind == "constant" and config.warmup_steps:
        kind = "constant_with_warmup"
    any_optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    return get_scheduler(kind, any_optimizer, config.warmup_steps, config.steps).lr_lambdas[0]


def _refuse_without_kernel(kind: Any, device: torch.device, setting: str) -> None:
    """One step of nothing: which devices a version of bitsandbytes serves, only a step tells."""
    probe = torch.nn.Parameter(torch.zeros(4096, device=device))  # fewer would be kept in 32 bits
    probe.grad = torch.zeros_like(probe)
    try:
        kind([probe]).step()
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{setting}: this bitsandbytes cannot do it on {device} ({type(error).__name__}: {reason}); use "
            "'adafactor', or 'adamw_torch'"
        ) from error
