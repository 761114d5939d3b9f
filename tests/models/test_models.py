"""Loading by name: devices, adapters, and files that are damaged, incomplete or of a kind that is not supported."""

import json
import shutil

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.errors import InputError
from opcd_fast.models import load_model, load_tokenizer, pick_device, pick_dtype, refuse_unsupported
from opcd_fast.models import loading as models


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with `base` (tied embeddings, as most small models have) and `adapter`."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("models")
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(root / "base")
    adapted.save_pretrained(root / "adapter", save_embedding_layers=False)
    return root


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage; its adapter sits on its own base."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path


def edit(file, **changes):
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def refused(call, *words):
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_only_the_cpu_and_gpus_that_exist_are_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    for device in ("mps", "meta", "cuda:", "cuda:-1", "cuda:x", "gpu", "", 0, None):
        refused(lambda device=device: pick_device(device), "device=")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(lambda: pick_device("cuda"), "no GPU")


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda") == torch.device("cuda") and not current
    assert pick_device("cuda:1") == torch.device("cuda", 1) and current == [torch.device("cuda", 1)]
    refused(lambda: pick_device("cuda:2"), "2 GPUs", "cuda:1")


@pytest.mark.parametrize(("value", "wanted"), [("1", torch.bfloat16), ("0", torch.float32)])
def test_auto_follows_the_environment_on_a_cpu(folder, monkeypatch, value, wanted):
    monkeypatch.setenv("OPCD_CPU_BF16", value)
    tiny_model().save_pretrained(folder)
    assert load_model(folder, device="cpu").dtype == wanted
    assert load_model(folder, dtype="float32", device="cpu").dtype == torch.float32, "what is named is not decided"
    monkeypatch.setenv("OPCD_CPU_BF16", "yes")
    with pytest.raises(InputError, match="OPCD_CPU_BF16='yes'"):
        pick_dtype("auto", torch.device("cpu"))


def test_a_model_and_an_adapter_load(folder):
    model = load_model(folder / "base", dtype="float32", device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.training
    adapted = load_model(str(folder / "adapter"), dtype="float32", device="cpu")
    assert hasattr(adapted, "disable_adapter") and adapted.get_base_model().name_or_path == str(folder / "base")
    assert load_tokenizer(folder / "adapter").get_vocab() == tiny_tokenizer().get_vocab()


def test_an_adapter_on_the_hub_is_loaded_through_peft(folder, monkeypatch):
    """As after a download: transformers would put its layers into the base and return no PEFT model."""
    from huggingface_hub import constants

    cache = folder / "hub"
    repository = cache / "models--me--pirate"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder / "adapter", repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = load_model("me/pirate", dtype="float32", device="cpu")
    assert hasattr(model, "disable_adapter") and any("lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", [5, None, "", "/no/such/folder", "no-such-org/no-such-model"])
def test_a_name_without_a_model_is_refused(name):
    refused(lambda: load_model(name), "model")
    refused(lambda: load_tokenizer(name))


def damage_weights(file):
    file.write_bytes(file.read_bytes()[:-64])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: damage_weights(f / "base/model.safetensors"), ["base", "cannot be loaded"]),
        (lambda f: (f / "base/model.safetensors").unlink(), ["base", "cannot be loaded"]),
        (lambda f: (f / "base/config.json").write_text("{"), ["base", "cannot be loaded"]),
        (lambda f: edit(f / "base/config.json", model_type="nonesuch"), ["base", "cannot be loaded"]),
        (lambda f: edit(f / "base/config.json", intermediate_size=48), ["base", "config.json", "mlp"]),
        (lambda f: edit(f / "base/config.json", num_hidden_layers=3), ["base", "config.json", "model.layers.2"]),
        (lambda f: edit(f / "base/config.json", quantization_config={"quant_method": "gptq"}), ["base", "quantised"]),
    ],
)
def test_a_damaged_model_is_one_line(folder, damage, words):
    damage(folder)
    refused(lambda: load_model(str(folder / "base"), device="cpu"), *words)
    refused(lambda: load_model(str(folder / "adapter"), device="cpu"), *words)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "adapter_config.json").write_text("{"), ["adapter_config.json", "cannot be read"]),
        (lambda f: (f / "adapter_config.json").write_text("[]"), ["adapter_config.json", "must hold"]),
        (lambda f: edit(f / "adapter_config.json", base_model_name_or_path=None), ["base_model_name_or_path"]),
        (lambda f: edit(f / "adapter_config.json", base_model_name_or_path=str(f)), ["on another adapter"]),
        (
            lambda f: edit(f / "adapter_config.json", base_model_name_or_path="/gone/base"),
            ["/gone/base", "adapter_config.json"],
        ),
        (lambda f: edit(f / "adapter_config.json", peft_type="NONESUCH"), ["adapter", "cannot be loaded"]),
        (lambda f: edit(f / "adapter_config.json", r=4), ["adapter", "size mismatch"]),
        (lambda f: damage_weights(f / "adapter_model.safetensors"), ["adapter", "cannot be loaded"]),
    ],
)
def test_a_damaged_adapter_is_one_line(folder, damage, words):
    damage(folder / "adapter")
    refused(lambda: load_model(str(folder / "adapter"), device="cpu"), *words)


def test_the_folder_of_a_run_is_told_from_that_of_its_weights(tmp_path):
    (tmp_path / "final").mkdir()
    for name in ("config.json", "run.json"):
        (tmp_path / name).write_text("{}")
    for load in (load_model, load_tokenizer):
        refused(lambda load=load: load(str(tmp_path)), "its weights are in", str(tmp_path / "final"))


def test_a_damaged_tokenizer_is_one_line(folder):
    (folder / "base" / "tokenizer.json").write_text("{")
    refused(lambda: load_tokenizer(str(folder / "base")), "tokenizer", "cannot be loaded")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(tmp_path / "model")


def test_a_model_spread_over_devices_is_refused():
    model = tiny_model()
    refuse_unsupported(model)
    model.hf_device_map = {"model": 0}
    refuse_unsupported(model)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    refused(lambda: refuse_unsupported(model), "device_map")


def test_a_gguf_file_is_read_once_while_it_is_converted(monkeypatch):
    gguf = pytest.importorskip("gguf")
    read = []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: read.append(path) or object())
    reader = gguf.GGUFReader
    with models._read_once():
        assert gguf.GGUFReader("a") is gguf.GGUFReader("a")
        assert read == ["a"]
    assert gguf.GGUFReader is reader
    with pytest.raises(KeyError), models._read_once():
        raise KeyError
    assert gguf.GGUFReader is reader
