"""How often the base begins as the context would have it: what on-policy learning has to start from.

For every held-out prompt the most probable first token with the context, and its probability without.
"""

from __future__ import annotations

import json
import statistics
from datetime import datetime, timezone
from typing import Any

import torch

from experiments import few_shot_form, made_up_money, persona
from experiments.experiment import HERE, Experiment
from opcd_fast.data.prompts import read_context, read_prompts
from opcd_fast.data.rendering import render, whole_prompt
from opcd_fast.evaluation.info import where_it_ran
from opcd_fast.models import load_model, load_tokenizer
from opcd_fast.runtime import write_text


@torch.no_grad()
def first_tokens(model: Any, tokenizer: Any, experiment: Experiment) -> dict[str, object]:
    """Medians over the held-out prompts, at the experiment's temperature."""
    context, prompts = read_context(experiment.context), read_prompts(experiment.eval_prompts)
    (rendered,), prefixes = render(tokenizer, [prompts], context, {})

    def probabilities(ids: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([ids], device=model.device), logits_to_keep=1).logits[0, -1]
        return (logits.float() / experiment.temperature).softmax(-1)

    within = [probabilities(whole_prompt(row, prefixes)) for row in rendered]
    without = [probabilities(list(row.student_ids)) for row in rendered]
    wanted = [int(row.argmax()) for row in within]
    return {
        "prompts": len(wanted),
        "temperature": experiment.temperature,
        "most common": tokenizer.decode([statistics.mode(wanted)]),
        "with the context": statistics.median(float(row[token]) for row, token in zip(within, wanted)),
        "without": statistics.median(float(row[token]) for row, token in zip(without, wanted)),
    }


if __name__ == "__main__":
    experiments = (few_shot_form.EXPERIMENT, persona.EXPERIMENT, made_up_money.EXPERIMENT)
    models = load_model("smollm2", dtype="float32"), load_tokenizer("smollm2")
    found = {one.name: first_tokens(*models, one) for one in experiments}
    ran = {
        **where_it_ran(), "command": "python -m experiments.first_token",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    write_text(HERE / "results" / "first_token.json", json.dumps({"ran": ran, **found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))
