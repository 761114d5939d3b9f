"""The sampler that a run's settings ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.models import seam
from opcd_fast.rollout import Choice, Rollout, TransformersRollout
from opcd_fast.training.settings import OPCDConfig

ENGINE_OF = {"transformers": "auto", "generate": "generate"}


def make_rollout(
    config: OPCDConfig,
    model: Any,
    *,
    stop_token_ids: Sequence[int],
    vocab_size: int | None,
    tokenizer: Any = None,
    prompts: Sequence[Sequence[int]] = (),
) -> Rollout:
    """Made once per run, before anything is written; the weights are given by `sync` later.

    Args:
        prompts: all that will be asked for; a file for replay must have answers to every one of them.
    Raises:
        InputError: the settings cannot work with this model.
    """
    has_adapter = hasattr(model, "peft_config")
    sends_adapter = config.rollout == "vllm" or (config.rollout == "server" and not config.rollout_command)
    if seam.prompt_learner(model) is not None and sends_adapter:
        raise InputError(
            f"rollout={config.rollout!r} cannot run the model's trained prefix; use 'transformers', or 'server' with "
            "rollout_command"
        )
    if not has_adapter and sends_adapter:
        raise InputError(
            f"rollout={config.rollout!r} sends a LoRA adapter, and the model has none: set lora_rank, or use "
            "rollout='server' with rollout_command"
        )
    common: dict[str, Any] = {"stop_token_ids": stop_token_ids, "vocab_size": vocab_size}
    folder = Path(config.output_dir)
    if config.rollout == "server":
        return _server(config, model, folder, common)
    if config.rollout == "vllm":
        from opcd_fast.rollout import VLLMRollout

        return VLLMRollout(
            config.rollout_model or model.name_or_path,
            folder=folder / "rollout_weights",
            max_lora_rank=config.lora_rank or max(c.r for c in model.peft_config.values()),
            gpu_memory_utilization=config.rollout_gpu_share,
            **common,
        )
    if config.rollout == "replay":
        from opcd_fast.rollout import ReplayRollout

        replay = ReplayRollout(
            config.rollout_file or "", tokenizer=tokenizer, template_kwargs=config.template_variables(), **common
        )
        replay.check(prompts)
        if config.importance_correction != "none":
            replay.check_logprobs()
        return replay
    return local_rollout(config, model, **common)


def local_rollout(config: OPCDConfig, model: Any, **common: Any) -> TransformersRollout:
    """The student in this process, also when the training answers come from elsewhere."""
    file = Path(config.output_dir) / "rollout.json"
    return TransformersRollout(
        model,
        engine=ENGINE_OF.get(config.rollout, "auto"),
        max_batch=config.rollout_batch,
        merge_adapter=config.merge_for_rollout,
        choice=Choice.of_file(file) if config.resume else Choice(file),
        **common,
    )


def _server(config: OPCDConfig, model: Any, folder: Path, common: dict[str, Any]) -> Rollout:
    from opcd_fast.rollout import CommandWeights, LoRAWeights, ServerRollout, Weights

    weights: Weights
    if config.rollout_command is not None:
        name = config.rollout_model or model.name_or_path
        weights = CommandWeights(folder / "rollout_weights", name, config.rollout_command)
    else:
        weights = LoRAWeights(folder / "rollout_weights")
    return ServerRollout(
        config.rollout_url or "",
        weights=weights,
        timeout=config.rollout_timeout,
        tries=config.rollout_tries,
        concurrency=config.rollout_concurrency,
        logprobs_are=config.rollout_logprobs,
        **common,
    )
