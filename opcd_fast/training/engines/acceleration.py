"""accelerate's Accelerator as the loop uses it: mixed precision, clipping, and the engine that moves gradients."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opcd_fast.errors import InputError
from opcd_fast.runtime import launched, launched_rank
from opcd_fast.training.engines.ranks import OtherRankError


def make_accelerator(
    device: torch.device, dtype: torch.dtype, trackers: Sequence[Any] = (), logging_dir: Path | None = None
) -> Any:
    """An accelerator on `device` whose autocast is `dtype`.

    trackers: names or objects for accelerate's `log_with`; those that write files do so under `logging_dir`.
    Raises InputError for an engine that training does not work with: anything but one process, plain data parallelism
    or FSDP2.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    _refuse_deepspeed()

    def make() -> Any:
        return Accelerator(
            mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
            cpu=device.type == "cpu",
            # The loop accumulates itself, so the environment must not make accelerate divide once more.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(logging_dir=None if logging_dir is None else str(logging_dir)),
            fsdp_plugin=_fsdp_plugin(dtype) if shards() else None,
        )

    try:
        accelerator = make()
        stale = accelerator.device.type != device.type
    except (ValueError, NotImplementedError):
        stale = True
    if stale:  # accelerate's state is global: an earlier run in this process had another precision or device
        alone = not PartialState._shared_state or PartialState().num_processes == 1
        AcceleratorState._reset_state(reset_partial_state=alone)
        accelerator = make()
    _refuse_engine(accelerator)
    return accelerator


def join(device: str) -> None:
    """Meet the other processes of the launcher, where there is one; before anything that ranks do together.

    Raises InputError for a launcher that asks for DeepSpeed.
    """
    _refuse_deepspeed()
    if launched() > 1:
        from accelerate.state import PartialState

        PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def shards() -> bool:
    """Whether weights will be sharded: the launcher asked for it (`accelerate launch --use_fsdp`, or a config file that
    says so). They are then loaded on the CPU, because they may not fit one GPU whole."""
    return _asked("FSDP")


def _asked(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1")


def _fsdp_plugin(dtype: torch.dtype) -> Any:
    """accelerate's plugin from the launcher's settings; gradients are summed in fp32, and the loss is not rounded."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("FSDP version 1 is not supported; set fsdp_version: 2 in accelerate's config")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    if plugin.cpu_ram_efficient_loading:
        raise InputError("fsdp_cpu_ram_efficient_loading is not supported; set it to false in accelerate's config")
    if plugin.activation_checkpointing:
        raise InputError("fsdp_activation_checkpointing: set gradient_checkpointing=True for the run instead")
    if dtype == torch.bfloat16:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    return plugin


def _refuse_deepspeed() -> None:
    if _asked("DEEPSPEED"):
        error = OtherRankError if launched_rank() else InputError  # all ranks know it, and one says it
        raise error(
            "the launcher asks for DeepSpeed, which is not supported; shard the weights with FSDP2: accelerate launch "
            f"--config_file {Path(__file__).parents[2] / 'engines' / 'fsdp2.yaml'}"
        )


def _refuse_engine(accelerator: Any) -> None:
    from accelerate.utils import DistributedType

    kind = accelerator.distributed_type
    if shards() and kind != DistributedType.FSDP:
        raise InputError("the launcher asks for sharded weights, which accelerate has on GPUs only; use DDP on the CPU")
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP):
        raise InputError(f"accelerate's engine {kind} is not supported; use DDP or FSDP2")
