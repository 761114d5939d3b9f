"""The arithmetic of docs/scaling.md against torch's own counts, and against measured times."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import Shape
from benchmarks.scaling_model import Job, markdown
from benchmarks.schema import read

ROOT = Path(__file__).parents[2]


def tiny_job(model, **changes):
    shape = Shape.of(model.config)
    return Job(shape, **{"ranks": 1, "answers": 3, "response": 12, "prompt": 5, **changes})


def test_parameters_are_those_of_a_model():
    model = tiny_model()
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    job = tiny_job(model)
    assert job.parameters + norms == sum(p.numel() for p in model.parameters())
    from peft import LoraConfig, get_peft_model

    with_adapter = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert replace(job, lora_rank=4).trained == sum(p.numel() for p in with_adapter.parameters() if p.requires_grad)


def test_flops_are_those_that_torch_counts():
    model = tiny_model(attn_implementation="eager")
    job = tiny_job(model, context=0)
    length = job.prompt + job.response
    ids = torch.randint(0, job.shape.vocabulary, (job.answers, length))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(input_ids=ids)
    # Eager attention computes all T x T scores, the model counts the T (T + 1) / 2 that the mask leaves.
    masked = job.answers * (length * (length - 1) // 2) * job.shape.flops_per_pair
    # Rotary angles are a product with one inner element.
    angles = 2 * length * (job.shape.head_dim // 2)
    assert counter.get_total_flops() in (job.flops()["student"] + masked, job.flops()["student"] + masked + angles)
    with FlopCounterMode(display=False) as counter:
        hidden = torch.randn(job.answers * job.response, job.shape.hidden, requires_grad=True)
        (hidden @ model.lm_head.weight.t()).sum().backward()  # logits, dH, dW; the teacher's logits are a fourth
    assert job.flops()["loss"] == pytest.approx(counter.get_total_flops() * 4 / 3)
    assert replace(job, lora_rank=4).flops()["loss"] == pytest.approx(counter.get_total_flops())


def test_measured_losses_are_mostly_their_products():
    """The model has the products alone; measured beside each other on one CPU, they are most of the loss's time."""
    rows = read(ROOT / "benchmarks/results/loss_cpu_2026-11-21.jsonl").of("loss")
    shares = [
        row.get("of_bound")
        for row in rows
        if row.implementation == "opcd_fast-native" and row.settings["dtype"] == "float32" and "time" in row.values
        and row.group in ("main", "N", "V", "D")
    ]  # fmt: skip
    assert len(shares) >= 7 and min(shares) > 0.6
    said = f"{min(shares):.0%} to {max(shares):.0%} of the time"
    assert said in " ".join((ROOT / "docs" / "scaling.md").read_text().split())


def test_the_page_shows_these_tables():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert "\n".join(markdown()) in page
