"""What `opcd train` sets where its user did not."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from opcd_fast.training.settings import OneOf, OPCDConfig

PRESETS = ("small", "paper")
LORA_RANK, BATCH, LONGEST = 16, 16, 128
EPOCHS, FEWEST_STEPS, MOST_STEPS = 5, 20, 100  # the experiments' 128 prompts, 16 a step, moved in within 40 steps
IN_WORDS = {  # for the help, in place of the defaults of `OPCDConfig`
    "lora_rank": f"{LORA_RANK}", "batch_size": f"{BATCH}, or all prompts", "max_new_tokens": f"{LONGEST}",
    "steps": f"{EPOCHS} passes over the prompts, {FEWEST_STEPS} to {MOST_STEPS}",
    "learning_rate": f"{OPCDConfig().learning_rate_for(adapter=True):g} for LoRA",
    "eval_prompts": "a tenth of the prompts, at least 8",
}  # fmt: skip


def settled(command: Any, named: Collection[str], prompts: Any = None) -> OPCDConfig:
    """`command.run` with the preset's values of what is not `named`. prompts: what is trained on, a list or a task.

    An adapter is added only where there is none: not to a model that has one, and not to a run that goes on (`init`).
    Raises InputError for an unknown preset, and settings that do not go together.
    """
    OneOf(*PRESETS)("preset", command.preset)
    config = command.run
    if command.preset == "paper":
        return config.checked()
    count = len(prompts) if isinstance(prompts, list) else None
    batch = config.batch_size if "batch_size" in named else min(BATCH, count or BATCH)
    wanted: dict[str, Any] = {"batch_size": batch, "max_new_tokens": LONGEST}
    if count is not None:
        wanted["steps"] = min(max(math.ceil(EPOCHS * count / batch), FEWEST_STEPS), MOST_STEPS)
    has_adapter = getattr(command, "init", None) or (Path(command.model) / "adapter_config.json").is_file()
    if not has_adapter and not config.num_virtual_tokens:
        wanted["lora_rank"] = LORA_RANK
    return config.checked(**{name: value for name, value in wanted.items() if name not in named})


def in_words(config: OPCDConfig) -> str:
    """One line for the beginning of a run."""
    trained = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights"
    if config.num_virtual_tokens:
        trained = f"a prefix of {config.num_virtual_tokens} tokens"
    return (
        f"training {trained}: {config.steps} steps of {config.batch_size} prompts, answers of at most "
        f"{config.max_new_tokens} tokens (--preset paper: the paper's settings)"
    )
