"""What is exported computes what was trained, whole or not at all, and every exported form answers."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.cli import main
from opcd_fast.errors import InputError
from opcd_fast.export import ExportOptions, export, find_source
from opcd_fast.export import folder as export_module
from opcd_fast.export.fidelity import LogitError, compare, probe, require_equal
from opcd_fast.models import load_model, load_tokenizer
from opcd_fast.rollout import TransformersRollout, stop_token_ids

SETTINGS = {"quantization": "none", "dtype": "float32", "stop_tokens": ["<|user|>"]}
IDS = torch.tensor([[40, 41, 42, 99, 130, 7, 250]])


def save_base(folder, dtype=torch.float32, **changes):
    tiny_model(dtype=dtype, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def make_run(folder, base, *, settings=SETTINGS, strength=0.1, **lora):
    """A run's folder whose adapter does something; `strength`: standard deviation of its B matrices."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    torch.manual_seed(1)
    model = get_peft_model(load_model(base, dtype="float32"), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=strength)
        if "magnitude" in name:
            parameter.data *= 1 + strength * torch.randn_like(parameter)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder / "final", save_embedding_layers=False)
    tiny_tokenizer().save_pretrained(folder / "final")
    (folder / "checkpoints").mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), base)


def refused(call, *words):
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def merged_by_hand(run, base, layer):
    """W + alpha / r · B A in float64, from the files."""
    adapter = load_file(run / "final" / "adapter_model.safetensors")
    settings = json.loads((run / "final" / "adapter_config.json").read_text())
    up, down = (adapter[f"base_model.model.{layer}.lora_{x}.weight"].double() for x in "BA")
    weight = load_file(f"{base}/model.safetensors")[f"{layer}.weight"].double()
    return weight + settings["lora_alpha"] / settings["r"] * up @ down


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_a_merged_model_is_the_sum_rounded_once(run, base, tmp_path, dtype):
    asked = ExportOptions(merged=True, dtype=dtype)
    if dtype == "auto":  # the type of the base
        base, dtype = save_base(tmp_path / "base", torch.bfloat16), "bfloat16"
        run = make_run(tmp_path / "run", base)
    done = export(run, tmp_path / "out", asked)
    kind = getattr(torch, dtype)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        exact = merged_by_hand(run, base, layer)
        found = written[f"{layer}.weight"]
        assert found.dtype == kind
        if dtype == "float32":
            torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-7)
        else:  # a sum in float32 may fall on the other side of a tie, which is rare; two roundings do so often
            assert (found != exact.to(kind)).float().mean() < 2e-3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert (done.kind, done.dtype, done.shards) == ("merged", dtype, 1)


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        ({}, {}),
        ({"use_dora": True}, {}),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 5}}, {}),
        ({"target_modules": ["q_proj", "embed_tokens"]}, {}),
        ({"modules_to_save": ["lm_head"]}, {}),
        ({}, {"tie_word_embeddings": True}),
    ],
)
def test_both_forms_compute_what_was_trained(tmp_path, lora, changes):
    from peft import PeftModel

    base = save_base(tmp_path / "base", **changes)
    run = make_run(tmp_path / "run", base, **lora)
    trained = logits(PeftModel.from_pretrained(load_model(base, dtype="float32"), run / "final").eval())
    assert (trained - logits(load_model(base, dtype="float32"))).abs().max() > 0.05
    for merged in (False, True):
        out = tmp_path / f"out-{merged}"
        done = export(run, out, ExportOptions(merged=merged))
        torch.testing.assert_close(logits(load_model(out, dtype="float32")), trained, rtol=1e-4, atol=1e-4)
        assert (out / "adapter_config.json").is_file() != merged
        assert done.comparison.relative < 1e-5 < done.comparison.adapter


