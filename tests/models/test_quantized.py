"""Weights in 4 bits: as teachers, as bases under an adapter, and what cannot be done with them."""

import importlib.util
from functools import partial

import pytest
import torch
from resumption import cut_and_resumed
from tiny import tiny_model, tiny_tokenizer
from training_runs import losses, make

from opcd_fast.errors import InputError
from opcd_fast.loss import LMHead
from opcd_fast.models import MergedCopy, is_quantized, load_model, quantize_4bit, quantized, refuse_unsupported
from opcd_fast.teacher import ContextTeacher

CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'opcd-fast[quant]'"
)
# Levels of NF4 as its paper prints them (arXiv 2305.14314, appendix E), to four digits.
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407,
       0.5626, 0.7230, 1.0]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def packed_model(dtype=torch.float32, **changes):
    return quantize_4bit(tiny_model(**changes), CPU, dtype, "quantization='4bit'")


def rounded(weight):
    """Nearest level times the largest magnitude of each block of 64; the second rounding of scales left out."""
    blocks = weight.double().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4, dtype=torch.float64)
    return (levels[((blocks / scale)[..., None] - levels).abs().argmin(-1)] * scale).reshape(weight.shape)


def saved_packed(folder, **changes):
    """As transformers saves and loads a packed model."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model(**changes).save_pretrained(folder / "whole")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "whole", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    return model.eval()


def test_without_bitsandbytes_the_package_is_named(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"quantization='4bit' needs .* pip install .*\[quant\]'"):
        make(tokenizer, tmp_path / "run", quantization="4bit")
    with pytest.raises(InputError, match=r"teacher_quantization='4bit' needs .* pip install"):
        make(tokenizer, tmp_path / "run", teacher_quantization="4bit", teacher_model=tiny_model(seed=3))
    assert not (tmp_path / "run").exists()


def test_contradictions_are_refused(tokenizer, tmp_path):
    for settings, words in (
        ({"teacher_quantization": "4bit"}, "set quantization='4bit', which packs it for both"),
        ({"teacher_quantization": "4bit", "lora_rank": 0, "teacher_mode": "ema"}, "packed weights cannot follow"),
        ({"quantization": "4bit", "lora_rank": 0}, "full fine-tuning cannot move weights of 4 bits"),
    ):
        with pytest.raises(InputError, match=words):
            make(tokenizer, tmp_path / "run", **settings)
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(InputError, match="not by bitsandbytes to 4 bits"):
        refuse_unsupported(model)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_nf4(dtype):
    model = packed_model(dtype, hidden_size=64, intermediate_size=128)
    plain = tiny_model(hidden_size=64, intermediate_size=128)
    layers = [model.model.layers[0].self_attn.k_proj, model.model.layers[1].mlp.down_proj]
    whole = [plain.model.layers[0].self_attn.k_proj, plain.model.layers[1].mlp.down_proj]
    for layer, before in zip(layers, whole):
        found = layer(torch.eye(layer.in_features, dtype=dtype)).T.double()
        wanted = rounded(before.weight.detach().to(dtype))
        assert (found - wanted).norm() / wanted.norm() < 0.02  # scales in 8 bits, and levels of four digits
        assert (found - before.weight).norm() > 0.05 * wanted.norm(), "nothing was rounded"
        assert layer.weight.numel() * 2 == before.weight.numel() and layer.weight.dtype == torch.uint8
    assert is_quantized(model) and not is_quantized(plain)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight.to(dtype))
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


@needs_bitsandbytes
@pytest.mark.parametrize("given", ["object", "setting", "folder"])
def test_a_packed_teacher_is_followed(tokenizer, tmp_path, given):
    """Another width, another depth and a padded vocabulary; packed by transformers, by the setting, or on disk."""
    shape = {"seed": 7, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 272}
    settings = {"teacher_tokenizer": tiny_tokenizer(), "lora_rank": 0, "learning_rate": 3e-3, "steps": 8}
    if given == "setting":
        teacher, settings["teacher_quantization"] = tiny_model(**shape), "4bit"
    else:
        teacher = saved_packed(tmp_path, **shape)
    if given == "folder":
        teacher.save_pretrained(tmp_path / "packed")
        teacher = load_model(str(tmp_path / "packed"), dtype="float32", device="cpu")
    trainer = make(tokenizer, tmp_path / "run", teacher_model=teacher, eval_every=8, **settings)
    assert is_quantized(trainer.teacher.model)
    result = trainer.train()
    assert result.evaluations[-1]["fixed_kl"] < result.evaluations[0]["fixed_kl"]
    assert not any(p.requires_grad for p in trainer.teacher.model.parameters())


@needs_bitsandbytes
def test_a_packed_copy_teaches_a_student_in_full(tokenizer, tmp_path):
    settings = {"lora_rank": 0, "learning_rate": 3e-3, "steps": 3}
    trainer = make(tokenizer, tmp_path / "run", teacher_quantization="4bit", **settings)
    assert is_quantized(trainer.teacher.model) and not is_quantized(trainer.model)
    packed = losses(trainer.train())
    whole = losses(make(tokenizer, tmp_path / "whole", **settings).train())
    assert packed[0] != whole[0] and packed[0] == pytest.approx(whole[0], rel=0.5)


@needs_bitsandbytes
@pytest.mark.parametrize("given", ["setting", "object"])
@pytest.mark.parametrize("mode", ["frozen", "live", "ema"])
def test_an_adapter_on_a_packed_base(tokenizer, tmp_path, given, mode):
    """Losses of the run are those of the same run on the unpacked weights that the packed ones stand for."""
    settings = {"steps": 4, "eval_prompts": None, "teacher_mode": mode}

    def run(name, model, **more):
        trainer = make(tokenizer, tmp_path / name, model, **settings, **more)
        return trainer, losses(trainer.train())

    packed = packed_model()
    plain = tiny_model()
    for name, layer in plain.model.named_modules():
        if type(layer) is torch.nn.Linear:
            eye = torch.eye(layer.in_features)
            layer.weight.data.copy_(packed.model.get_submodule(name)(eye).T)
    if given == "setting":
        trainer, found = run("packed", tiny_model(), quantization="4bit")
    else:
        trainer, found = run("packed", packed)
    assert is_quantized(trainer.model) and not trainer.rollout.copies
    assert all("lora_" in name for name in trainer.parameters)
    _, wanted = run("plain", plain, merge_for_rollout=False)
    assert found == pytest.approx(wanted, rel=1e-3)
    assert found[1] != found[0]


@needs_bitsandbytes
def test_a_packed_run_goes_on_bit_for_bit(tokenizer, tmp_path):
    settings = {"steps": 6, "quantization": "4bit", "teacher_mode": "ema", "teacher_ema_decay": 0.5}
    whole = make(tokenizer, tmp_path / "whole", **settings).train()
    resumed = cut_and_resumed(partial(make, tokenizer, **settings), tmp_path / "cut", ("step", 5))
    assert losses(resumed) == losses(whole)


@needs_bitsandbytes
def test_an_adapter_on_packed_weights_is_not_folded_in():
    """A packed layer passes for an nn.Linear; its bytes are no matrix."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(packed_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj.base_layer, torch.nn.Linear)
    assert not MergedCopy.supports(model)


