"""accelerate's Accelerator as the loop uses it: mixed precision, clipping, and the engine that moves gradients."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opcd_fast.errors import InputError
from opcd_fast.launch import launched


def make_accelerator(
    device: torch.device, dtype: torch.dtype, trackers: Sequence[Any] = (), logging_dir: Path | None = None
) -> Any:
    """An accelerator on `device` whose autocast is `dtype`.

    trackers: names or objects for accelerate's `log_with`; those that write files do so under `logging_dir`.
    Raises InputError for an engine that training does not work with: anything but one process, plain data parallelism,
    FSDP2, or DeepSpeed's ZeRO-3.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    def make() -> Any:
        precision = "bf16" if dtype == torch.bfloat16 else "no"
        engine: dict[str, Any] = {}
        if _asked("FSDP"):
            engine["fsdp_plugin"] = _fsdp_plugin(dtype)
        if _asked("DEEPSPEED"):  # whose weights decide: zero3_engine.py
            engine["deepspeed_plugin"], precision = _deepspeed_plugin(), "no"
        return Accelerator(
            mixed_precision=precision,
            cpu=device.type == "cpu",
            # The loop accumulates itself, so the environment must not make accelerate divide once more.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(logging_dir=None if logging_dir is None else str(logging_dir)),
            **engine,
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
    if _asked("DEEPSPEED"):  # or every model that is loaded from here on would be sharded, by all ranks together
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    return accelerator


def join(device: str) -> None:
    """Meet the other processes of the launcher, where there is one; before anything that ranks do together."""
    if launched() > 1:
        from accelerate.state import PartialState

        PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def shards() -> bool:
    """Whether weights will be sharded: the launcher asked for it (`accelerate launch --use_fsdp` or `--use_deepspeed`,
    or a config file that says so). They are then loaded on the CPU, because they may not fit one GPU whole."""
    return _asked("FSDP") or _asked("DEEPSPEED")


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


def _deepspeed_plugin() -> Any:
    """accelerate's plugin from the launcher's settings, for ZeRO-3 whose weights are all on the GPUs."""
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"the launcher asks for DeepSpeed, which cannot be imported ({error}); pip install 'opcd-fast[deepspeed]'"
        ) from error
    from accelerate.utils import DeepSpeedPlugin

    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"  # weights are looked at before they are sharded
    try:
        plugin = DeepSpeedPlugin()
    except ValueError as error:
        raise InputError(f"DeepSpeed's config: {error}") from error
    config = plugin.deepspeed_config
    zero = config["zero_optimization"]
    if plugin.zero_stage != 3:
        raise InputError(f"DeepSpeed's ZeRO stage {plugin.zero_stage} is not supported; set zero_stage: 3")
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device", "none") not in ("none", None):
            raise InputError(f"DeepSpeed's {part} is not supported; set {part}_device: none")
    for part in ("optimizer", "scheduler", "tensor_parallel", "sequence_parallel_size"):
        if part in config:
            raise InputError(f"DeepSpeed's config has {part!r}, which a run does not go with; drop it there")
    for name in [name for name, value in zero.items() if value == "auto"]:  # its default will do
        del zero[name]
    zero.setdefault("reduce_bucket_size", 50_000_000)  # gradients; the default's half a billion are 2 GB in fp32
    return plugin


def _refuse_engine(accelerator: Any) -> None:
    from accelerate.utils import DistributedType

    kind = accelerator.distributed_type
    sharding = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if shards() and kind not in sharding:
        raise InputError("the launcher asks for sharded weights, which accelerate has on GPUs only; use DDP on the CPU")
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, *sharding):
        raise InputError(f"accelerate's engine {kind} is not supported; use DDP, FSDP2 or ZeRO-3")