def test_the_exported_folder_says_how_to_talk_to_it(run, base, tmp_path):
    for merged in (False, True):
        out = tmp_path / f"out-{merged}"
        export(run, out, ExportOptions(merged=merged))
        tokenizer = load_tokenizer(out)
        assert tokenizer.chat_template == tiny_tokenizer().chat_template
        ids = tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>"])  # the tokenizer's, and the run's stop_tokens
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == ids
        assert stop_token_ids(tokenizer, load_model(out)) == tuple(ids)
        assert not (out / "README.md").exists()  # no form to fill in where there is no card
    settings = json.loads((tmp_path / "out-False" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base
    for file in (tmp_path / "out-True").iterdir():
        assert base.encode() not in file.read_bytes(), file  # a merged model tells nothing of this machine


def test_an_adapter_names_its_base_from_everywhere(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = save_base(tmp_path / "near")
    near = make_run(tmp_path / "run", "near")
    export(near, "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base
    export(near, "named", ExportOptions(base_name="somebody/base"))
    settings = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "somebody/base"
    (tmp_path / "near").rename(tmp_path / "moved")
    refused(lambda: export(near, "out2"), "near")
    assert export(near, "out2", ExportOptions(model="moved")).kind == "adapter"


def test_a_fully_trained_run_and_a_bare_folder(base, run, tmp_path):
    full = tmp_path / "full"
    tiny_model(seed=3).save_pretrained(full / "final")
    tiny_tokenizer().save_pretrained(full / "final")
    (full / "config.json").write_text(json.dumps(SETTINGS))
    done = export(full, tmp_path / "out", ExportOptions(dtype="bfloat16"))
    assert (done.kind, done.comparison.adapter) == ("model", None)
    written, first = load_file(tmp_path / "out" / "model.safetensors"), load_file(full / "final" / "model.safetensors")
    assert all(torch.equal(written[name], first[name].bfloat16()) for name in first)
    export(run, tmp_path / "rounded", ExportOptions(dtype="bfloat16"))
    written = load_file(tmp_path / "rounded" / "adapter_model.safetensors")
    first = load_file(run / "final" / "adapter_model.safetensors")
    assert all(torch.equal(written[name], first[name].bfloat16()) for name in first)
    refused(lambda: export(full, tmp_path / "x", ExportOptions(merged=True)), "whole model", "--merged")
    refused(lambda: export(full, tmp_path / "x", ExportOptions(model=base)), "drop it")
    refused(lambda: export(full, tmp_path / "x", ExportOptions(base_name="a/b")), "base_name", "drop it")
    assert find_source(run / "final").settings == find_source(run).settings == SETTINGS
    again = export(tmp_path / "out", tmp_path / "again")
    assert (again.kind, again.dtype) == ("model", "bfloat16")


def test_the_current_folder_and_a_mounted_one_are_refused_before_anything_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: export(run, type(tmp_path)(".")), "output_dir", "inside of it")
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "mounted")
    refused(lambda: export(run, tmp_path / "mounted"), "output_dir", "inside of it")


def test_nothing_is_overwritten_and_nothing_bad_is_left(run, base, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    refused(lambda: export(run, tmp_path / "there"), "exists already")
    refused(lambda: export(run, tmp_path / "there" / "file"), "output_dir", "is a file")
    out = tmp_path / "out"
    refused(lambda: export(tmp_path / "nothing", out), "does not exist")
    refused(lambda: export(tmp_path / "there", out), "no adapter and no model")
    (tmp_path / "early" / "checkpoints").mkdir(parents=True)
    refused(lambda: export(tmp_path / "early", out), "--resume")
    for options, *words in (
        ({"dtype": "int8"}, "dtype='int8'", "bfloat16"),
        ({"max_shard_size": "lots"}, "max_shard_size", "5GB"),
        ({"max_shard_size": "0GB"}, "max_shard_size"),
        ({"dequantize": True}, "--merged"),
        ({"dequantize": True, "merged": True}, "not in 4 bits"),
        ({"base_name": "a/b", "merged": True}, "drop it"),
    ):
        refused(lambda options=options: export(run, out, ExportOptions(**options)), *words)
    tiny_model(hidden_size=48).save_pretrained(tmp_path / "there" / "other")
    wrong = ExportOptions(model=str(tmp_path / "there" / "other"))
    refused(lambda: export(run, out, wrong), "cannot be loaded", "size mismatch for")
    (tmp_path / "free").mkdir()
    done = export(run, tmp_path / "free", ExportOptions(merged=True, max_shard_size="40KB"))
    assert done.bytes == sum(file.stat().st_size for file in (tmp_path / "free").iterdir())
    index = json.loads((tmp_path / "free" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == done.shards > 1

    def spoilt(model, folder, source, options, dtype):
        write(model, folder, source, options, dtype)
        file = folder / "model.safetensors"
        weights = load_file(file)
        weights["model.layers.1.mlp.up_proj.weight"][5] += 0.2
        from safetensors.torch import save_file

        save_file(weights, file, metadata={"format": "pt"})

    write = export_module._write_model
    monkeypatch.setattr(export_module, "_write_model", spoilt)
    refused(lambda: export(run, out, ExportOptions(merged=True)), "does not compute what was trained")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["early", "free", "there"]  # no scratch folder either


def test_rounding_that_takes_what_was_learned_is_refused(base, tmp_path):
    faint = make_run(tmp_path / "run", base, strength=2e-4)
    for dtype in ("bfloat16", "auto"):
        options = ExportOptions(merged=True, dtype=dtype)
        if dtype == "auto":  # float32, as the base
            assert export(faint, tmp_path / "out", options).comparison.adapter < 0.01
        else:
            refused(lambda options=options: export(faint, tmp_path / "out", options), "takes most of", "float32")


def test_the_comparison_is_what_it_says(run, base):
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base, dtype="float32"), run / "final").eval()
    asked = probe(model)
    assert torch.equal(asked.trained, logits(model, asked.ids))
    assert torch.equal(asked.base, logits(load_model(base, dtype="float32"), asked.ids))
    found = compare(asked.base, asked)
    assert found.adapter is not None and found.relative == found.adapter > 0.01
    p, q = asked.trained.double().softmax(-1), asked.base.double().softmax(-1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-9)
    assert found.largest == float((asked.base - asked.trained).abs().max())
    shifted = compare(asked.trained + 3.0, asked)  # the same distribution
    assert shifted.relative < 1e-6 and shifted.kl < 1e-9
    fine = LogitError(1e-5, 1e-5, 0.0, 0.1)
    require_equal(fine, torch.float32, "x")
    for bad in (2e-4, float("nan"), float("inf")):
        worse = dataclasses.replace(fine, relative=bad)
        refused(lambda worse=worse: require_equal(worse, torch.float32, "x"), "x does not")


def test_a_prefix_cannot_be_merged_and_says_so(base, tmp_path):
    from peft import PrefixTuningConfig, get_peft_model

    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(load_model(base, dtype="float32"), settings)
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "run" / "final")
    run, out = tmp_path / "run", tmp_path / "out"
    refused(lambda: export(run, out, ExportOptions(merged=True)), "trained prefix", "--merged")
    done = export(run, out)
    assert done.kind == "adapter" and done.comparison.adapter > 0.01 > done.comparison.relative


@pytest.mark.parametrize("stored", [False, True])
def test_merging_into_the_unpacked_4_bits(tmp_path, stored):
    """The sum is with the weights that the adapter was trained on. stored: the base lies there in 4 bits."""
    bnb = pytest.importorskip("bitsandbytes")
    from opcd_fast.models import quantize_4bit

    base = save_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    packed = quantize_4bit(load_model(base, dtype="float32"), torch.device("cpu"), torch.float32, "test")
    layer = packed.model.layers[0].self_attn.q_proj
    kept = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    run = make_run(tmp_path / "run", base, settings={**SETTINGS, "quantization": "none" if stored else "4bit"})
    if stored:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        small = AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype=torch.float32)
        layer = small.model.layers[0].self_attn.q_proj
        kept = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
        small.save_pretrained(tmp_path / "small")
    options = ExportOptions(
        merged=True, dequantize=True, dtype="float32", model=str(tmp_path / "small") if stored else None
    )
    refused(lambda: export(run, tmp_path / "x", dataclasses.replace(options, dequantize=False)), "--dequantize")
    export(run, tmp_path / "out", options)
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].double()
    whole = load_file(f"{base}/model.safetensors")["model.layers.0.self_attn.q_proj.weight"].double()
    exact = merged_by_hand(run, base, "model.layers.0.self_attn.q_proj") - whole + kept
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    assert (kept - whole).abs().max() > 1e-3
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


