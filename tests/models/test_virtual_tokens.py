"""A trained prefix: its forward and gradients are PEFT's, it begins as the context's own keys and values, it answers,
trains, goes on and loads as a PEFT adapter."""

import json
from functools import partial

import pytest
import torch
import training_runs
from resumption import check_resume
from tiny import logprobs_by_hand, prefixed, tiny_model, tiny_tokenizer

from opcd_fast.errors import InputError
from opcd_fast.export import ExportOptions, export
from opcd_fast.models import (
    load_model,
    packed_hidden_states,
    seam,
    shared_prompt_hidden_states,
    virtual_tokens,
    with_prefix,
)  # fmt: skip
from opcd_fast.rollout import TransformersRollout
from opcd_fast.teacher import ContextTeacher
from opcd_fast.training import OPCDConfig

SEQUENCES = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13], [20], [30, 31, 32, 33]]
IDS = torch.tensor(sum(SEQUENCES, []))
BOUNDS = torch.tensor([0, 3, 10, 11, 15], dtype=torch.int32)


def models():
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "eos_token_id": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 256,
    }  # fmt: skip
    torch.manual_seed(0)
    return {
        "llama": tiny_model(),
        "one key head each": tiny_model(num_key_value_heads=4),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**sizes)).eval(),  # biases
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=24)).eval(),  # heads wider than hidden_size / heads
    }


def by_peft(model):
    """(N, V) logits by PEFT's own forward, a sequence at a time."""
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in SEQUENCES])


def by_row(model, ids=IDS, bounds=BOUNDS, **options):
    hidden = packed_hidden_states(model, ids, bounds, **options)
    return seam.causal_lm(model).lm_head(hidden)


def answers(model, prompts=SEQUENCES, *, engine="decode", temperature=0.0):
    sampler = TransformersRollout(model, stop_token_ids=[256], engine=engine)
    return sampler.generate(prompts, max_new_tokens=6, temperature=temperature, seed=1)


@pytest.mark.parametrize("name", ["llama", "one key head each", "qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_gradients_are_pefts(name, checkpointing):
    model = prefixed(models()[name])
    weight = model.prompt_encoder["default"].embedding.weight
    wanted = by_peft(model)
    chosen = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5))
    (wanted * chosen).sum().backward()
    gradient, weight.grad = weight.grad, None
    assert gradient.abs().min() > 0
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    found = by_row(model)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    (found * chosen).sum().backward()
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-3)


def test_disabled_it_is_the_base():
    model, plain = prefixed(), tiny_model()
    base = by_row(plain)
    with model.disable_adapter():
        assert torch.equal(by_row(model), base) and virtual_tokens(model) == 0
    with seam.without_adapters(model):
        assert torch.equal(by_row(model), base)
        assert [a.token_ids for a in answers(model)] == [a.token_ids for a in answers(plain)]
    assert virtual_tokens(model) == 5
    assert (by_row(model) - base).abs().max() > 0.1
    teacher, same = ContextTeacher(model, [60, 61, 62]), ContextTeacher(plain, [60, 61, 62])
    assert torch.equal(teacher.hidden_states_packed(IDS, BOUNDS), same.hidden_states_packed(IDS, BOUNDS))
    with pytest.raises(ValueError, match="virtual tokens"):
        ContextTeacher(model, [1], adapter="active")


def test_shared_prompts_run_unshared():
    model = prefixed()
    ids, bounds = torch.tensor([3, 4, 5, 7, 8, 9]), torch.tensor([0, 3, 5, 6])
    found = shared_prompt_hidden_states(model, ids, bounds, torch.tensor([-1, 0, 0]))
    both = packed_hidden_states(model, torch.tensor([3, 4, 5, 7, 8, 3, 4, 5, 9]), torch.tensor([0, 5, 9]))
    torch.testing.assert_close(found, both[[0, 1, 2, 3, 4, 8]])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("shared", [0, 12])
@pytest.mark.parametrize("ragged", [True, False])
def test_answers_are_drawn_behind_it(name, shared, ragged):
    """By our loop, which its own check lets pass, and by PEFT's generate; against PEFT's forward."""
    model = prefixed(models()[name])
    tails = SEQUENCES if ragged else [[3, 4, 5], [3, 9, 5], [7, 8, 1], [7, 8, 2]]
    prompts = [[*range(50, 50 + shared), *ids] for ids in tails]
    auto, ours, theirs = (answers(model, prompts, engine=e, temperature=0.7) for e in ("auto", "decode", "generate"))
    for prompt, first, answer, other in zip(prompts, auto, ours, theirs, strict=True):
        assert first == answer and answer.token_ids == other.token_ids
        exact = logprobs_by_hand(model, prompt, answer.token_ids, 0.7)
        for found in (answer, other):
            assert list(found.logprobs) == pytest.approx(exact.tolist(), abs=1e-4)


def test_an_engine_that_loses_it_is_an_error(monkeypatch):
    from transformers import DynamicCache

    model = prefixed()
    base = seam.causal_lm(model)
    honest, name = base.generate, seam.takes_cache(base)
    monkeypatch.setattr(base, "generate", lambda **options: honest(**{**options, name: DynamicCache()}))
    with pytest.raises(RuntimeError, match="did not read the trained prefix"):
        answers(model, engine="generate")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_it_begins_as_the_first_tokens_of_the_context(name):
    """Before training, a prefix as long as the context is the context."""
    context = [60, 61, 62, 63, 64, 65, 66]
    base = models()[name]
    wanted = torch.cat([base(torch.tensor([[*context, *ids]])).logits[0, len(context) :] for ids in SEQUENCES])
    model = with_prefix(base, len(context), [[1, 2], context])
    torch.testing.assert_close(by_row(model), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_peft(model), wanted, rtol=1e-4, atol=1e-4)
    part = with_prefix(models()[name], 4, [context])
    wanted = base(torch.tensor([[*context[:4], *SEQUENCES[1]]])).logits[0, 4:]
    torch.testing.assert_close(by_row(part)[3:10], wanted, rtol=1e-4, atol=1e-4)


