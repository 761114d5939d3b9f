"""The learning rate is a function of the step: by hand, in the optimizer, after a stop, and where it cannot be."""

import math
from functools import partial

import pytest
import torch
from resumption import cut_and_resumed
from safetensors.torch import load_file
from training_runs import lines_of, make

from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig

RATE, STEPS = 4e-3, 4
LINEAR = {"lr_scheduler_type": "linear"}


def by_hand(kind, warmup):
    """Share of the rate at each step: a line up from 0, then what the name says, down to 0 after the last step."""
    shares = []
    for step in range(STEPS):
        past = (step - warmup) / (STEPS - warmup)
        falling = {"constant": 1.0, "linear": 1 - past, "cosine": (1 + math.cos(math.pi * past)) / 2}[kind]
        shares.append(step / warmup if step < warmup else falling)
    return shares


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_rates_by_hand_are_recorded_and_in_the_optimizer(tokenizer, tmp_path, monkeypatch, kind, warmup):
    trainer = make(
        tokenizer, tmp_path / "run", eval_prompts=None, learning_rate=RATE, lr_scheduler_type=kind, warmup_steps=warmup
    )
    used, inner = [], trainer.optimizer.step
    monkeypatch.setattr(
        trainer.optimizer, "step", lambda: used.append([g["lr"] for g in trainer.optimizer.param_groups]) or inner()
    )
    recorded = [record["learning_rate"] for record in trainer.train().history]
    assert recorded == pytest.approx([RATE * share for share in by_hand(kind, warmup)])
    assert used == [[rate] for rate in recorded]


def test_weights_move_as_far_as_the_rate_says(tokenizer, tmp_path):
    """Adam's first step is the rate in every number, whatever the gradient; without a rate nothing moves."""

    def moved(name, **settings):
        trainer = make(tokenizer, tmp_path / name, eval_prompts=None, steps=3, save_every=1, keep_checkpoints=9,
                       weight_decay=0.0, **settings)  # fmt: skip
        trainer.train()
        at = [load_file(folder / "trainable.safetensors")
              for folder in sorted((tmp_path / name / "checkpoints").iterdir())]  # fmt: skip
        return [max(float((a[name] - b[name]).abs().max()) for name in a) for a, b in zip(at, at[1:])], at

    (_, third), warm = moved("warm", warmup_steps=2, learning_rate=RATE)
    assert all(float(value.abs().max()) == 0 for name, value in warm[0].items() if "lora_B" in name)
    (second, third_linear), _ = moved("linear", learning_rate=RATE, **LINEAR)
    (constant, _), _ = moved("constant", learning_rate=RATE)
    assert second == pytest.approx(constant * 2 / 3, rel=0.2) and third_linear < 0.7 * second < third


@pytest.mark.parametrize("settings", [LINEAR, {"lr_scheduler_type": "cosine", "warmup_steps": 1, "lora_rank": 0}])
def test_a_stopped_run_goes_on_bit_for_bit(tokenizer, tmp_path, settings):
    built = partial(make, tokenizer, eval_prompts=None, learning_rate=RATE, save_every=1, **settings)
    built(tmp_path / "whole").train()
    cut_and_resumed(built, tmp_path / "cut", ("step", 3))
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")

    def newest(folder):
        path = sorted((folder / "checkpoints").iterdir())[-1]
        return load_file(path / "trainable.safetensors"), torch.load(path / "optimizer.pt", weights_only=True)

    (weights, optimizer), (wanted, wanted_optimizer) = newest(tmp_path / "cut"), newest(tmp_path / "whole")
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert optimizer["param_groups"] == wanted_optimizer["param_groups"]
    for index, state in wanted_optimizer["state"].items():
        assert all(torch.equal(optimizer["state"][index][name], value) for name, value in state.items())


def test_a_run_with_a_plan_for_all_its_steps_goes_on_with_as_many(tokenizer, tmp_path):
    make(tokenizer, tmp_path / "falling", **LINEAR).train()
    with pytest.raises(InputError, match="steps differs from the run.*4 there, 6 now"):
        make(tokenizer, tmp_path / "falling", resume=True, steps=6, **LINEAR).train()
    make(tokenizer, tmp_path / "flat", warmup_steps=1).train()
    with pytest.raises(InputError, match="lr_scheduler_type differs"):
        make(tokenizer, tmp_path / "flat", warmup_steps=1, resume=True, **LINEAR).train()
    assert make(tokenizer, tmp_path / "flat", warmup_steps=1, resume=True, steps=5).train().steps == 5


def test_a_warm_up_that_takes_the_whole_run_is_refused():
    for kind in ("constant", "linear"):
        with pytest.raises(InputError, match="warmup_steps=5 of steps=5: .*set fewer"):
            OPCDConfig(steps=5, warmup_steps=5, lr_scheduler_type=kind)
    OPCDConfig(steps=5, warmup_steps=4)
