"""accelerate's Accelerator for one process: mixed precision, clipping and unwrapping."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opcd_fast.errors import InputError


def make_accelerator(
    device: torch.device, dtype: torch.dtype, trackers: Sequence[Any] = (), logging_dir: Path | None = None
) -> Any:
    """An accelerator on `device` whose autocast is `dtype`. Raises InputError for several processes.

    trackers: names or objects for accelerate's `log_with`; those that write files do so under `logging_dir`.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    def make() -> Any:
        # The loop accumulates itself, so the environment must not make accelerate divide once more.
        plugin = GradientAccumulationPlugin(num_steps=1)
        precision = "bf16" if dtype == torch.bfloat16 else "no"
        return Accelerator(
            mixed_precision=precision,
            cpu=device.type == "cpu",
            gradient_accumulation_plugin=plugin,
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(logging_dir=None if logging_dir is None else str(logging_dir)),
        )

    try:
        accelerator = make()
        stale = accelerator.device.type != device.type
    except ValueError:
        stale = True
    if stale:  # accelerate's state is global: an earlier run in this process had another precision or device
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = make()
    if accelerator.num_processes > 1:
        raise InputError("several processes are not supported yet; start without `accelerate launch`")
    return accelerator