# --- runs ---------------------------------------------------------------------------------------------------


def make(folder, model=None, **settings):
    settings = {"lora_rank": 0, "num_virtual_tokens": 6, **settings}
    return training_runs.make(tiny_tokenizer(), folder, model, **settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_trains_the_prefix_alone(tmp_path, dtype):
    trainer = make(tmp_path / "run", steps=30, batch_size=6, eval_every=30, learning_rate=1e-1, dtype=dtype,
                   num_virtual_tokens=20)  # fmt: skip
    assert list(trainer.parameters) == ["prompt_encoder.default.embedding.weight"]
    assert trainer.parameters["prompt_encoder.default.embedding.weight"].dtype == torch.float32
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    result = trainer.train()
    assert result.evaluations[-1]["fixed_kl"] < 0.7 * result.evaluations[0]["fixed_kl"]
    assert trainer.rollout._kept.values["engine"] == "decode"
    assert max(record["sampler_kl"] for record in result.history) < (1e-6 if dtype == "float32" else 1e-2)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trainer.parameters), name


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "rollouts_per_prompt": 2}])
def test_resume_is_bit_identical(tmp_path, settings):
    check_resume(partial(make, **settings), tmp_path)


def test_peft_loads_it_and_answers_alike(tmp_path):
    from peft import PeftModel

    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    trainer = make(tmp_path / "run", load_model(tmp_path / "base", dtype="float32"), steps=6, eval_every=0)
    trainer.train()
    settings = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["num_virtual_tokens"]) == ("PREFIX_TUNING", 6)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "run" / "final").eval()
    torch.testing.assert_close(by_peft(loaded), by_row(trainer.model), rtol=1e-4, atol=1e-4)
    # By PEFT's forward, token by token: its `generate` loses the prefix on transformers 5.24.
    whole = list(SEQUENCES[1])
    while len(whole) < len(SEQUENCES[1]) + 6 and whole[-1] != 256:
        whole.append(int(loaded(input_ids=torch.tensor([whole])).logits[0, -1].argmax()))
    stock = whole[len(SEQUENCES[1]) :]
    assert list(answers(trainer.model, [SEQUENCES[1]])[0].token_ids) == stock
    done = export(tmp_path / "run", tmp_path / "out")
    assert done.kind == "adapter" and done.comparison.relative < 1e-5 < done.comparison.adapter
    torch.testing.assert_close(by_row(load_model(tmp_path / "out", dtype="float32")), by_row(loaded))
    with pytest.raises(InputError, match="a trained prefix, which no weight can take in"):
        export(tmp_path / "run", tmp_path / "merged", ExportOptions(merged=True))
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "run" / "final")
    more = make(tmp_path / "more", again, num_virtual_tokens=0, steps=2, learning_rate=None)  # a PEFT model goes on
    assert more.optimizer.param_groups[0]["lr"] == 2e-2
    assert list(more.parameters) == ["prompt_encoder.default.embedding.weight"]
    more.train()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_rank": 4}, "two adapters"),
        ({"teacher_mode": "live"}, "teacher_mode='frozen'"),
        ({"share_prompts": True}, "drop share_prompts"),
        ({"rollout": "vllm"}, "cannot run a trained prefix"),
        ({"merge_for_rollout": True}, "merge_for_rollout"),
        ({"num_virtual_tokens": -1}, "num_virtual_tokens"),
    ],
)
def test_settings_that_do_not_go_with_it(settings, words):
    with pytest.raises(InputError, match=words):
        OPCDConfig(**{"num_virtual_tokens": 6, **settings})


def test_what_cannot_have_one_is_refused_before_anything_is_written(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    folder, given = tmp_path / "run", {"num_virtual_tokens": 0}
    prompts = get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="virtual tokens"):
        packed_hidden_states(prompts, IDS, BOUNDS)
    ContextTeacher(prompts, [1]).hidden_states(torch.tensor([[3, 4]]))  # the base model has none
    for model, settings, words in (
        (None, {"num_virtual_tokens": 100}, r"num_virtual_tokens=100: .* first tokens of the context, which has \d+"),
        (tiny_model(max_position_embeddings=64), {"num_virtual_tokens": 50}, "exceeds the model's window"),
        (prefixed(tiny_model(max_position_embeddings=80), 70), given, "exceeds the model's window"),
        (tiny_model(attention_dropout=0.1), {}, "attention_dropout"),
        (prefixed(), {}, "already carries an adapter; set num_virtual_tokens=0"),
        (prompts, given, "PromptTuningConfig adds virtual tokens"),
        (prefixed(), {**given, "rollout": "vllm"}, "cannot run the model's trained prefix"),
        (prefixed(), {**given, "rollout": "server", "rollout_url": "http://127.0.0.1:9"}, "cannot run the model's"),
    ):
        with pytest.raises(InputError, match=words):
            make(folder, model, **settings)
    assert not folder.exists()
