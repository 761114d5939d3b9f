"""The loop and its sampler on a CUDA device: it learns in bf16, resumes, and reports the right log-probabilities.

Kernels there may add in another order from call to call, so numbers are compared within bounds, never bit for bit.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny import logprobs_by_hand, lora_model, tiny_model, tiny_tokenizer

from opcd_fast.rollout import TransformersRollout
from opcd_fast.training import OPCDTrainer
from opcd_fast.training.settings import OPCDConfig

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SHARED = [7, 9, 11, 13, 17, 19, 23, 29, 31, 37]  # long enough to be run once for the batch
PROMPTS = [[*SHARED, 41], [*SHARED, 43, 47, 53], [*SHARED, 59, 61]]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def make(tokenizer, folder, callbacks=(), **settings):
    config = OPCDConfig(
        **{
            "output_dir": str(folder), "steps": 4, "batch_size": 4, "max_new_tokens": 6, "lora_rank": 4,
            "learning_rate": 1e-2, "eval_every": 2, "save_every": 2, "device": DEVICE, "dtype": "bfloat16", **settings,
        }
    )  # fmt: skip
    return OPCDTrainer(
        tiny_model(),
        tokenizer,
        "always answer with zzz",
        [f"question {i}" for i in range(6)],
        config,
        eval_prompts=["other one", "other two", "and a third"],
        callbacks=callbacks,
        quiet=True,
    )


def losses(result):
    return [record["loss"] for record in result.history]


# --- the loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lora_rank", "merge"), [(4, None), (4, True), (0, None)])
def test_bf16_training_moves_the_student_towards_a_frozen_teacher(tokenizer, tmp_path, lora_rank, merge):
    trainer = make(
        tokenizer, tmp_path / "run", lora_rank=lora_rank, merge_for_rollout=merge, steps=24, batch_size=6,
        eval_every=24, learning_rate=1e-2 if lora_rank else 3e-3,
    )  # fmt: skip
    assert trainer.rollout.copies == bool(merge), "None folds the adapter in on a CPU only"
    assert trainer.teacher.path == "merge", trainer.teacher.explain()
    teacher = trainer.teacher_rollout.model
    frozen = {name: p.detach().clone() for name, p in teacher.named_parameters() if not p.requires_grad}
    result = trainer.train()
    first, last = result.evaluations[0], result.evaluations[-1]
    assert last["fixed_kl"] < 0.8 * first["fixed_kl"]
    assert last["own_kl"] < 0.9 * first["own_kl"]
    assert {p.device.type for p in trainer.model.parameters()} == {torch.device(DEVICE).type}
    assert {p.dtype for p in trainer.parameters.values()} == {torch.float32}
    assert frozen and {p.dtype for p in frozen.values()} == {torch.bfloat16}
    now = dict(teacher.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_micro_batches_and_recomputation_do_not_change_the_first_step(tokenizer, tmp_path, lora_rank):
    """Later steps are not compared: an answer may differ by a token once the weights differ by rounding."""
    settings = {"lora_rank": lora_rank, "dtype": "float32", "steps": 1}
    whole = make(tokenizer, tmp_path / "whole", **settings).train()
    for name, change in (("parts", {"micro_batch_tokens": 60}), ("saved", {"gradient_checkpointing": True})):
        other = make(tokenizer, tmp_path / name, **settings, **change).train()
        assert losses(other) == pytest.approx(losses(whole), rel=1e-4)
        assert other.history[0]["grad_norm"] == pytest.approx(whole.history[0]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_rank", [4, 0])
def test_resume_goes_on_from_the_checkpoint(tokenizer, tmp_path, lora_rank, dtype):
    settings = {"lora_rank": lora_rank, "dtype": dtype, "learning_rate": 5e-3}
    # A copy of the folder as it was when step 3 had been made and only step 2 was saved: the run was killed there.
    cut = tmp_path / "cut"

    def kill(record):
        if (record["kind"], record["step"]) == ("step", 3):
            shutil.copytree(tmp_path / "whole", cut)

    whole = make(tokenizer, tmp_path / "whole", [kill], **settings)
    expected = whole.train()
    resumed = make(tokenizer, cut, resume=True, **settings)
    result = resumed.train()
    assert [record["step"] for record in result.history] == [1, 2, 3, 4]
    assert [record["step"] for record in result.evaluations] == [0, 2, 4]
    assert losses(result)[:2] == losses(expected)[:2]  # read back
    # Step 3 starts from the same weights and seeds, so it draws the same answers; step 4 follows another rounding.
    assert losses(result)[2] == pytest.approx(losses(expected)[2], rel=1e-3 if dtype == "float32" else 2e-2)
    for state in resumed.optimizer.state.values():
        assert int(state["step"]) == 4
        assert {state[name].device.type for name in ("exp_avg", "exp_avg_sq")} == {torch.device(DEVICE).type}


# --- the sampler --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "adapter", "merged"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.9, 0.6)])
def test_logprobs_are_those_of_a_float64_forward(temperature, top_p, kind):
    build = tiny_model if kind == "plain" else lora_model
    exact, model = build(dtype=torch.float64), build().to(DEVICE)
    sampler = TransformersRollout(model, stop_token_ids=[256], merge_adapter=kind == "merged")
    answers = sampler.generate(PROMPTS, max_new_tokens=9, temperature=temperature, top_p=top_p, seed=3)
    assert sampler._shared_length(model, PROMPTS) == len(SHARED)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        wanted = logprobs_by_hand(exact, prompt, list(answer.token_ids), temperature, top_p)
        torch.testing.assert_close(torch.tensor(answer.logprobs).double(), wanted, atol=2e-4, rtol=2e-4)


def test_logprobs_in_bf16_are_as_exact_as_a_plain_bf16_forward():
    exact, model = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.bfloat16)
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})  # the rounded weights
    model.to(DEVICE)
    answers = TransformersRollout(model, stop_token_ids=[256]).generate(PROMPTS * 4, max_new_tokens=12, seed=3)
    ours, plain = [], []
    for prompt, answer in zip(PROMPTS * 4, answers, strict=True):
        wanted = logprobs_by_hand(exact, prompt, list(answer.token_ids), 1.0)
        ours.append(torch.tensor(answer.logprobs).double() - wanted)
        plain.append(logprobs_by_hand(model, prompt, list(answer.token_ids), 1.0) - wanted)
    sizes = [torch.cat(errors).square().mean().sqrt().item() for errors in (ours, plain)]
    assert sizes[0] <= 1.5 * sizes[1], sizes


def test_the_seed_decides_and_the_callers_random_states_are_untouched():
    sampler = TransformersRollout(tiny_model().to(DEVICE), stop_token_ids=[256])
    torch.manual_seed(5)
    states = torch.random.get_rng_state(), torch.cuda.get_rng_state()
    first = sampler.generate(PROMPTS, max_new_tokens=8, seed=1)
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert torch.equal(states[1], torch.cuda.get_rng_state())
    torch.manual_seed(99)
    again = sampler.generate(PROMPTS, max_new_tokens=8, seed=1)
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in first]
    other = sampler.generate(PROMPTS, max_new_tokens=8, seed=2)
    assert [answer.token_ids for answer in other] != [answer.token_ids for answer in first]


# --- teachers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["live", "ema", "periodic"])
@pytest.mark.parametrize("lora_rank", [4, 0])
def test_a_moving_teacher_is_never_stale(tokenizer, tmp_path, mode, lora_rank):
    """The optimizer is fused here, and torch does not count its updates. The last teacher, asked again from nothing,
    answers as the trainer's own does."""
    trainer = make(
        tokenizer, tmp_path / "run", lora_rank=lora_rank, teacher_mode=mode, dtype="float32",
        **({"teacher_sync_every": 2} if mode == "periodic" else {}),
    )  # fmt: skip
    result = trainer.train()
    ids, ends = torch.arange(40, 75, device=DEVICE), torch.tensor([0, 20, 35])
    found = trainer.teacher.hidden_states_packed(ids, ends)
    trainer.teacher.invalidate()
    torch.testing.assert_close(trainer.teacher.hidden_states_packed(ids, ends), found, rtol=0, atol=1e-5)
    first = trainer.teachers.reference.hidden_states_packed(ids, ends)
    assert float((first - found).abs().max()) > 1e-3
    assert [e["step"] for e in result.evaluations] == [0, 2, 4]


def test_a_teacher_on_the_cpu_teaches_a_student_on_the_gpu(tokenizer, tmp_path):
    settings = {"lora_rank": 0, "learning_rate": 3e-3, "dtype": "float32", "steps": 2}
    here = make(tokenizer, tmp_path / "here", **settings).train()
    trainer = make(tokenizer, tmp_path / "there", teacher_device="cpu", **settings)
    assert {p.device.type for p in trainer.teacher.model.parameters()} == {"cpu"}
    assert trainer.teacher.head.weight.device.type == "cuda"
    there = trainer.train()
    assert losses(there)[0] == pytest.approx(losses(here)[0], rel=1e-4)
    assert there.evaluations[0]["fixed_kl"] == pytest.approx(here.evaluations[0]["fixed_kl"], rel=0.5)