@needs_bitsandbytes
def test_a_packed_head_is_refused(tokenizer, tmp_path):
    import bitsandbytes as bnb

    model = packed_model()
    head = bnb.nn.Linear4bit(32, 261, bias=False)
    head.weight = bnb.nn.Params4bit(model.lm_head.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
    model.lm_head = head
    with pytest.raises(ValueError, match="load the model with its head unquantised"):
        LMHead.from_model(model)
    with pytest.raises(InputError, match="load the model with its head unquantised"):
        make(tokenizer, tmp_path / "run", teacher_model=model)


@needs_bitsandbytes
def test_what_cannot_be_packed_is_refused(tokenizer, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(InputError, match="quantised already"):
        quantize_4bit(packed_model(), CPU, torch.float32, "quantization='4bit'")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=261))
    with pytest.raises(InputError, match=r"no torch\.nn\.Linear layers"):
        quantize_4bit(gpt2, CPU, torch.float32, "quantization='4bit'")
    make(tokenizer, tmp_path / "first", steps=1).train()
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "first" / "final")
    with pytest.raises(InputError, match="load its base quantised"):
        make(tokenizer, tmp_path / "run", model, lora_rank=0, quantization="4bit")


@needs_bitsandbytes
@pytest.mark.parametrize("given", ["student", "teacher", "teacher object", "folder", "bare"])
def test_weights_keep_their_layout_when_they_are_read_without_gradients(tokenizer, tmp_path, monkeypatch, given):
    """On some CPUs bitsandbytes would rearrange them, for a kernel that rounds otherwise, has no backward pass and
    takes no layer this small; on others only the switch shows."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    if given == "student":
        model = make(tokenizer, tmp_path / "run", quantization="4bit").model
    elif given == "teacher":
        settings = {"teacher_quantization": "4bit", "teacher_model": tiny_model(seed=3)}
        model = make(tokenizer, tmp_path / "run", **settings).teacher.model
    elif given == "teacher object":
        model = make(tokenizer, tmp_path / "run", teacher_model=saved_packed(tmp_path)).teacher.model
    elif given == "folder":
        saved_packed(tmp_path).save_pretrained(tmp_path / "packed")
        model = load_model(str(tmp_path / "packed"), dtype="float32", device="cpu")
    else:
        model = ContextTeacher(saved_packed(tmp_path), [1, 2, 3]).model
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    with torch.no_grad():
        found = model.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert torch.isfinite(found).all()
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)


@needs_bitsandbytes
@pytest.mark.parametrize(("hidden", "between"), [(32, 40), (24, 50), (64, 128)])
def test_any_width_is_packed(hidden, between):
    """Against the layers' own weights, unpacked; in float32 a product of k terms may be off by k roundings."""
    model = packed_model(hidden_size=hidden, intermediate_size=between)
    import bitsandbytes as bnb

    for layer in (m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)):
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            off = (layer(x).double() - x.double() @ weight.T).abs()
        assert (off <= layer.in_features * 2**-24 * (x.double().abs() @ weight.T.abs())).all()
