"""Samplers get the weights of now, whoever changed them: no teacher lives here that would tell."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import lora_model, tiny_model

from opcd_fast.errors import InputError
from opcd_fast.rollout import CommandWeights, LoRAWeights, TransformersRollout
from opcd_fast.rollout.protocol import weights_version

IDS = torch.arange(3, 20)[None]


class Server:
    """A server that keeps what it was told to load, as vLLM would read it from the folder."""

    url = "http://server"

    def __init__(self):
        self.loaded = {}

    def post(self, path, body, stop=None):
        if path == "/v1/load_lora_adapter":
            self.loaded[body["lora_name"]] = load_file(Path(body["lora_path"]) / "adapter_model.safetensors")
        elif path == "/v1/unload_lora_adapter":
            del self.loaded[body["lora_name"]]
        return {}


def fused_step(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(parameters, lr=0.05, fused=True).step()


def compiled_fused_step(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.compile(optimizer.step, backend="eager")()


def fused_sgd_kernel(model):
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        torch._fused_sgd_(
            [p.detach() for p in trained], [p.grad for p in trained], [], weight_decay=0.0, momentum=0.0, lr=5.0,
            dampening=0.0, nesterov=False, maximize=False, is_first_step=True,
        )  # fmt: skip


def in_inference_mode(model):
    with torch.inference_mode():
        through_data(model)


def through_data(model):
    for p in model.parameters():
        if p.requires_grad:
            p.data.copy_(p.data * 1.5)


def swapped(model):
    from peft.utils.hotswap import hotswap_adapter

    other = lora_model()
    through_data(other)
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        hotswap_adapter(model, folder, adapter_name="default")


def adapter_of(model):
    return {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if "lora_" in name}


WAYS = [fused_step, compiled_fused_step, fused_sgd_kernel, in_inference_mode, through_data]


@pytest.mark.parametrize("change", [*WAYS, swapped])
def test_a_server_has_the_adapter_of_now(tmp_path, change):
    model, weights, server = lora_model(), LoRAWeights(tmp_path / "adapters"), Server()
    first = weights.push(server, model)
    assert weights.push(server, model) == first and list(server.loaded) == [first], "not sent again"
    change(model)
    weights.push(server, model)
    ((name, loaded),) = server.loaded.items()
    assert name != first and loaded.keys() == adapter_of(model).keys()
    for key, weight in adapter_of(model).items():
        assert torch.equal(loaded[key], weight), key


def test_an_adapter_of_the_same_weights_and_another_scale_is_sent(tmp_path):
    model, weights, server = lora_model(), LoRAWeights(tmp_path / "adapters"), Server()
    first = weights.push(server, model)
    model.peft_config["default"].lora_alpha *= 2
    second = weights.push(server, model)
    assert second != first and list(server.loaded) == [second]


@pytest.mark.parametrize("change", WAYS)
def test_a_command_gets_the_model_of_now(tmp_path, change):
    seen = []
    weights = CommandWeights(tmp_path, "m", lambda folder: seen.append(load_file(folder / "model.safetensors")))
    model = tiny_model().requires_grad_(True)
    for _ in range(2):
        weights.push(Server(), model)
    change(model)
    weights.push(Server(), model)
    first, last = seen
    assert not torch.equal(first["lm_head.weight"], last["lm_head.weight"])
    for name, weight in model.state_dict().items():
        assert torch.equal(last[name], weight), name


def test_what_is_frozen_and_never_sent_does_not_count():
    model = lora_model()
    before = weights_version(model)
    model.base_model.model.lm_head.weight.data.mul_(2)
    assert weights_version(model) == before
    next(p for name, p in model.named_parameters() if "lora_A" in name).data[0, 0] += 1
    assert weights_version(model) != before


def test_where_ranks_hold_parts_none_can_tell(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = fully_shard(tiny_model(), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        assert weights_version(model) != weights_version(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("change", [fused_step, through_data, swapped])
def test_the_merged_copy_folds_the_adapter_of_now(change, monkeypatch):
    model = lora_model()
    plain, merged = (TransformersRollout(model, stop_token_ids=[256], merge_adapter=on) for on in (False, True))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" not in name}
    folds, fold = [], merged._copy._fold
    monkeypatch.setattr(merged._copy, "_fold", lambda: folds.append(1) or fold())

    def answers(rollout):
        return rollout.generate([[7, 9, 11], [13, 17]], max_new_tokens=6, temperature=0)

    first = answers(merged)
    assert answers(merged) == first and len(folds) == 1, "weights that did not move are not folded again"
    change(model)
    found, wanted = answers(merged), answers(plain)
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted] != [a.token_ids for a in first]
    for one, other in zip(found, wanted):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "lora" not in name)
    with pytest.raises(InputError, match="the model it was made with"):
        merged.sync(tiny_model())
