"""Short runs of a tiny model."""

import json

from tiny import tiny_model

from opcd_fast import OPCDConfig, OPCDTrainer

CONTEXT = "always answer with zzz"
PROMPTS = [f"question {i}" for i in range(6)]
HELD_OUT = ["other one", "other two", "and a third"]


def make(tokenizer, folder, model=None, *, eval_prompts=HELD_OUT, context=CONTEXT, prompts=PROMPTS, **settings):
    extra = {
        name: settings.pop(name) for name in ("teacher_model", "teacher_tokenizer", "callbacks", "scorer")
        if name in settings
    }
    if not all(isinstance(tracker, str) for tracker in settings.get("trackers", ())):
        extra["trackers"] = settings.pop("trackers")  # objects, not names
    config = OPCDConfig(
        **{
            "output_dir": str(folder), "steps": 4, "batch_size": 4, "max_new_tokens": 6, "lora_rank": 4,
            "learning_rate": 1e-2, "eval_every": 2, "save_every": 2, "device": "cpu", "dtype": "float32",
            "plots": False, **settings,
        }
    )  # fmt: skip
    return OPCDTrainer(
        model or tiny_model(), tokenizer, context, prompts, config, eval_prompts=eval_prompts, quiet=True, **extra
    )


def losses(result):
    return [record["loss"] for record in result.history]


def lines_of(folder):
    """The records in a run's folder, but for times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]
