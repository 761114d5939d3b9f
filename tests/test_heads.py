"""LMHead: logits equal the model's own, and what it refuses."""

import pytest
import torch

from opcd_fast.heads import LMHead

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Cohere": {"logit_scale": 0.125},
    "Granite": {"logits_scaling": 8.0},
    "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "Phi": {},
}


def tiny(family, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **FAMILIES.get(family, {}), **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_models(family):
    model = tiny(family)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    ids = torch.randint(1, 96, (2, 7))
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        head = LMHead.from_model(model)
        torch.testing.assert_close(head.logits(hidden), model(ids).logits, rtol=1e-5, atol=1e-5)
    assert head.weight is model.get_output_embeddings().weight


def test_transforms_are_read():
    assert LMHead.from_model(tiny("Cohere")).scale == 0.125
    assert LMHead.from_model(tiny("Granite")).scale == 1 / 8
    assert LMHead.from_model(tiny("Gemma2")).softcap == 2.0
    assert LMHead.from_model(tiny("Phi")).bias is not None
    assert LMHead.from_model(tiny("Llama"), vocab_size=90).valid_size == 90


def test_peft_wrapped_models_are_unwrapped_and_adapters_on_the_head_refused():
    peft = pytest.importorskip("peft")
    model = tiny("Llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert LMHead.from_model(wrapped).weight is model.lm_head.weight
    for on_head in (
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        wrapped = peft.get_peft_model(tiny("Llama"), peft.LoraConfig(r=2, **on_head))
        with pytest.raises(ValueError, match=r"lm_head.*merge_and_unload"):
            LMHead.from_model(wrapped)


def test_models_without_a_head_are_refused():
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        LMHead.from_model(tiny("Llama").model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weight": torch.zeros(3)}, ["weight", "(3,)", "(V, D)"]),
        ({"weight": torch.zeros(3, 2, dtype=torch.int8)}, ["weight", "int8"]),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, ["bias", "(2,)", "(3,)"]),
        ({"weight": torch.zeros(3, 2), "softcap": 0.0}, ["softcap", "positive"]),
        ({"weight": torch.zeros(3, 2), "scale": float("nan")}, ["scale", "finite"]),
        ({"weight": torch.zeros(3, 2), "vocab_size": 4}, ["vocab_size", "4", "1..3"]),
        ({"weight": torch.zeros(3, 2), "group": object()}, ["group", "group=None"]),
    ],
)
def test_bad_heads_say_what_and_what_instead(arguments, words):
    with pytest.raises(ValueError) as error:
        LMHead(**arguments)
    assert all(word in str(error.value) for word in words), error.value