# --- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_the_commands_export_and_answer(run, tmp_path, capsys, form):
    """The answers are those of the trained model; from a file, prompt by prompt."""
    out = str(tmp_path / "out")
    arguments = ["export", str(run), "--output-dir", out]
    assert main([*arguments, *(["--merged"] if form == "merged" else [])]) == 0
    told = capsys.readouterr().out
    for words in ("check: relative error", "the adapter changed the logits by", f"{form}:", "opcd report"):
        assert words in told
    wrong = (arguments, arguments[:2], [*arguments[:3], "x", "--private"], [*arguments[:3], "x", "--without-card"])
    for again, word in zip(wrong, ("exists already", "output_dir", "push-to-hub", "push-to-hub")):
        assert main(again) == 2
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1
    rows = ["Hello?", "Where is it, and why?", "x"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": row, "privileged_context": "Be brief."}) + "\n" for row in rows))
    (tmp_path / "context.txt").write_text("Be loud.")
    tokenizer, trained = tiny_tokenizer(), load_model(run / "final", dtype="float32")
    stop = [tokenizer.convert_tokens_to_ids(t) for t in ("<|end|>", "<|user|>")]
    sampler = TransformersRollout(trained, stop_token_ids=stop, merge_adapter=False)

    def expected(row, context=None):
        messages = [{"role": "user", "content": row}]
        if context is not None:
            messages.insert(0, {"role": "system", "content": context})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        (answer,) = sampler.generate([ids], max_new_tokens=6, temperature=0)
        return tokenizer.decode(answer.token_ids, skip_special_tokens=True), answer.finished

    common = ["generate", "--model", out, "--max-new-tokens", "6", "--dtype", "float32"]
    assert main([*common, "--prompts", str(file), "--batch-size", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == rows
    assert [(line["answer"], line["finished"]) for line in lines] == [expected(row) for row in rows]
    assert main([*common, "--prompts", str(file), "--context", str(tmp_path / "context.txt")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["answer"] for line in lines] == [expected(row, "Be brief.")[0] for row in rows]
    assert main([*common, "--prompt", rows[1], "--context", str(tmp_path / "context.txt")]) == 0
    assert capsys.readouterr().out == expected(rows[1], "Be loud.")[0] + "\n"
    for wrong in ([], ["--prompt", "x", "--prompts", str(file)], ["--prompts", str(file), "--batch-size", "0"]):
        assert main([*common, *wrong]) == 2
