"""What a continued run must share with its beginning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from opcd_fast.training.settings import OPCDConfig

# Settings that may change between a run and its continuation without changing the steps already made.
FREE_ON_RESUME = (
    "output_dir", "steps", "eval_every", "save_every", "keep_checkpoints", "resume", "device", "dtype",
    "micro_batch_tokens", "workspace_bytes", "gradient_checkpointing", "loss_backend",
    "max_prefix_bytes", "prefix_device", "teacher_batch_bytes", "share_prompts", "teacher_device", "teacher_offload",
    "rollout_url", "rollout_timeout", "rollout_tries", "rollout_concurrency", "rollout_gpu_share", "save_best",
    "early_stop_patience", "early_stop_delta", "trackers", "plots",
)  # fmt: skip


def identity(config: OPCDConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not free, and `facts` about data and weights, as JSON values."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_ON_RESUME}
    return json.loads(json.dumps({**settings, **facts}))


def completed(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in a checkpoint, with the settings that its version had not yet: their defaults are what it did."""
    return {**identity(OPCDConfig(), {}), **kept}
