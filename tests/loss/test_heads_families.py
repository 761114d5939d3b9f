"""LMHead.from_model on every causal language model of the installed transformers, built tiny and random.

Either the head's logits are the model's own, or from_model refuses and says why. Nothing in between.
"""

import inspect

import pytest
import torch

from opcd_fast.loss import LMHead

pytest.importorskip("transformers")
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Passed to a configuration, or to a part of one, where it has a field of the name.
SIZES = {
    "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True, "use_cache": False,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "embedding_size": 32, "emb_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "n_inner": 48,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "depth": 2, "num_blocks": 2, "num_global_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "head_dim": 8, "global_head_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "sliding_window": 16, "image_size": 16, "patch_size": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "mamba_n_heads": 4, "mamba_d_head": 16,
    "rotary_dim": 4,
}  # fmt: skip
# What changes logits, at values that show: at its default of 1 or None a field would test nothing.
TRANSFORMS = {
    "logit_scale": 0.3, "logits_scaling": 1.7, "lm_head_multiplier": 0.6, "output_multiplier": 0.4,
    "final_logit_softcapping": 1.5, "logits_soft_cap": 1.5, "output_logit_soft_cap": 1.5,
    "logits_mup_width_multiplier": 2.5, "unpadded_vocab_size": 90,
}  # fmt: skip
OMIT = object()
FAMILIES = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 5, "num_kv_shared_layers": 0, "intermediate_size": [48] * 5,
        "activation_sparsity_pattern": [0.0] * 5, "laurel_rank": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 24},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attn_layers": ["local", "local"],
                 "feed_forward_size": 48, "local_attn_chunk_length": 8},
    "roc_bert": {"enable_shape": False, "enable_pronunciation": False},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# Between the hidden states and the head stands a layer with weights of its own.
REFUSED = {
    "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "modernbert-decoder",
    "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
}  # fmt: skip
UNBUILT = {
    "blt": "sizes inside its byte encoder follow from no configuration field",
    "dbrx": "its attention reads a field that its configuration lacks",
    "dots3_note": "its default configuration names 42 layers one by one; dots3_note_text is its decoder",
    "gemma3n": "needs timm for its vision tower; gemma3n_text is its decoder",
    "gemma4_assistant": "drafts tokens from another model's hidden states",
    "gemma4_unified_assistant": "drafts tokens from another model's hidden states",
    "musicgen": "predicts audio codes with several heads",
    "musicgen_melody": "predicts audio codes with several heads",
}
EVERY = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in UNBUILT]
# One family of each kind: what from_model must find, 1, None and no bias where nothing is said.
KINDS = {
    "llama": {},
    "phi": {"bias": True},
    "cohere": {"scale": 0.3},
    "granite": {"scale": 1 / 1.7},
    "hyperclovax": {"scale": 1.7},
    "falcon_h1": {"scale": 0.6},
    "minicpm3": {"scale": 8.0},  # hidden_size / dim_model_base, on the hidden states
    "mpt": {},  # has a logit_scale that no code reads
    "gemma2": {"softcap": 1.5},
    "gemma3": {},  # around the decoder of gemma3_text, whose cap it leaves out
    "recurrent_gemma": {"softcap": 1.5},
    "xlstm": {"softcap": 1.5},
    "inkling_text": {"scale": 0.4, "vocab_size": 90},
    "inkling2_text": {"softcap": 1.5, "vocab_size": 90},
    "llama4_text": {},  # base_model is the model itself
    "bart": {},  # the body that the forward calls lies inside base_model
    "mamba": {},  # casts logits
    "xlm": {"bias": True},  # a head inside a prediction layer
}


def tiny_options(config_class):
    default = config_class()
    names = set(default.to_dict()) | set(inspect.signature(config_class).parameters)
    names |= set(getattr(config_class, "attribute_map", {}))
    options = {name: value for name, value in {**SIZES, **TRANSFORMS}.items() if name in names}
    if "kv_lora_rank" in options:
        options["num_key_value_heads"] = 4  # latent attention has a key for every query head
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None and not isinstance(part, dict):
            options[name] = tiny_options(type(part))
    options.update(FAMILIES.get(config_class.model_type, {}))
    return {name: value for name, value in options.items() if value is not OMIT}


def build(model_type):
    """A tiny model of a family, with a head whose logits are large enough for a cap to bend them."""
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**tiny_options(config_class))
    with torch.device("meta"):
        sketch = AutoModelForCausalLM.from_config(config)
    size = sum(parameter.numel() for parameter in sketch.parameters())
    assert size < 2e7, f"{model_type} is not tiny: {size} parameters"
    model = AutoModelForCausalLM.from_config(config).eval()
    layer = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_()  # some architectures leave torch.empty to a checkpoint
        for parameter in layer.parameters() if layer is not None else ():
            parameter.normal_()
    return model


@torch.no_grad()
def compare(model):
    """(our logits, the model's) on random tokens."""
    ids = torch.randint(3, 90, (2, 7))
    body = model.base_model if model.base_model is not model else model.model
    head = LMHead.from_model(model)
    theirs = model(input_ids=ids).logits
    assert theirs.isfinite().all() and theirs.std() > 0.1, "nothing to compare"
    return head.logits(body(input_ids=ids).last_hidden_state), theirs


def check(model_type):
    model = build(model_type)
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=r"between its hidden states and its head"):
            LMHead.from_model(model)
        return None
    ours, theirs = compare(model)
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
    return LMHead.from_model(model)


@pytest.mark.parametrize("model_type", KINDS)
def test_logits_equal_the_models(model_type):
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("not in this version of transformers")
    head, expected = check(model_type), KINDS[model_type]
    assert head.scale == pytest.approx(expected.get("scale", 1.0), rel=1e-6)
    assert head.softcap == (pytest.approx(expected["softcap"], rel=1e-6) if "softcap" in expected else None)
    # Whether the padding lies in the head's rows or only in the embedding is the version's affair (Inkling-2).
    assert head.valid_size == expected.get("vocab_size", head.weight.shape[0])
    assert (head.bias is not None) == expected.get("bias", False)


def test_transforms_before_the_head_are_refused():
    check("modernbert-decoder")
    check("prophetnet")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", EVERY)
def test_every_family(model_type):
    check(model_type)
