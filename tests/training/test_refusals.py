"""What cannot be trained, or not be measured, is one error before anything is written."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import lora_model, tiny_model, tiny_tokenizer
from training_runs import make

from opcd_fast.errors import InputError


def blind():
    """Tokens differ but the model cannot see them: with all attention outputs zero, only the last token counts."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    return model


def with_nan():
    model = tiny_model()
    model.model.norm.weight.data.fill_(float("nan"))
    return model


def with_bias():
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["up_proj"], bias="lora_only", task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(mlp_bias=True), lora)


def injected():
    """What transformers' add_adapter does; that of 5.24 asks for a PEFT which is not out yet."""
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tiny_model())


def other_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["hello"])
    return tokenizer


@dataclass
class Wrong:
    words: str
    settings: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)  # what a function makes


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong("different tokenizers", made={"teacher_tokenizer": other_tokenizer}),
        Wrong("give teacher_tokenizer=", made={"teacher_model": lambda: tiny_model(seed=7, vocab_size=272)}),
        Wrong("head only 200", made={"model": lambda: tiny_model(vocab_size=200, eos_token_id=1, pad_token_id=1)}),
        Wrong("lora_targets", {"lora_targets": "no_such_layer"}),
        Wrong("lm_head", {"lora_targets": "lm_head"}),
        Wrong("stop_tokens", {"stop_tokens": ("nope",)}),
        Wrong("prompts is empty", {"prompts": []}),
        Wrong(r"exceed the teacher's window of 512 by \d+", {"context": "x" * 600}),
        Wrong(r"exceeds the model's window of 512 by \d+", {"max_new_tokens": 505}),
        Wrong("workspace_bytes", {"workspace_bytes": 1}),
        Wrong("prefix_device", {"prefix_device": "nowhere"}),
        Wrong("task_episodes", {"task_episodes": 3}),
        Wrong("share_prompts=True: .*attention_dropout=0.1", {"share_prompts": True, "rollouts_per_prompt": 2},
              made={"model": lambda: tiny_model(attention_dropout=0.1)}),
        Wrong("float16", {"dtype": "auto"}, made={"model": lambda: tiny_model(dtype=torch.float16)}),
        Wrong("add_adapter", made={"model": injected}),
        Wrong("already carries an adapter", made={"model": lora_model}),
        Wrong(r"trains '.*up_proj.base_layer.bias', which its teacher shares", {"lora_rank": 0},
              made={"model": with_bias}),
        Wrong("not finite", made={"model": with_nan}),
        *(Wrong("context changes nothing", {"dtype": dtype, "lora_rank": rank}, made={"model": blind})
          for dtype in ("float32", "bfloat16") for rank in (4, 0)),
        # what cannot be measured
        Wrong("give eval_prompts", {"save_best": True, "eval_prompts": None}),
        Wrong("give eval_prompts", {"early_stop_patience": 2, "eval_prompts": None}),
        Wrong("needs a scorer", {"save_best": True, "best_by": "score"}),
        Wrong("scorer needs held-out", {"scorer": lambda *_: 1, "eval_prompts": None}),
        Wrong("give a function", {"scorer": 5}),
    ],
    ids=lambda wrong: wrong.words,
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(tokenizer, tmp_path, wrong):
    with pytest.raises(InputError, match=wrong.words):
        settings = {**wrong.settings, **{name: function() for name, function in wrong.made.items()}}
        make(tokenizer, tmp_path / "run", **settings).train()
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_the_student_is_refused(tokenizer, tmp_path):
    model = tiny_model()
    with pytest.raises(InputError, match="teacher_model is the model"):
        make(tokenizer, tmp_path / "run", model, teacher_model=model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(({"trackers": (name,)}, f"'{name}' is not installed: pip install {name}")
          for name in ("tensorboard", "wandb", "trackio")),
        *(({"optimizer": name}, f"optimizer='{name}' needs .*pip install .*\\[quant\\]'")
          for name in ("adamw_8bit", "paged_adamw_8bit")),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_before_anything_is_written(tokenizer, tmp_path, monkeypatch, settings, words):
    inner = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: inner(name, *a) if name == "peft" else None)
    with pytest.raises(InputError, match=words):
        make(tokenizer, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
